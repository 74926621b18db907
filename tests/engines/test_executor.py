"""Admission, queue, pages, prefix cache, cancellation: what the executor owes its requests beside the algorithm."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from smc_engines.executor import Executor
from smc_engines.kv_cache import worst_case_pages
from smc_engines.outputs import RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import EngineDirError, QueueFullError, RequestError
from tests.toy import Toy, assert_empty, info_of

PARAMS = SamplingParams(temperature=1.0, max_tokens=6, num_particles=4, num_draft_tokens=3, ignore_eos=True, seed=3)
LONG_PROMPT = (1, 2, 3, 4, 4, 3, 2, 1, 3)  # two full pages of 4 and one token


def drive(executor: Executor) -> list[RequestOutput]:
    """Step until nothing is left; every output in order, page counts checked after each step."""
    outputs = []
    while executor.has_work:
        outputs += executor.step()
        executor.check_integrity()
    return outputs


def finished(outputs: Sequence[RequestOutput]) -> dict[str, RequestOutput]:
    return {output.request_id: output for output in outputs if output.finished}


def test_requests_start_by_priority_then_arrival(toy: Toy) -> None:
    executor = toy.executor(max_groups=1)
    for name, priority in (("late", 5), ("first", 1), ("second", 1), ("urgent", -1)):
        executor.submit(name, toy.prompt, PARAMS, priority)
    assert list(finished(drive(executor))) == ["urgent", "first", "second", "late"]
    assert_empty(executor)


def test_a_full_queue_refuses_at_once_and_queues_nothing(toy: Toy) -> None:
    executor = toy.executor(max_groups=1, max_queue=2)
    executor.submit("a", toy.prompt, PARAMS)
    executor.step()
    for name in ("b", "c"):
        executor.submit(name, toy.prompt, PARAMS)
    with pytest.raises(QueueFullError, match="2 requests wait and at most 2 may: try again later"):
        executor.submit("d", toy.prompt, PARAMS)
    assert set(finished(drive(executor))) == {"a", "b", "c"}
    assert_empty(executor)


def test_a_burst_that_free_slots_will_take_is_not_refused(toy: Toy) -> None:
    """An idle service of 16 groups used to refuse half of 16 requests that came between two steps, with a queue of 8."""
    executor = toy.executor(max_groups=3, max_queue=1)
    for name in ("a", "b", "c", "d"):
        executor.submit(name, toy.prompt, PARAMS)
    with pytest.raises(QueueFullError, match="1 requests wait and at most 1 may"):
        executor.submit("e", toy.prompt, PARAMS)
    assert set(finished(drive(executor))) == {"a", "b", "c", "d"}


def test_an_id_in_use_is_refused_and_free_again_afterwards(toy: Toy) -> None:
    executor = toy.executor()
    executor.submit("a", toy.prompt, PARAMS)
    with pytest.raises(RequestError, match="'a' is in use"):
        executor.submit("a", toy.prompt, PARAMS)
    drive(executor)
    executor.submit("a", toy.prompt, PARAMS)
    assert set(finished(drive(executor))) == {"a"}


def test_generate_takes_more_prompts_than_the_queue_and_keeps_their_order(toy: Toy) -> None:
    executor = toy.executor(max_groups=2, max_queue=3)
    prompts = [(1,) * length for length in range(1, 9)]
    outputs = executor.generate(prompts, PARAMS)
    assert [info_of(output).prompt_tokens for output in outputs] == list(range(1, 9))
    with pytest.raises(RequestError, match="2 prompts came with 1 parameters"):
        executor.generate(prompts[:2], [PARAMS])


def test_generate_leaves_nothing_behind_when_a_prompt_is_wrong(toy: Toy) -> None:
    """The prompts before the wrong one used to stay queued and ran, unasked, with the next call."""
    executor = toy.executor(max_groups=1, max_queue=2)
    with pytest.raises(RequestError, match="prompt is empty"):
        executor.generate([toy.prompt, toy.prompt, toy.prompt, ()], PARAMS)
    assert not executor.has_work
    assert_empty(executor)
    assert executor.generate([toy.prompt], PARAMS)[0].finish_reason == "length"


def test_generate_refuses_to_swallow_the_outputs_of_submitted_requests(toy: Toy) -> None:
    executor = toy.executor()
    executor.submit("mine", toy.prompt, PARAMS)
    with pytest.raises(RequestError, match="while 1 submitted requests are live, expected none: step them"):
        executor.generate([toy.prompt], PARAMS)
    assert set(finished(drive(executor))) == {"mine"}


def test_memory_that_the_system_caches_files_in_counts_as_free(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading used to count untouched memory only, and failed on a machine whose file cache had filled it."""
    monkeypatch.setattr("os.sysconf", lambda name: 1)
    assert toy.executor().engine.num_pages > 100


