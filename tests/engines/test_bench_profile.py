"""The profile of a round, on traces whose launches are those of real rounds and whose times are known."""

import gzip
import json
import shutil
from pathlib import Path

import pytest

from smc_build.builder import BuildOptions
from smc_engines.bench import plot, profiling
from smc_engines.bench.kernels import label_round
from smc_engines.bench.measure import Bench
from smc_engines.bench.points import Case, Point
from smc_engines.bench.profiling import shapes_of, summarise
from smc_engines.bench.report import profile_text, short_name
from smc_engines.bench.trace import Event, Timeline, advance_us, gaps, load_events, split_rounds
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_plugin.errors import ConfigError, SmcError
from tests.engines.recorded_rounds import ELEMENTWISE, llama_case, llama_engine, record_round, write_trace
from tests.tiny_models import make_checkpoint

LAYERS, DRAFT_LAYERS, PASSES = 32, 16, 8


@pytest.fixture(scope="module")
def names() -> list[str]:
    """Kernels of an smc round of llama-8b with llama-1b, N = 8, K = 8."""
    return record_round(llama_case())


def events_of(names: list[str]) -> list[Event]:
    return [Event(name, "kernel", 10.0 * at, 10.0, (1,), 1) for at, name in enumerate(names)]


def places(names: list[str]) -> dict[tuple[str, str], int]:
    """How many kernels have each (group, place)."""
    counts: dict[tuple[str, str], int] = {}
    for label in label_round(events_of(names), shapes_of(llama_engine(), llama_case())):
        counts[label.group, label.place] = counts.get((label.group, label.place), 0) + 1
    return counts


def test_every_product_is_told_apart(names: list[str]) -> None:
    found = places(names)
    for place in ("qkv", "o", "gate_up", "down"):
        assert found["draft products", place] == PASSES * DRAFT_LAYERS
        assert found["target products", place] == LAYERS
    assert found["draft head", "head"] == PASSES
    assert found["target head", "head"] == 1
    assert found["draft attention", ""] == PASSES * (DRAFT_LAYERS + 1)
    assert found["target attention", ""] == LAYERS + 1
    assert found["sampling", ""] == 2 * (PASSES + 2)
    assert found["page copy", ""] == 2
    assert found["draft other", ""] == 3 * PASSES  # look-up, first and last norm; other norms are part of products
    assert "other" not in {group for group, _ in found}


def test_names_of_cublas_do_as_well(names: list[str]) -> None:
    """A product split along its inner dimension is followed by a reduction, which is no product of its own."""
    renamed = []
    for number, name in enumerate(names):
        if name == "_linear_kernel":
            renamed.append("nvjet_tst_64x8_64x16_4x1_v_bz_TNT")
            if number % 5 == 0:
                renamed.append("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float>(int)")
        else:
            renamed.append(name)
    found = places(renamed)
    assert found["draft products", "down"] == PASSES * DRAFT_LAYERS
    assert found["target head", "head"] == 1
    assert found["draft products", ""] + found["target products", ""] == len(renamed) - len(names)


@pytest.mark.parametrize(
    "kernel",
    [
        "rank_sum_norm_kernel",
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
        "void c10d::symmetric_memory::two_shot_all_reduce_kernel_inplace<c10::BFloat16, 16, 4>(c10::BFloat16**)",
    ],
)
def test_sums_over_ranks_are_a_group_of_their_own(names: list[str], kernel: str) -> None:
    """Whichever kernel makes them; the products around them keep their places."""
    attention = [index for index, name in enumerate(names) if name == "_attention_kernel"][-LAYERS:]
    with_sums = []
    for index, name in enumerate(names):
        with_sums.append(name)
        if index - 1 in attention:  # this is o
            with_sums.append(kernel)
    found = places(with_sums)
    assert found["collective", ""] == LAYERS
    for place in ("o", "gate_up", "down", "qkv"):
        assert found["target products", place] == LAYERS


