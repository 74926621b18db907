"""The op set executed eagerly by torch: the reference everywhere, and the run time where there is no GPU.

Products run in the tensors' own dtype, norms in float32. A CPU without bfloat16 instructions is the exception: there a
bfloat16 product is computed in float32 and rounded once, as the instructions would do it, ten times as fast as their
emulation (36 against 356 ms for 72 rows of [576, 3072] on two AVX2 cores). Example: for x = [[3, 4]] and w = [1,
1], rms_norm gives [[0.8485, 1.1314]], because the root mean square is sqrt(12.5) = 3.5355.
"""

import torch
import torch.nn.functional as F

FP8_MAX = 448.0


def _cpu_multiplies_bfloat16() -> bool:
    capabilities = torch.cpu.get_capabilities()
    return capabilities.get("architecture") != "x86_64" or bool(
        capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")
    )


_EMULATED_BFLOAT16 = not _cpu_multiplies_bfloat16()


class TorchOps:
    """`smc_build.network.Ops` for torch tensors on any device."""

    def matmul(
        self, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None = None, transpose_w: bool = False
    ) -> torch.Tensor:
        """x [rows, in] @ w [in, out] (or w [out, in] with transpose_w), plus bias [out]."""
        if _EMULATED_BFLOAT16 and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            wide = self.matmul(x.float(), w.float(), None if bias is None else bias.float(), transpose_w)
            return wide.to(x.dtype)
        return F.linear(x, w if transpose_w else w.t(), bias)

    def fp8_matmul(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [rows, in] @ w [out, in] transposed, times scale [out], plus bias [out]; x is not rounded to FP8.

        w is FP8, or FP8 values in x's dtype (which holds them exactly).
        """
        is_cpu = x.device.type == "cpu"
        product = (F.linear(x.float(), w.float()) if is_cpu else F.linear(x, w.to(x.dtype)).float()) * scale
        return (product if bias is None else product + bias.float()).to(x.dtype)

    def rms_norm(self, x: torch.Tensor, w: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalise rows in float32, return in x's dtype."""
        wide = x.float()
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        return w * normed.to(x.dtype)

    def silu_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(first half of the columns) * second half."""
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def add(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """Elementwise sum."""
        return a + b

    def to_float32(self, x: torch.Tensor) -> torch.Tensor:
        """Convert to float32."""
        return x.float()


class Fp8InputOps(TorchOps):
    """The same, but what an FP8 matrix multiplies is rounded to FP8 in steps of its input scale, as a plan rounds it."""

    def fp8_matmul(
        self,
        x: torch.Tensor,
        w: torch.Tensor,
        scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [rows, in], rounded, @ w [out, in] transposed, times scale [out], plus bias [out]."""
        steps = (x.float() / input_scale).to(x.dtype).clamp(-FP8_MAX, FP8_MAX)
        rounded = steps.to(torch.float8_e4m3fn).to(x.dtype)
        return super().fp8_matmul(rounded, w, scale * input_scale, input_scale, bias)