def test_too_little_memory_for_one_request_is_refused_at_loading(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smc_build.machine.free_memory_bytes", lambda: 10_000)
    with pytest.raises(EngineDirError, match=r"0\.0 GiB are free beside the weights, expected room for \d+ KV pages"):
        toy.executor()


@pytest.mark.parametrize("k", [1, 2, 3])
def test_no_page_that_will_be_written_is_ever_shared(letters: Toy, k: int) -> None:
    executor = letters.executor()
    params = replace(PARAMS, num_particles=6, num_draft_tokens=k, ess_threshold=1.0, max_tokens=24)
    for seed in range(6):
        executor.submit(str(seed), letters.prompt, replace(params, seed=seed))
    assert all(info_of(output).resamples > 2 for output in finished(drive(executor)).values())
    assert_empty(executor)


@pytest.mark.parametrize("slots", [1, 2])
def test_an_id_may_be_used_again_while_its_last_round_is_in_flight(toy: Toy, slots: int) -> None:
    executor = toy.executor(overlap=True, max_groups=slots)
    answers = []
    for seed in range(4):
        executor.submit("a", toy.prompt, replace(PARAMS, seed=seed))
        while "a" in executor.scheduler.requests:
            answers += [output.token_ids for output in executor.step() if output.finished]
            executor.check_integrity()
    each = [replace(PARAMS, seed=seed) for seed in range(4)]
    assert answers == [output.token_ids for output in toy.executor().generate([toy.prompt] * 4, each)]
    executor.step()
    assert_empty(executor)


def test_a_shared_page_that_will_be_written_is_an_integrity_error(toy: Toy) -> None:
    executor = toy.executor()
    executor.submit("a", LONG_PROMPT, replace(PARAMS, num_particles=2, max_tokens=7))
    executor.step()
    executor.check_integrity()
    state, slot = executor.slots.state, 0
    last = int(state.num_blocks[slot]) - 1
    mine, theirs = (int(state.block_table[slot, particle, last]) for particle in (0, 1))
    state.block_table[slot, 1, last] = mine
    executor.pool.ref_count[mine] += 1
    executor.pool.ref_count[theirs] -= 1
    with pytest.raises(AssertionError, match="name a shared page that will be written"):
        executor.check_integrity()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_small_pool_makes_requests_wait_and_changes_no_answer(toy: Toy, overlap: bool) -> None:
    each = [replace(PARAMS, seed=seed, num_particles=1 + seed % 4) for seed in range(12)]
    expected = [output.token_ids for output in toy.executor().generate([toy.prompt] * 12, each)]
    most = worst_case_pages(len(toy.prompt), 6, 4, 3, 4)
    executor = toy.executor(num_pages=most + 2, overlap=overlap)  # one large request, or a few small ones
    for number, params in enumerate(each):
        executor.submit(str(number), toy.prompt, params)
    running, answers = 0, {}
    while executor.has_work:
        answers |= {output.request_id: output.token_ids for output in executor.step() if output.finished}
        executor.check_integrity()
        running = max(running, executor.stats.running)
        assert executor.stats.pages_promised <= executor.stats.pages_total == most + 1
    assert 1 < running < 12
    assert [answers[str(number)] for number in range(12)] == expected
    assert_empty(executor)


def test_the_first_that_does_not_fit_holds_back_those_behind_it(toy: Toy) -> None:
    most = worst_case_pages(len(toy.prompt), 6, 4, 3, 4)
    executor = toy.executor(num_pages=most + 2)
    one = replace(PARAMS, num_particles=1)
    for name, params in (("small", one), ("large", PARAMS), ("tiny", one)):
        executor.submit(name, toy.prompt, params)
    executor.step()
    assert executor.stats.running == 1  # tiny would fit beside small, but large comes first
    assert list(finished(drive(executor))) == ["small", "large", "tiny"]


def test_a_request_that_can_never_fit_is_refused(toy: Toy) -> None:
    executor = toy.executor(num_pages=5)
    with pytest.raises(RequestError, match=r"may need \d+ KV pages, the pool has 4"):
        executor.submit("a", toy.prompt, PARAMS)
    assert not executor.has_work


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("schedule", ["deferred", "legacy"])
def test_answers_may_fill_the_longest_context(toy: Toy, overlap: bool, schedule) -> None:
    """With overlap an ended request idles through one more round, which once wrote past its history."""
    executor = toy.executor(overlap=overlap, draft_schedule=schedule)
    for mode in ("smc", "speculative", "target"):
        params = replace(PARAMS, mode=mode, num_draft_tokens=5)
        prompts = [(1,) * length for length in (1, 5, 11, 15)]
        each = [replace(params, max_tokens=16 - len(prompt)) for prompt in prompts]
        outputs = executor.generate(prompts, each)
        assert [len(output.token_ids) for output in outputs] == [15, 11, 5, 1]
        assert_empty(executor)


@pytest.mark.parametrize("prefill_chunk", [1, 3, 4, 8])
def test_chunked_prefill_changes_no_answer(toy: Toy, prefill_chunk: int) -> None:
    prompts = [LONG_PROMPT, (1, 2), LONG_PROMPT[::-1]]
    expected = [output.token_ids for output in toy.executor().generate(prompts, PARAMS)]
    executor = toy.executor(prefill_chunk=prefill_chunk)
    assert [output.token_ids for output in executor.generate(prompts, PARAMS)] == expected
    assert_empty(executor)


def cached(executor: Executor, prompt: Sequence[int], **changes) -> int:
    output = executor.generate([prompt], replace(PARAMS, **changes))[0]
    return info_of(output).cached_tokens


def test_a_known_prefix_is_reused_and_the_answer_stays_the_same(toy: Toy) -> None:
    executor = toy.executor()
    off = toy.executor(prefix_cache=False)
    prompts = [LONG_PROMPT, LONG_PROMPT, (*LONG_PROMPT[:8], 4, 4), (*LONG_PROMPT[:4], 1, 1, 1, 1, 1), LONG_PROMPT[:8]]
    reused = []
    for seed, prompt in enumerate(prompts):
        params = replace(PARAMS, seed=seed, return_particles=True, max_tokens=5)
        with_cache, without = executor.generate([prompt], params)[0], off.generate([prompt], params)[0]
        assert with_cache.token_ids == without.token_ids
        assert [p.token_ids for p in info_of(with_cache).particles] == [p.token_ids for p in info_of(without).particles]
        reused.append(info_of(with_cache).cached_tokens)
        assert info_of(without).cached_tokens == 0
    # The page with the last prompt token is never shared: the last prompt is all of two pages and reuses one.
    assert reused == [0, 8, 8, 4, 4]
    assert off.stats.pages_cached == 0
    assert executor.stats.pages_cached == 3
    assert_empty(executor)
    executor.pool.clear_prefix_cache()
    assert executor.pool.used_pages() == 0


def test_two_requests_share_a_prefix_while_both_run(toy: Toy) -> None:
    executor = toy.executor()
    executor.submit("a", LONG_PROMPT, PARAMS)
    executor.step()
    executor.submit("b", LONG_PROMPT, replace(PARAMS, seed=4))
    executor.step()
    executor.pool.clear_prefix_cache()  # the cache forgets them, the requests keep them
    executor.check_integrity()
    outputs = finished(drive(executor))
    assert info_of(outputs["b"]).cached_tokens == 8
    assert outputs["b"].token_ids == toy.executor().generate([LONG_PROMPT], replace(PARAMS, seed=4))[0].token_ids
    assert_empty(executor)


def test_pages_without_draft_kv_never_serve_a_request_that_drafts(toy: Toy) -> None:
    executor = toy.executor()
    assert cached(executor, LONG_PROMPT, mode="target") == 0
    assert cached(executor, LONG_PROMPT) == 0
    assert cached(executor, LONG_PROMPT) == 8
    assert cached(executor, LONG_PROMPT, mode="speculative") == 8
    assert cached(executor, LONG_PROMPT, mode="target") == 8
    assert cached(executor, LONG_PROMPT, num_draft_tokens=0) == 8  # no draft: the target's pages do


def test_cache_prompt_false_neither_takes_nor_leaves_pages(toy: Toy) -> None:
    executor = toy.executor()
    assert cached(executor, LONG_PROMPT, cache_prompt=False) == 0
    assert executor.stats.pages_cached == 0
    cached(executor, LONG_PROMPT)
    assert cached(executor, LONG_PROMPT, cache_prompt=False) == 0


def test_admission_evicts_the_least_recently_used_prefixes(toy: Toy) -> None:
    need = worst_case_pages(9, 6, 4, 3, 4)
    executor = toy.executor(num_pages=need + 1 + 4)  # one running request and two prompts' full pages
    prompts = [(token,) * 8 + (1,) for token in range(5)]
    assert [cached(executor, prompts[index]) for index in (0, 1, 0)] == [0, 0, 8]
    # The third prompt needs room: both pages of prompt 1 were used before either of prompt 0.
    assert cached(executor, prompts[2]) == 0
    assert executor.stats.pages_cached == 4
    assert cached(executor, prompts[0]) == 8
    assert cached(executor, prompts[1]) == 0
    for prompt in prompts * 2:
        cached(executor, prompt)
        executor.check_integrity()
        assert executor.stats.pages_cached <= 4
    assert_empty(executor)


def test_cancelling_waiting_running_and_unknown_requests(toy: Toy) -> None:
    executor = toy.executor(max_groups=2)
    for name in ("a", "b", "waits"):
        executor.submit(name, toy.prompt, replace(PARAMS, max_tokens=12))
    outputs = executor.step()
    for name in ("a", "waits", "nobody", "a"):
        executor.cancel(name)
    outputs += drive(executor)
    ends = finished(outputs)
    assert {name: output.finish_reason for name, output in ends.items()} == {
        "a": "cancelled",
        "waits": "cancelled",
        "b": "length",
    }
    assert sum(output.finished for output in outputs) == 3
    assert ends["waits"].token_ids == ()
    assert info_of(ends["waits"]).rounds == 0
    executor.cancel("b")  # it has ended: ignored
    assert executor.step() == []
    assert_empty(executor)


def test_a_cancelled_request_is_gone_with_the_next_step(toy: Toy) -> None:
    executor = toy.executor(max_groups=2)
    for name in ("a", "b"):
        executor.submit(
            name, toy.prompt, replace(PARAMS, max_tokens=12, num_draft_tokens=1, cache_prompt=False, ignore_eos=True)
        )
    executor.step()
    executor.step()
    both = executor.pool.used_pages()
    executor.cancel("a")
    executor.step()
    assert list(executor.scheduler.requests) == ["b"]
    assert 0 < executor.pool.used_pages() <= both / 2 + 1  # b may have begun a page
    executor.cancel("b")
    executor.step()
    assert executor.pool.used_pages() == 0


def test_stats_count_what_runs_and_what_was_said(toy: Toy) -> None:
    executor = toy.executor(max_groups=1)
    for name in ("a", "b"):
        executor.submit(name, toy.prompt, PARAMS)
    assert (executor.stats.running, executor.stats.waiting) == (0, 2)
    executor.step()
    assert (executor.stats.running, executor.stats.waiting) == (1, 1)
    assert executor.stats.pages_promised == worst_case_pages(len(toy.prompt), 6, 4, 3, 4)
    drive(executor)
    assert executor.stats.tokens == 12
    assert executor.stats.rounds == 4  # x0, four tokens, the last one: two rounds each


def test_times_are_in_order(toy: Toy) -> None:
    info = info_of(toy.executor().generate([toy.prompt], PARAMS)[0])
    assert 0 <= info.queue_ms <= info.first_token_ms <= info.total_ms < 60_000
    assert info.seed == 3
    other = info_of(toy.executor().generate([toy.prompt], replace(PARAMS, seed=2**64 - 1))[0])
    assert other.seed == 2**64 - 1
    drawn = [info_of(toy.executor().generate([toy.prompt], replace(PARAMS, seed=None))[0]).seed for _ in range(2)]
    assert drawn[0] != drawn[1]
