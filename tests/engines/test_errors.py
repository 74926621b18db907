"""Every wrong request gets its own clear error, and leaves nothing queued."""

from dataclasses import replace

import pytest

from smc_engines.config import ExecutorConfig
from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import ConfigError, EngineDirError, RequestError
from tests.toy import Toy, build

GOOD = SamplingParams(num_particles=2, num_draft_tokens=2, max_tokens=4)

WRONG = {
    "empty prompt": ((), {}, r"prompt is empty, expected at least one token: pass some text"),
    "prompt too long": ((1,) * 14, {}, r"14 tokens and max_tokens is 4, together at most 16 fit: .* --max-seq-len 18"),
    "token outside the vocabulary": ((1, 5), {}, r"prompt token 5 is not in the vocabulary, expected 0 to 4: "),
    "negative token": ((-1,), {}, r"prompt token -1 is not in the vocabulary, expected 0 to 4: "),
    "token of the wrong type": ((1.0,), {}, r"prompt token 1.0 is not in the vocabulary"),
    "truth value as token": ((True,), {}, r"prompt token True is not in the vocabulary"),
    "too many particles": (
        (1,),
        {"num_particles": 17},
        r"num_particles 17, the engine was built for at most 16: lower it, or rebuild with --particles 17",
    ),
    "too many draft tokens": (
        (1,),
        {"num_draft_tokens": 6},
        r"num_draft_tokens 6, the engine was built for at most 5: lower it, or rebuild with --draft-tokens 6",
    ),
    "speculation without drafts": (
        (1,),
        {"mode": "speculative", "num_draft_tokens": 0},
        r"speculative needs num_draft_tokens of at least 1, got 0: raise it",
    ),
    "stop strings without a tokenizer": ((1,), {"stop": ("x",)}, r"stop strings need a tokenizer, .*stop_token_ids"),
    "stop token outside the vocabulary": ((1,), {"stop_token_ids": (9,)}, r"stop token id 9 .* expected 0 to 4: drop"),
    "text without a tokenizer": ("hello", {}, r"no tokenizer, got a text prompt: send token ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_does_not_fit_the_engine_says_what_would(toy: Toy, case: str) -> None:
    prompt, changes, message = WRONG[case]
    executor = toy.executor()
    with pytest.raises(RequestError, match=message) as caught:
        executor.submit("a", prompt, replace(GOOD, **changes))
    assert "\n" not in str(caught.value)
    assert not executor.has_work
    assert executor.stats.waiting == 0
    executor.submit("a", (1,), GOOD)  # the id is free
    assert executor.has_work


def test_several_ranks_verify_one_sequence_only(toy: Toy) -> None:
    """No rank has the whole rows of probabilities that verifying several sequences needs."""
    limits = replace(toy.executor().engine.limits, num_ranks=2)
    with pytest.raises(
        RequestError, match=r"exact_below is 0.5, an engine of 2 ranks verifies one sequence only: drop"
    ):
        limits.drafting(replace(GOOD, exact_below=0.5))


PARAMETERS = {
    "max_tokens 0": ({"max_tokens": 0}, r"max_tokens must be in \[1, \d+\], got 0: choose"),
    "a float count": ({"num_particles": 2.0}, r"num_particles must be a whole number, got 2.0: pass an integer"),
    "a truth value": ({"num_draft_tokens": True}, r"num_draft_tokens must be a whole number, got True"),
    "no particles": ({"num_particles": 0}, r"num_particles must be in \[1, 4096\], got 0"),
    "negative drafts": ({"num_draft_tokens": -1}, r"num_draft_tokens must be in \[0, 1024\], got -1"),
    "text for a number": ({"temperature": "hot"}, r"temperature must be a finite number, got 'hot': pass a number"),
    "a number beyond floats": (
        {"temperature": 10**400},
        r"temperature must be in \[0, 100\], got one of more than 300",
    ),
    "negative temperature": ({"temperature": -0.1}, r"temperature must be in \[0, 100\], got -0.1"),
    "infinite temperature": ({"temperature": float("inf")}, r"temperature must be a finite number, got inf"),
    "cold draft": ({"draft_temperature": 0.0}, r"draft_temperature must be in \(0, 100\], got 0"),
    "no power": ({"power_alpha": 0}, r"power_alpha must be in \(0, 100\], got 0"),
    "NaN": ({"top_p": float("nan")}, r"top_p must be a finite number, got nan"),
    "empty nucleus": ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0"),
    "threshold above 1": ({"ess_threshold": 1.5}, r"ess_threshold must be in \[0, 1\], got 1.5"),
    "negative seed": ({"seed": -1}, r"seed must be in \[0, \d+\], got -1"),
    "seed of 65 bits": ({"seed": 2**64}, r"seed must be in \[0, 18446744073709551615\]"),
    "unknown mode": ({"mode": "beam"}, r"mode must be one of smc, target, speculative, got 'beam': choose"),
    "unknown choice": ({"select": "best"}, r"select must be one of sample, argmax, got 'best'"),
    "min above max": ({"min_tokens": 300}, r"min_tokens must not exceed max_tokens, got 300 > 256: lower"),
    "empty stop string": ({"stop": ("a", "")}, r"stop must be a list of non-empty strings, got \('a', ''\): drop"),
    "too many stops": ({"stop": tuple("abcdefghijklmnopq")}, r"at most 16 stop strings, got 17: pass fewer"),
    "stop token of the wrong type": ({"stop_token_ids": ("1",)}, r"stop_token_ids must be a whole number, got '1'"),
    "yes for true": ({"logprobs": "yes"}, r"logprobs must be true or false, got 'yes': pass a boolean"),
    "unknown name": ({"temprature": 1.0}, r"unknown sampling parameter 'temprature': did you mean 'temperature'\?"),
    "name like nothing": ({"zzz": 1}, r"unknown sampling parameter 'zzz': known: mode, num_particles"),
}


@pytest.mark.parametrize("case", PARAMETERS)
def test_a_wrong_parameter_is_named_with_its_range(case: str) -> None:
    values, message = PARAMETERS[case]
    with pytest.raises(RequestError, match=message) as caught:
        SamplingParams.from_mapping(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["stop", "stop_token_ids"])
@pytest.mark.parametrize("value", ["ab", 3, None])
def test_stops_that_are_no_list_are_refused(name: str, value: object) -> None:
    with pytest.raises(RequestError, match=f"{name} must be a list, got {value!r}: pass a list"):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_a_text_with_half_a_character_is_refused(letters: Toy) -> None:
    r"""JSON may spell a lone surrogate ("\ud800"); the tokenizer's TypeError for it used to end the whole process."""
    executor = letters.executor()
    with pytest.raises(RequestError, match=r"not valid Unicode, expected whole characters, got '\\ud800' at place 1"):
        executor.submit("a", "a\ud800", GOOD)
    assert not executor.has_work


@pytest.mark.parametrize("mode", ["smc", "target", "speculative"])
def test_a_temperature_next_to_zero_is_zero(toy: Toy, mode) -> None:
    """Logits over 1e-38 are infinite, which used to be reported as a damaged checkpoint."""
    executor = toy.executor()
    greedy = replace(GOOD, mode=mode, temperature=0.0, ignore_eos=True)
    expected = executor.generate([(1, 2)], greedy)[0].token_ids
    for changes in ({"temperature": 1e-38}, {"temperature": 9e-5}):
        assert executor.generate([(1, 2)], replace(greedy, **changes))[0].token_ids == expected
    cold_draft = replace(GOOD, mode=mode, temperature=1.0, draft_temperature=1e-38)
    assert executor.generate([(1, 2)], cold_draft)[0].error is None


def test_parameters_come_from_json_lists_and_single_values() -> None:
    params = SamplingParams.from_mapping({"stop": "end", "stop_token_ids": [3, 4], "seed": 2**64 - 1, "temperature": 0})
    assert (params.stop, params.stop_token_ids, params.seed) == (("end",), (3, 4), 2**64 - 1)
    with pytest.raises(RequestError, match="stop must be a list, got 3"):
        SamplingParams.from_mapping({"stop": 3.0})


def test_an_engine_without_a_draft_serves_the_target_only(toy: Toy, folder) -> None:
    engine_dir = build(folder / "engine", toy.engine_dir.parent / "target", None)
    executor = Executor.from_engine_dir(engine_dir, ExecutorConfig(device="cpu"))
    with pytest.raises(RequestError, match="mode smc needs a draft, the engine was built with --draft none"):
        executor.submit("a", (1,), GOOD)
    assert not executor.has_work
    assert executor.generate([(1,)], SamplingParams(mode="target", max_tokens=3, ignore_eos=True))[0].finished
    assert executor.generate([(1,)], replace(GOOD, num_draft_tokens=0))[0].finished


SETTINGS = {
    "device": ({"device": "tpu"}, r"device must be auto, cpu or cuda, got 'tpu'"),
    "groups": ({"max_groups": 0}, r"max_groups must be at least 1, got 0"),
    "pages": ({"num_pages": 1}, r"num_pages must be at least 2, got 1"),
    "fraction": ({"kv_memory_fraction": 0.0}, r"kv_memory_fraction must be in \(0, 1\], got 0.0"),
    "schedule": ({"draft_schedule": "eager"}, r"draft_schedule must be deferred or legacy, got 'eager'"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_wrong_setting_is_refused(toy: Toy, case: str) -> None:
    values, message = SETTINGS[case]
    with pytest.raises(ConfigError, match=message):
        toy.executor(**values)


def test_a_folder_that_is_no_engine_directory_is_refused(folder) -> None:
    with pytest.raises(EngineDirError):
        Executor.from_engine_dir(folder, ExecutorConfig(device="cpu"))
