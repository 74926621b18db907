"""FP8 at run time on a CPU: the numbers of dequantized weights, the law, the floor, and a GPU that is too old."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from smc_build.builder import BuildOptions, build_engine
from smc_build.precision import resolve
from smc_build.quantize import Calibration, quantize
from smc_engines.bench.floor import floor_bytes
from smc_engines.bench.points import Case, Point
from smc_engines.bench_cli import main as bench
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine, check_fp8_gpu
from smc_engines.executor import Executor
from smc_engines.fused_regions import FusedRegions
from smc_engines.sampling_params import SamplingParams
from smc_plugin.errors import EngineDirError
from tests.tiny_models import make_checkpoint
from tests.toy import (
    Toy,
    assert_empty,
    assert_means,
    build,
    info_of,
    make_toy,
    merge_rare,
    particle_law,
    sample,
)

FAMILIES = {"llama": {}, "qwen2": {"tied": True}, "qwen3": {"head_dim": 24, "kv_heads": 1}}
CPU = ExecutorConfig(device="cpu", max_groups=8, num_pages=600)


def dequantized(exported: Path, plain: Path, folder: Path) -> Path:
    """The exported checkpoint as an ordinary one, its FP8 matrices multiplied out in float32."""
    shutil.copytree(plain, folder)
    stored = load_file(exported / "model.safetensors")
    tensors = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale")
        if not name.endswith(("weight_scale", "input_scale")):
            tensors[name] = tensor.float() if scale is None else tensor.float() * scale
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_an_fp8_engine_computes_with_the_dequantized_weights(tmp_path: Path, family: str) -> None:
    from transformers import AutoModelForCausalLM  # noqa: PLC0415 - slow to import

    plain = make_checkpoint(tmp_path / "plain", family, layers=3, **FAMILIES[family])
    exported = tmp_path / "exported"
    quantize(plain, exported, resolve("fp8", None, None, None)[0], Calibration(None))
    path = build_engine(
        BuildOptions(str(plain), str(exported), dtype="float32", output=tmp_path / "engine", compiler="torch")
    )
    engine = Engine.from_dir(path, CPU)
    assert engine.draft is not None
    assert engine.draft.weights["layers.2.down"].dtype == torch.float8_e4m3fn
    tokens = torch.randint(260, (2, 20), generator=torch.Generator().manual_seed(1))
    table = torch.arange(1, 7, dtype=torch.int32).view(2, 3)
    ours = engine.draft.logits(engine.draft.forward(tokens, torch.zeros(2, dtype=torch.int64), table, 20))
    reference = dequantized(exported, plain, tmp_path / "dequantized")
    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(reference, dtype=torch.float32, attn_implementation="eager")
        expected = model(tokens).logits
        unquantized = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(tokens).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (unquantized - expected).abs().max() > 1e-2  # which a draft that was never quantized would have met


@pytest.mark.parametrize("family", FAMILIES)
def test_every_mode_runs_in_fp8(tmp_path: Path, family: str) -> None:
    folder = make_checkpoint(tmp_path / "model", family, **FAMILIES[family])
    options = BuildOptions(
        str(folder), str(folder), dtype="fp8", head_dtype="fp8", kv_dtype="fp8", max_seq_len=64, compiler="torch"
    )
    executor = Executor(Engine.from_random(options, CPU))
    assert executor.engine.target.cache.dtype == torch.float8_e4m3fn
    params = SamplingParams(num_particles=4, num_draft_tokens=3, max_tokens=20, seed=3, ignore_eos=True)
    modes = [replace(params, mode=mode) for mode in ("smc", "target", "speculative")]
    outputs = executor.generate([(1, 2, 3)] * 3, modes)
    assert [len(output.token_ids) for output in outputs] == [20, 20, 20]
    assert_empty(executor)
    again = Executor(Engine.from_random(options, CPU)).generate([(1, 2, 3)] * 3, modes)
    assert [output.token_ids for output in again] == [output.token_ids for output in outputs]


@pytest.fixture(scope="module")
def fp8_draft(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return make_toy(tmp_path_factory.mktemp("toy"), draft_dtype="fp8", head_dtype="fp8")


@pytest.mark.parametrize(("n", "k", "theta"), [(4, 2, 0.5), (2, 1, 1.0)])
def test_an_fp8_draft_keeps_the_output_law(fp8_draft: Toy, n: int, k: int, theta: float) -> None:
    """Rounding the draft changes q alone: evidence times weights still estimates the unrounded target without bias."""
    executor = fp8_draft.executor(max_groups=64, num_pages=4000)
    engine = executor.engine
    assert engine.draft is not None
    assert engine.draft.weights["layers.0.qkv"].dtype == torch.float8_e4m3fn
    assert engine.target.weights["layers.0.qkv"].dtype == torch.float32
    params = SamplingParams(
        temperature=1.0, max_tokens=4, num_particles=n, num_draft_tokens=k, ess_threshold=theta, select="argmax"
    )
    outputs = sample(executor, fp8_draft.prompt, params, max(120, 500 // n), seed=1000)
    law, proposal = fp8_draft.law(params), fp8_draft.proposal_law(params)
    answers, groups = list(law), merge_rare({answer: min(law[answer], proposal[answer]) for answer in law}, 0.03)
    evidence = torch.tensor([info_of(output).log_evidence for output in outputs]).exp().numpy()
    mass = evidence[:, None] * particle_law(outputs, answers)
    columns = {answer: index for index, answer in enumerate(answers)}
    cells = [[columns[answer] for answer in group] for group in groups]
    assert_means(mass.sum(axis=1, keepdims=True), [1.0])
    grouped = torch.stack([torch.tensor(mass[:, cell].sum(axis=1)) for cell in cells], dim=1).numpy()
    assert_means(grouped, [sum(law[answer] for answer in group) for group in groups])


def test_an_fp8_draft_says_other_things(fp8_draft: Toy, tmp_path: Path) -> None:
    """The toy's rounding is large enough to matter, so the law above is no accident."""
    plain = build(tmp_path / "plain", *(fp8_draft.engine_dir.parent / name for name in ("target", "draft")))
    params = SamplingParams(temperature=1.0, max_tokens=4, num_particles=4, num_draft_tokens=3)
    weights = []
    for toy in (fp8_draft, replace(fp8_draft, engine_dir=plain)):
        outputs = sample(toy.executor(max_groups=64, num_pages=4000), toy.prompt, params, 40)
        weights.append([particle.log_weight for output in outputs for particle in info_of(output).particles])
    differences = torch.tensor(weights[0]) - torch.tensor(weights[1])
    assert (differences.abs() > 1e-3).float().mean() > 0.5


