"""Builds through the command line: what is printed and written, and that a failed or killed build leaves nothing."""

import json
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from smc_build.builder import BuildOptions, build_engine
from smc_build.cli import main, obstacle_here
from smc_build.engine_dir import is_engine_dir, load_manifest, load_weights, tokenizer_path
from smc_build.plan import make_plan, row_buckets
from smc_plugin.errors import EngineDirError
from tests.tiny_models import make_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with checkpoints t (target) and d (draft)."""
    make_checkpoint(tmp_path / "t", layers=2, seed=1)
    make_checkpoint(tmp_path / "d", layers=1, seed=2)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a build that must fail; return its one-line error."""
    before = sorted(path for path in Path().rglob("*"))
    capsys.readouterr()
    assert main(list(arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith("smc-build: ")
    assert error.count("\n") == 1
    assert sorted(path for path in Path().rglob("*")) == before, "a refused build must not write"
    return error


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            ["--particles", "abc"],
            "smc-build: argument --particles: invalid int value: 'abc' (--help lists the options)\n",
        ),
        (["--partcles", "4"], "smc-build: unrecognized arguments: --partcles 4: did you mean --particles?"),
    ],
)
def test_options_that_do_not_parse_are_one_line_and_exit_1(
    capsys: pytest.CaptureFixture[str], option: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--checkpoint", "t", *option])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith(message)
    assert error.count("\n") == 1


def edit_config(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


def test_build_prints_the_plan_and_the_next_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["--checkpoint", "t", "--draft", "d", "--particles", "4", "--draft-tokens", "2", "--dtype", "float32"])
        == 0
    )
    out = capsys.readouterr().out
    for line in (
        "Plan for engines/t-tp1",
        "107,328 parameters",
        "N <= 4 particles",
        "8, 16, 32, 48",
        "smc-run --engine engines/t-tp1",
    ):
        assert line in out
    manifest = load_manifest("engines/t-tp1")
    assert (manifest.dtype, manifest.max_seq_len, manifest.weights, manifest.compiler) == (
        "float32",
        512,
        "checkpoint",
        "torch",
    )
    assert (manifest.max_particles, manifest.max_draft_tokens) == (4, 2)
    assert sorted(path.name for path in Path("engines").iterdir()) == ["t-tp1"]
    assert main(["--inspect", "engines/t-tp1"]) == 0
    assert "all sizes and hashes right" in capsys.readouterr().out