def test_a_fused_layer_keeps_its_model(names: list[str]) -> None:
    """Three kernels a layer instead of four: no places, but the head still stands out by its time."""
    shapes, at = shapes_of(llama_engine(), llama_case()), 0
    events = []
    for name in names:
        if name == "_linear_kernel":
            at += 1
            if at % 4 == 0:
                continue
        events.append(Event(name, "kernel", 10.0 * len(events), 10.0, (1,), 1))
    groups = [label.group for label in label_round(events, shapes)]
    assert groups.count("draft products") > 300
    assert groups.count("target products") > 90


def test_a_draft_in_one_kernel_is_still_the_draft(names: list[str]) -> None:
    """A persistent kernel hides the draft's attention: what lies before the target's pass is the draft's."""
    last_draw = [index for index, name in enumerate(names) if name == "_combine_kernel"][PASSES - 1]
    fused = [*names[:3], "_draft_step_kernel", *names[last_draw + 1 :]]
    found = places(fused)
    assert found["draft other", ""] == 1
    assert found["target products", "gate_up"] == LAYERS


def test_rounds_gaps_and_tables(names: list[str], tmp_path: Path) -> None:
    """12 rounds, of which 3 are dropped: 8 gaps of 10 µs, 3 of them the copy; times as they were written."""
    times = {"_linear_kernel": 11.0, "_attention_kernel": 3.0}
    events = load_events(write_trace(tmp_path / "trace.json", names, 12, us=times))
    found = summarise(events, llama_engine(), llama_case(), 500.0)
    assert found["rounds"] == 9
    assert (found["round_gap_us"], found["round_gap_max_us"]) == (pytest.approx(10), pytest.approx(10))
    assert (found["round_gap_count"], found["round_gap_copies_us"]) == (8, pytest.approx(3))
    # Each kernel starts 1 µs before the one before it ends, and that microsecond counts once.
    products, calls, rest = names.count("_linear_kernel"), names.count("_attention_kernel"), 0
    rest = len(names) - products - calls
    assert found["kernel_durations_us"] == pytest.approx(11 * products + 3 * calls + 5 * rest)
    assert found["kernels_us"] == pytest.approx(10 * products + 2 * calls + 4 * rest + 1)
    assert found["round_us"] == pytest.approx(found["kernels_us"] + found["idle_us"] + found["round_gap_us"])
    assert found["launches"] == len(names)

    groups = {row["group"]: row for row in found["groups"]}
    assert sum(row["share"] for row in groups.values()) == pytest.approx(1)
    assert groups["target products"]["bytes"] == 32 * 2 * 4096 * (6144 + 4096 + 3 * 14336)
    assert groups["target products"]["tb_per_s"] == pytest.approx(groups["target products"]["bytes"] / 1280e6)
    assert groups["draft head"]["bytes"] == 8 * 2 * 2048 * 128256
    assert groups["target attention"]["bytes"] == (240 + 8 * 260) * 131072
    assert groups["sampling"]["bytes"] is None
    row = next(row for row in found["kernels"] if row["group"] == "draft products" and row["place"] == "down")
    assert (row["name"], row["launches"], row["us"]) == ("_linear_kernel", 128, pytest.approx(1280))
    assert row["bytes"] == 128 * 2 * 8192 * 2048

    text = profile_text(found, 12.0)
    assert "gap between consecutive rounds: median 10.0 us, at most 10.0 (8 gaps)" in text
    assert "copy of its summary included (3.0 us of it)" in text
    plot.draw({"rows": [], "profiles": [found]}, tmp_path / "profile.png")