def test_the_floor_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    case = Case(Point(batch=1, particles=4, draft_tokens=3, prompt_tokens=17, output_tokens=8), "smc")
    floors = {}
    for dtype in ("bfloat16", "fp8"):
        kv_dtype = "fp8" if dtype == "fp8" else None
        options = BuildOptions(
            str(folder), str(folder), dtype=dtype, kv_dtype=kv_dtype, max_seq_len=64, compiler="torch"
        )
        engine = Engine.from_random(options, CPU)
        read = sum(tensor.nbytes for name, tensor in engine.target.weights.items() if name != "embed")
        assert engine.draft is not None
        floors[dtype] = floor_bytes(engine, case, 0)
        kv = 16 * (1 - 4) * engine.target.cache[:, :, 0, 0].nbytes  # at no context, the formula's own terms
        assert floors[dtype] == 4 * read + 4 * kv
    assert floors["fp8"] < floors["bfloat16"]


def test_bench_of_an_fp8_engine_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("smc_engines.bench.floor._COPY_BYTES", {"cpu": 2**20})
    folder, report = make_checkpoint(tmp_path / "model", "qwen3", head_dim=16), tmp_path / "report.json"
    types = ["--dtype", "fp8", "--draft-dtype", "bfloat16", "--kv-dtype", "fp8", "--head-dtype", "fp8"]
    sizes = ["--n", "2", "--k", "2", "--prompt-tokens", "8", "--output-tokens", "6", "--repeats", "1"]
    given = ["--preset", str(folder), "--draft", str(folder), "--device", "cpu", "--json", str(report)]
    assert bench([*given, *types, *sizes]) == 0
    rows = json.loads(report.read_text())["rows"]
    assert {row["mode"] for row in rows} == {"target", "speculative", "smc"}
    expected = "target fp8 (head fp8, KV fp8), draft bfloat16 (head bfloat16, KV fp8)"
    assert {row["dtype"] for row in rows} == {expected}


def test_products_of_fp8_matrices_have_their_own_tactics(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model", "llama")
    options = BuildOptions(str(folder), "none", dtype="fp8", max_seq_len=64, compiler="torch")
    engine = Engine.from_random(options, CPU)
    fused = FusedRegions(engine.target.config, engine.target.weights)
    sizes = {name: fused.product(name, 8) for name in ("o", "gate_up", "head")}
    assert [(size.element_bytes, size.input_bytes) for size in sizes.values()] == [(1, 2), (1, 2), (2, 2)]


@pytest.mark.parametrize("capability", [(7, 5), (8, 0), (8, 6)])
def test_a_gpu_without_fp8_is_refused(capability: tuple[int, int]) -> None:
    with pytest.raises(
        EngineDirError, match=r"some GPU has compute capability \d\.\d, expected 8\.9 or more: use such"
    ):
        check_fp8_gpu("some GPU", capability)


@pytest.mark.parametrize("capability", [(8, 9), (9, 0), (10, 0), (12, 0)])
def test_a_gpu_with_fp8_is_not(capability: tuple[int, int]) -> None:
    check_fp8_gpu("some GPU", capability)
