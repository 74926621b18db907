"""One small Llama that learns the chain task from endless fresh problems, until it is good enough.

Owns a model's weights, its optimisers and an exponential moving average of the weights, which is what gets measured and
saved. How good a model is follows from one pass over right answers: the product of the probabilities of all tokens that
follow from what precedes them is the chance to write that answer's figures, whatever the words between them.
Example: a model that is wrong in one of 20 steps solves a problem of five steps with probability 0.77.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from distill.llama import EMBEDDING, FINAL_NORM, Shape, Weights, decoder_layer, hidden_states
from distill.muon import StackedMuon
from safetensors.torch import save_file
from torch.nn import functional

from smc_engines.eval.chain import BEGIN, END, IDS, VOCAB_SIZE, ChainTask, Problems

AVERAGE = 0.99  # of the weights, a step
TEMPERATURES = (0.7, 1.0)


@dataclass(frozen=True)
class Size:
    """A Llama's numbers; head_dim 64 and a shared embedding."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    head_dim: int = 64

    @property
    def shape(self) -> Shape:
        """What the mathematics needs."""
        return Shape(self.layers, self.heads, self.kv_heads, self.head_dim, 1e-5, 1e4)

    def config(self, max_position: int) -> dict[str, Any]:
        """The contents of config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e4,
            "max_position_embeddings": max_position,
            "tie_word_embeddings": True,
            "bos_token_id": IDS[BEGIN],
            "eos_token_id": IDS[END],
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Plan:
    """How to train: rows a step, Muon's learning rate (AdamW's is a third of it), when to stop.

    Args:
        goal: stop at this chance of a right answer at temperature 1. steps, seconds: stop at the latest.
        every: steps between looks.
    """

    rows: int
    lr: float
    goal: float
    seconds: float
    steps: int = 1_000_000
    every: int = 25
    seed: int = 0


class Learner:
    """A model in training.

    Args:
        size: its numbers. task: what it learns. device: "cuda" computes in bfloat16 and compiled, "cpu" in float32.
        seed: of the first weights. draft: learn the draft's text.
    """

    def __init__(self, size: Size, task: ChainTask, device: str, seed: int, draft: bool = False) -> None:
        self.size, self.task, self.device = size, task, device
        self.dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        self.layer: Callable[..., torch.Tensor] = decoder_layer
        if device.startswith("cuda"):
            self.layer = torch.compile(decoder_layer, dynamic=False)
        self.weights = _first_weights(size, seed, device)
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.table = task.style_table(torch.device(device), draft)

    @property
    def parameters(self) -> int:
        """Weight elements."""
        return sum(weight.numel() for weight in self.weights.values())

    def logits(self, weights: Weights, tokens: torch.Tensor) -> torch.Tensor:
        """[B, L] tokens to [B, L, V] float32."""
        at_work = weights | {EMBEDDING: weights[EMBEDDING].to(self.dtype)}
        hidden = hidden_states(at_work, tokens, self.size.shape, self.layer)
        return functional.linear(hidden, at_work[EMBEDDING]).float()

    def train(self, plan: Plan, say: Callable[[str], None]) -> dict[str, Any]:
        """Learn until the goal or a limit; the averaged weights are the result.

        Returns:
            what it took: steps, seconds, the plan, the last looks.
        """
        matrices = [weight for name, weight in self.weights.items() if weight.ndim == 2 and name != EMBEDDING]
        others = [weight for name, weight in self.weights.items() if weight.ndim == 1 or name == EMBEDDING]
        muon = StackedMuon(matrices, plan.lr, weight_decay=0.02)
        adamw = torch.optim.AdamW(others, lr=plan.lr / 3, weight_decay=0.0, betas=(0.9, 0.98))
        generator = torch.Generator(self.device).manual_seed(plan.seed * 1_000_003 + 1)
        held_out = self.task.draw(
            min(1024, 8 * plan.rows), torch.Generator(self.device).manual_seed(9_999_991), self.table
        )
        mine, averaged = list(self.weights.values()), list(self.average.values())
        pool: list[tuple[torch.Tensor, torch.Tensor]] = []
        started, looks, step = time.monotonic(), {}, 0
        while step < plan.steps:
            if not pool:
                pool = list(_with_weights(self.task.draw(16 * plan.rows, generator, self.table), plan.rows))
            spent = max(step / plan.steps, (time.monotonic() - started) / plan.seconds)
            factor = min(1.0, (step + 1) / 100, max(0.0, 1 - spent) / 0.3)
            loss = self._loss(*pool.pop())
            loss.backward()
            muon.step(factor)
            adamw.param_groups[0]["lr"] = plan.lr / 3 * factor
            adamw.step()
            adamw.zero_grad(set_to_none=True)
            step += 1
            share = min(AVERAGE, step / (step + 10))
            torch._foreach_lerp_(averaged, [weight.detach() for weight in mine], 1 - share)  # pyright: ignore
            if step % plan.every == 0:
                looks = self.look(held_out)
                done = looks["right_1.0"] >= plan.goal or spent >= 1
                if done or step % (20 * plan.every) == 0:
                    say(
                        f"step {step}, {time.monotonic() - started:.0f} s, loss {float(loss.detach()):.4f}, {_text(looks)}"
                    )
                if done:
                    break
        return {"steps": step, "seconds": time.monotonic() - started, "plan": asdict(plan), "looks": looks}

    def _loss(self, tokens: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        logits = self.logits(self.weights, tokens[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
        return (loss * weight[:, 1:].flatten()).sum() / weight[:, 1:].sum()

    @torch.no_grad()
    def look(self, problems: Problems) -> dict[str, float]:
        """Chance of a right answer at both temperatures, and the loss on words, from one pass over right answers."""
        logits = self.logits(self.average, problems.tokens[:, :-1])
        following = problems.tokens[:, 1:, None]
        out = {}
        for temperature in TEMPERATURES:
            log_p = torch.log_softmax(logits / temperature, -1).gather(2, following)[..., 0]
            chance = torch.where(problems.checked[:, 1:], log_p, 0.0).sum(1).exp()
            out[f"right_{temperature}"] = float(chance.mean())
            if temperature == 1.0:
                words = problems.tokens[:, 1:] >= IDS["Ġso"]
                out["word_loss"] = float(-log_p[words].mean())
        return out

    def round_weights(self) -> None:
        """Make the averaged weights what a bfloat16 file holds."""
        self.average = {name: weight.bfloat16().float() for name, weight in self.average.items()}

    def save(self, folder: Path, extra: dict[str, Any]) -> None:
        """Write config.json (with `extra` under "task_pair") and model.safetensors in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        config = self.size.config(-(-self.task.max_length // 64) * 64 + 64) | {"task_pair": extra}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        tensors = {
            name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in self.average.items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _first_weights(size: Size, seed: int, device: str) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    q, kv = size.heads * size.head_dim, size.kv_heads * size.head_dim
    parts = {"self_attn.q_proj": (q, size.hidden), "self_attn.k_proj": (kv, size.hidden)}
    parts |= {"self_attn.v_proj": (kv, size.hidden), "self_attn.o_proj": (size.hidden, q)}
    parts |= {"mlp.gate_proj": (size.ffn, size.hidden), "mlp.up_proj": (size.ffn, size.hidden)}
    parts |= {"mlp.down_proj": (size.hidden, size.ffn)}
    weights = {EMBEDDING: torch.randn(VOCAB_SIZE, size.hidden, generator=generator) / math.sqrt(size.hidden)}
    weights[FINAL_NORM] = torch.ones(size.hidden)
    for layer in range(size.layers):
        for name, (rows, columns) in parts.items():
            deep = 1 / math.sqrt(2 * size.layers) if name in ("self_attn.o_proj", "mlp.down_proj") else 1.0
            matrix = torch.randn(rows, columns, generator=generator) * deep / math.sqrt(columns)
            weights[f"model.layers.{layer}.{name}.weight"] = matrix
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(size.hidden)
    return {name: weight.to(device).requires_grad_(True) for name, weight in weights.items()}


def _with_weights(problems: Problems, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of tokens with 1 where a token belongs to an answer."""
    index = torch.arange(problems.tokens.shape[1], device=problems.tokens.device)
    inside = (index >= problems.prompt_length[:, None]) & (index < problems.length[:, None])
    return list(zip(problems.tokens.split(rows), inside.float().split(rows), strict=True))


def _text(looks: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.3f}" for name, value in looks.items())