def test_traces_may_be_compressed_or_cut(names: list[str], tmp_path: Path) -> None:
    plain = write_trace(tmp_path / "trace.json", names, 6)
    with plain.open("rb") as source, gzip.open(tmp_path / "trace.json.gz", "wb") as packed:
        shutil.copyfileobj(source, packed)
    events = load_events(tmp_path / "trace.json.gz")
    assert len(split_rounds(events).rounds) == 6
    assert len(split_rounds(events[: -len(names) // 2]).rounds) == 5
    with pytest.raises(SmcError, match="holds 4 whole rounds, expected more than 4: raise --profile-rounds"):
        summarise(events[: 4 * (len(names) + 1)], llama_engine(), llama_case(), 500.0)


def test_rounds_that_were_not_captured_begin_at_their_first_kernel(names: list[str], tmp_path: Path) -> None:
    """Without a graph every kernel has a number of its own; a prefill before the first round is outside."""
    path = write_trace(tmp_path / "trace.json", names, 3)
    trace = json.loads(path.read_text())
    for number, entry in enumerate(trace["traceEvents"]):
        entry["args"]["correlation"] = number
    prefill = {"ph": "X", "cat": "kernel", "name": ELEMENTWISE, "ts": 1.0, "dur": 2.0, "args": {}}
    path.write_text(json.dumps({"traceEvents": [*trace["traceEvents"], prefill]}))
    timeline = split_rounds(load_events(path))
    assert [len(each) for each in timeline.rounds] == [len(names)] * 3
    assert [round(gap.us, 3) for gap in gaps(timeline)] == [10, 10]
    assert [gap.copies_us for gap in gaps(timeline)] == [3, 3]


def test_a_trace_without_rounds_says_so() -> None:
    with pytest.raises(SmcError, match="the trace holds no round"):
        split_rounds([Event("some_kernel", "kernel", 0.0, 1.0, (), 3)])


def test_shares_count_every_microsecond_once() -> None:
    """The second kernel waits inside the first, the third starts 2 µs late, the fourth hides within the third."""
    spans = [(0, 10), (4, 8), (14, 6), (15, 1)]
    events = [Event("k", "kernel", float(start), float(us)) for start, us in spans]
    assert advance_us(events) == ([10, 2, 6, 0], 2)
    assert gaps(Timeline([events, [Event("k", "kernel", 25.0, 1.0)]], []))[0].us == 5


class Recorder:
    """Stands in for torch's profiler: notes when it was on, and exports a trace of that many rounds."""

    def __init__(self, bench: Bench, names: list[str]) -> None:
        self._bench, self._names = bench, names
        self.rounds = 0

    def __enter__(self) -> "Recorder":
        self.rounds -= self._bench.executor.stats.rounds
        return self

    def __exit__(self, *exception: object) -> None:
        self.rounds += self._bench.executor.stats.rounds

    def export_chrome_trace(self, path: str) -> None:
        write_trace(Path(path), self._names, self.rounds)


def test_recording_takes_rounds_of_a_running_batch(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 rounds are dropped and 5 counted; the engine is left without a request, and the trace is kept."""
    target = make_checkpoint(tmp_path / "target", seed=1)
    options = BuildOptions(str(target), draft=str(target), dtype="float32", max_seq_len=128)
    bench = Bench(Engine.from_random(options, ExecutorConfig(device="cpu")), 0.7)
    case = Case(Point(1, 4, 2, 20, 60), "smc")
    with pytest.raises(ConfigError, match="records kernels of a CUDA device, the engine runs on cpu"):
        profiling.profile(bench, case, rounds=5)
    recorder = Recorder(bench, names)
    monkeypatch.setattr(profiling, "_has_kernels", lambda _: True)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.profiler.profile", lambda activities: recorder)
    found = profiling.profile(bench, case, rounds=5, trace=tmp_path / "kept" / "trace.json")
    assert recorder.rounds == 8
    assert (found["rounds"], found["round_gap_count"]) == (5, 4)
    # Rounds 1 to 5 are over when recording starts, and 8 are recorded, of 3 tokens each after the first one.
    assert found["context_tokens"] == 20 + (5 * 3 + 13 * 3) / 2
    assert not bench.executor.has_work
    assert (tmp_path / "kept" / "trace.json").exists()
    with pytest.raises(ConfigError, match="--profile-rounds 20 needs an answer of 28 rounds"):
        profiling.profile(bench, case, rounds=20)


def test_short_names() -> None:
    assert short_name("_linear_kernel") == "_linear_kernel"
    assert short_name(ELEMENTWISE).startswith("at::native::vectorized_elementwise_kernel")
    assert len(short_name(ELEMENTWISE)) <= 44
