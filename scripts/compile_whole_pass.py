"""Compile draft passes in one launch for Hopper, without a GPU, and write down what each program needs.

    python scripts/compile_whole_pass.py whole-pass-compiled.json

Registers that spill depend on the model, the rows and the number of multiprocessors; so do shared memory and the ring's stages.
Takes ten seconds a line.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import triton

from smc_build.model_config import ModelConfig
from smc_build.precision import Precision
from smc_build.presets import PRESETS
from smc_build.weights import weight_shapes
from smc_engines.fused_regions import FusedRegions
from smc_engines.model import PagedModel
from smc_engines.region_choice import shape_of
from smc_plugin.backend import triton_kernels
from smc_plugin.kernels.compile import compile_recorded
from smc_plugin.kernels.launch import Gpu, recording
from smc_plugin.kernels.whole_pass import MAX_CONTEXT, WholePass

_BF16 = Precision.plain("bfloat16")
_FP8 = Precision("bfloat16", "float8_e4m3fn", "bfloat16", "float8_e4m3fn")
_LLAMA = dataclasses.replace(PRESETS["llama-1b"].config, num_layers=2)  # layers are a loop: more change nothing
_MODELS = {
    "llama-1b": _LLAMA,
    "qwen2-like": dataclasses.replace(
        _LLAMA, num_heads=16, num_kv_heads=2, head_dim=128, qkv_bias=True, hidden_size=1536, ffn_size=4864
    ),
    "qwen3-like": dataclasses.replace(
        _LLAMA, num_heads=16, num_kv_heads=8, head_dim=128, qk_norm=True, hidden_size=1024, ffn_size=3072
    ),
}
# model, precision, sequences, tokens of each, multiprocessors
_CASES = [
    *(("llama-1b", _BF16, 8, queries, count) for queries in (1, 2) for count in (132, 114)),
    *(("llama-1b", _BF16, 1, 1, count) for count in (132, 114)),
    *(("llama-1b", _FP8, 8, 1, count) for count in (132, 114)),
    *(("qwen2-like", _BF16, 16, 1, count) for count in (132, 114)),
    *(("qwen3-like", _FP8, 8, 2, count) for count in (132, 114)),
]


def compiled(config: ModelConfig, precision: Precision, batch: int, queries: int, sm_count: int) -> dict[str, Any]:
    """What a program of such a pass needs."""
    weights = {
        name: torch.empty(size, dtype=getattr(torch, precision.dtype_of(name)), device="meta")
        for name, size in weight_shapes(config, precision).items()
    }
    whole_pass = WholePass(shape_of(config), weights, gpu=Gpu(sm_count))
    model = PagedModel(
        config, weights, 512, 16, FusedRegions(config, weights), triton_kernels(),
        kv_dtype=getattr(torch, precision.kv), whole_pass=whole_pass,
    )  # fmt: skip
    tokens = torch.zeros((batch, queries), dtype=torch.int64, device="meta")
    start = torch.zeros(batch, dtype=torch.int64, device="meta")
    table = torch.zeros((batch, MAX_CONTEXT // 16), dtype=torch.int32, device="meta")
    with recording() as recorded:
        model.forward(tokens, start, table, MAX_CONTEXT)
    found = compile_recorded(recorded[-1])
    return {
        "stages": recorded[-1].arguments["STAGES"],
        "query_heads_a_program": recorded[-1].arguments["HEADS"],
        "registers": found.registers,
        "spill_bytes_a_thread": found.spill_bytes,
        "shared_bytes": found.shared_bytes,
    }


def main() -> None:
    """Compile and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    output = parser.parse_args().output
    rows = []
    for name, precision, batch, queries, sm_count in _CASES:
        case = {
            "model": name,
            "matrices": precision.matrices,
            "sequences": batch,
            "tokens_each": queries,
            "multiprocessors": sm_count,
        }
        rows.append({**case, **compiled(_MODELS[name], precision, batch, queries, sm_count)})
        print(rows[-1], flush=True)
    text = {"triton": triton.__version__, "capability": 90, "max_context": MAX_CONTEXT, "rows": rows}
    output.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