def test_inspect_reports_damage(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "t", "--draft", "d"]) == 0
    with Path("engines/t-tp1/target/weights/rank0.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 0x80]))
    capsys.readouterr()
    assert "rank0.safetensors is damaged" in refused(capsys, "--inspect", "engines/t-tp1")


def test_build_without_draft_or_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_checkpoint(tmp_path / "t", "qwen2", tokenizer=False)
    path = build_engine(BuildOptions("t", "none", dtype="bfloat16", name="solo"))
    assert path == Path("engines/solo-tp1")
    manifest = load_manifest(path)
    assert manifest.draft is None
    assert tokenizer_path(path) is None
    assert load_weights(path, "target")["layers.0.qkv"].dtype == torch.bfloat16


def test_random_weights_keep_shapes_and_depend_on_the_seed(folder: Path) -> None:
    weights = []
    for seed, name in ((3, "a"), (3, "b"), (4, "c")):
        path = build_engine(BuildOptions("t", "t", seed=seed, random_weights=True, name=name, dtype="float32"))
        assert load_manifest(path).weights == "random"
        assert not list(path.rglob("*.safetensors")), "they are made when they are loaded"
        weights.append((load_weights(path, "target")["layers.1.down"], load_weights(path, "draft")["layers.1.down"]))
    (a, a_draft), (b, b_draft), (c, _) = weights
    assert torch.equal(a, b)
    assert torch.equal(a_draft, b_draft)
    assert not torch.equal(a, c)
    assert not torch.equal(a, a_draft), "target and draft of equal shapes must differ"


def test_llama_70b_over_four_ranks_takes_no_disk_for_random_weights(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """144 GB of numbers that a seed gives used to be written, for half an hour and to disks that few have."""
    monkeypatch.setattr("smc_build.plan.free_disk_bytes", lambda path: 10**9)
    arguments = ["--checkpoint", "llama-70b", "--tp", "4", "--random-weights", "--compiler", "torch"]
    assert main(arguments) == 0
    assert "144 GB as bfloat16 (random, made when loaded)" in capsys.readouterr().out
    manifest = load_manifest("engines/llama-70b-tp4")
    assert (manifest.target.seed, manifest.target.tp) == (0, 4)
    assert sum(entry.bytes for entry in manifest.files.values()) < 100_000
    with pytest.raises(EngineDirError, match="expected ranks 0 to 3"):
        load_weights("engines/llama-70b-tp4", "draft", 4)


def test_a_preset_is_found_under_checkpoints(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("checkpoints").mkdir()
    Path("t").rename("checkpoints/llama-8b")
    Path("d").rename("checkpoints/Llama-3.2-1B-Instruct")
    assert main(["--checkpoint", "llama-8b"]) == 0
    manifest = load_manifest("engines/llama-8b-tp1")
    assert manifest.target.source == "meta-llama/Llama-3.1-8B-Instruct"
    assert manifest.draft is not None
    assert manifest.draft.config.num_layers == 1


def test_the_plan_says_what_each_rank_gets(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "llama-70b", "--tp", "16"]) == 1
    captured = capsys.readouterr()
    assert "70,553,706,496 parameters" in captured.out
    assert "11.6 GB of weights on each of 16 ranks" in captured.out
    assert "target: 4 of 64 heads, 1 of 8 KV heads" in captured.out
    assert "each KV head on 2 ranks" in captured.out
    assert "free some, or choose another disk" in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "lama-70b"], "did you mean 'llama-70b'"),
        (["--checkpoint", "t"], "t has no default draft"),
        (["--checkpoint", "t", "--draft", "e"], "'e' is neither a folder nor a preset"),
        (["--checkpoint", "t", "--draft", "llama-1b"], "128256 tokens, expected the target's 260"),
        (["--checkpoint", "t", "--draft", "d", "--dtype", "float23"], "did you mean 'float32'"),
        (["--checkpoint", "t", "--draft", "d", "--dtype", "fp7"], "expected one of float32, bfloat16, fp8"),
        (["--checkpoint", "t", "--draft", "d", "--compiler", "tensorrt"], "smc-engine[tensorrt]"),
        (["--checkpoint", "t", "--draft", "d", "--particles", "0"], "--particles is 0, expected 1 to 256"),
        (["--checkpoint", "t", "--draft", "d", "--seed", "-1"], "--seed is -1, expected 0 to"),
        (["--checkpoint", "", "--draft", "d"], "'' is neither a folder nor a preset"),
        (["--checkpoint", "t", "--draft", "d", "--draft-tokens", "65"], "--draft-tokens is 65"),
        (["--checkpoint", "t", "--draft", "d", "--groups", "0"], "--groups is 0"),
        (["--checkpoint", "t", "--draft", "d", "--page-size", "12"], "power of two"),
        (["--checkpoint", "t", "--draft", "d", "--max-seq-len", "513"], "expected 10 (a round with K = 8) to 512"),
        (["--checkpoint", "t", "--draft", "d", "--max-seq-len", "9"], "--max-seq-len is 9"),
        (["--checkpoint", "t", "--draft", "d", "--name", "../x"], "--name is '../x'"),
        (["--draft", "d"], "expected --checkpoint"),
        (["--inspect", "t"], "t is not an engine directory"),
    ],
)
def test_wrong_options(folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert message in refused(capsys, *arguments)


def test_different_tokenizers_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = folder / "d" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"] = [["a", "b"]]
    path.write_text(json.dumps(tokenizer))
    assert "different tokenizers" in refused(capsys, "--checkpoint", "t", "--draft", "d")


def test_tokenizers_are_compared_by_content(folder: Path) -> None:
    for name, merges in (("t", ["a b", "b c"]), ("d", [["a", "b"], ["b", "c"]])):
        path = folder / name / "tokenizer.json"
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["merges"] = merges
        path.write_text(json.dumps(tokenizer, indent=1 if name == "t" else None, sort_keys=name == "d"))
    build_engine(BuildOptions("t", "d"))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_checkpoint(folder / "small", vocab_size=100)
    (folder / "small" / "tokenizer.json").write_bytes((folder / "t" / "tokenizer.json").read_bytes())
    message = refused(capsys, "--checkpoint", "small", "--draft", "none")
    assert "token id 259, expected ids below the vocabulary size 100" in message


def test_a_broken_draft_is_refused_before_the_target_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_config(folder / "d", num_hidden_layers=2)
    message = refused(capsys, "--checkpoint", "t", "--draft", "d")
    assert "model.layers.1.input_layernorm.weight (and 8 more) is missing" in message


def test_too_little_disk_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder / "t", num_hidden_layers=4_000, hidden_size=8192, intermediate_size=8192)
    message = refused(capsys, "--checkpoint", "t", "--draft", "d")
    assert "TB of disk" in message


def test_disk_for_the_download_counts_too(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build used to fetch 18.5 GB first and only then find no room for as much again."""
    monkeypatch.setattr("smc_build.plan.free_disk_bytes", lambda path: 30 * 10**9)
    monkeypatch.setattr("smc_build.presets.free_disk_bytes", lambda path: 30 * 10**9)
    monkeypatch.setattr("smc_build.plan.free_memory_bytes", lambda: 10**12)
    message = refused(capsys, "--checkpoint", "llama-8b")
    assert "engines/llama-8b-tp1, with what it is fetched from, needs 37.1 GB of disk, 30 GB are free" in message
    monkeypatch.setattr("smc_build.plan.same_disk", lambda one, other: False)
    monkeypatch.setattr("huggingface_hub.snapshot_download", _no_network)
    message = refused(capsys, "--checkpoint", "llama-8b")
    assert "cannot fetch meta-llama/Llama-3.1-8B-Instruct from the Hub (ConnectionError)" in message
    assert "checkpoints/Llama-3.1-8B-Instruct, or use --random-weights" in message


def _no_network(*arguments: object, **options: object) -> None:
    raise ConnectionError


def test_the_next_command_leaves_room_for_a_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """smc-run's 256 answer tokens did not fit an engine of 256, so the printed command failed."""
    for length, ending in ((100, '"Why is the sky blue?" --max-tokens 50\n'), (512, '"Why is the sky blue?"\n')):
        arguments = ["--checkpoint", "t", "--draft", "d", "--max-seq-len", str(length), "--name", f"e{length}"]
        assert main(arguments) == 0
        assert capsys.readouterr().out.endswith(ending)


@pytest.mark.parametrize(
    ("memory", "arguments", "found", "advice"),
    [
        (1_000_000, [], "it needs 711 kB for weights and 393 kB for the KV pages", "to a larger machine, and there:"),
        (1_000_000, ["--tp", "2"], "each of its 2 ranks needs", "500 kB of memory are free for each: copy"),
        (10**9, ["--tp", "2"], "mpirun is not installed, expected the extra mpi", "smc-engine[mpi]', and then:"),
    ],
)
def test_an_engine_that_does_not_run_here_says_so_instead_of_what_is_next(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, memory, arguments, found, advice
) -> None:
    monkeypatch.setattr("smc_build.plan.device_memory", lambda: ("memory", memory))
    monkeypatch.setattr("smc_engines.parallel.launch.shutil.which", lambda name: None)
    monkeypatch.setattr("smc_engines.parallel.launch.sys.executable", str(folder / "python"))
    assert main(["--checkpoint", "t", "--draft", "d", "--name", "x", *arguments]) == 0
    end = capsys.readouterr().out.split("Built ")[1]
    assert "Next:" not in end
    assert found in end
    assert advice in end
    assert "\n\n    smc-run --engine engines/x-tp" in end


def test_too_many_ranks_for_the_gpus_are_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smc_build.plan.device_memory", lambda: ("memory", 10**9))
    plan = make_plan(BuildOptions("t", "d", tp=2))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    assert "GPUs here are 1, expected one for each of its 2 ranks" in str(obstacle_here(plan))


def test_too_little_memory_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit_config(folder / "t", hidden_size=2**20, intermediate_size=2**22)
    message = refused(capsys, "--checkpoint", "t", "--draft", "d")
    assert "TB of memory for its largest tensor" in message


def test_only_engine_directories_are_replaced_and_only_with_force(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = ["--checkpoint", "t", "--draft", "d", "--output"]
    assert main([*build, "out"]) == 0
    first = load_manifest("out").created
    assert "already holds an engine directory" in refused(capsys, *build, "out")
    time.sleep(1.1)
    assert main([*build, "out", "--force"]) == 0
    assert load_manifest("out").created > first
    for path in ("mine", "mine/notes.txt"):
        (folder / "mine").mkdir(exist_ok=True)
        (folder / "mine" / "notes.txt").write_text("keep me")
        for force in ([], ["--force"]):
            assert "is not an engine directory" in refused(capsys, *build, path, *force)
    (folder / "empty").mkdir()
    assert main([*build, "empty"]) == 0
    assert is_engine_dir(folder / "empty")
    assert not list(folder.glob(".*"))


def test_an_error_while_writing_leaves_nothing_and_keeps_the_old_engine(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", "t", "--draft", "d"]) == 0

    class Full:
        def plan(self, plan: object) -> None: ...
        def quantizing(self, label: str) -> None: ...

        def compiled(self, label: str, num_plans: int, num_bytes: int, seconds: float) -> None: ...
        def start(self, label: str, total_bytes: int) -> None: ...
        def finish(self) -> None: ...
        def advance(self, num_bytes: int) -> None:
            raise OSError(28, "No space left on device")

    before = load_manifest("engines/t-tp1")
    with pytest.raises(OSError, match="No space left"):
        build_engine(BuildOptions("t", "d", force=True), Full())
    assert load_manifest("engines/t-tp1") == before
    assert [path.name for path in Path("engines").iterdir()] == ["t-tp1"]


def test_a_killed_build_leaves_nothing_that_loads_and_the_next_one_cleans_up(folder: Path) -> None:
    # 300 MB of weights: long enough to be seen under way, and killed there.
    make_checkpoint(folder / "large", hidden=1024, ffn=4096, layers=5)
    arguments = ["--checkpoint", "large", "--draft", "none", "--dtype", "float32"]
    process = subprocess.Popen(
        [sys.executable, "-m", "smc_build.cli", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (shards := list(Path("engines").glob("*/target/weights/*"))) and process.poll() is None:
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL, "the build ended before it was killed"
    leftover = shards[0].parents[2]
    assert leftover.name.startswith(".large-tp1.building-")
    assert not Path("engines/large-tp1").exists()
    assert not [path for path in Path().rglob("*") if is_engine_dir(path)]
    assert main(["--checkpoint", "t", "--draft", "none", "--dtype", "float32", "--name", "large"]) == 0
    assert [path.name for path in Path("engines").iterdir()] == ["large-tp1"]


def test_an_engine_moved_away_by_a_killed_replacement_is_put_back(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", "t", "--draft", "d"]) == 0
    finished = subprocess.Popen([sys.executable, "-c", ""])
    finished.wait()
    Path("engines/t-tp1").rename(f"engines/.t-tp1.building-{platform.node()}-{finished.pid}-replaced")
    assert main(["--checkpoint", "t", "--draft", "d"]) == 1
    assert "already holds an engine directory" in capsys.readouterr().err
    load_manifest("engines/t-tp1")


@pytest.mark.parametrize(
    ("limits", "buckets"),
    [
        ((8, 8, 1), (8, 16, 96)),
        ((8, 8, 4), (8, 16, 32, 64, 96, 192, 320)),
        ((1, 0, 1), (8,)),
        ((12, 8, 1), (8, 16, 32, 112)),
        ((8, 7, 10), (8, 16, 32, 64, 96, 128, 192, 256, 512, 768)),
    ],
)
def test_row_buckets(limits: tuple[int, int, int], buckets: tuple[int, ...]) -> None:
    assert row_buckets(*limits) == buckets
    particles, draft_tokens, groups = limits
    assert max(buckets) >= particles * (draft_tokens + 1) * groups
