"""The op set recorded into a TensorRT network: a tensor is an ITensor, an op adds layers and returns the result.

The network is strongly typed, so each conversion is a cast layer. Matrix products take the tensors' own type; norms and
silu are computed in float32 and rounded once. Example: rms_norm of x [16, 4096] bfloat16 adds cast, square, mean over
the columns [16, 1], plus eps, square root, divide, cast back and the product with w as [1, 4096]: one fused kernel in
the plan, since TensorRT has no layer for it.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from smc_build.tensorrt_api import TensorrtApi

if TYPE_CHECKING:
    import tensorrt as trt

_COLUMNS = 1 << 1  # reduction axes are a bit mask


class TensorrtOps:
    """`smc_build.network.Ops` over an INetworkDefinition; keep it until the network is built, it owns the constants.

    Args:
        api: the installed TensorRT.
        network: strongly typed; its tensors have static shapes.
    Attributes:
        constants: values of the network's constant layers, in order.
    """

    def __init__(self, api: TensorrtApi, network: "trt.INetworkDefinition") -> None:
        self._api, self._trt, self._network = api, api.trt, network
        self.constants: list[np.ndarray] = []

    def matmul(
        self,
        x: "trt.ITensor",
        w: "trt.ITensor",
        bias: "trt.ITensor | None" = None,
        transpose_w: bool = False,
    ) -> "trt.ITensor":
        """x [rows, in] @ w [in, out] (or w [out, in] with transpose_w), plus bias [out]."""
        plain, transposed = self._trt.MatrixOperation.NONE, self._trt.MatrixOperation.TRANSPOSE
        layer = self._network.add_matrix_multiply(x, plain, w, transposed if transpose_w else plain)
        product = self._output(layer, "matmul")
        return product if bias is None else self.add(product, self._as_row(bias))

    def fp8_matmul(
        self,
        x: "trt.ITensor",
        w: "trt.ITensor",
        scale: "trt.ITensor",
        input_scale: "trt.ITensor",
        bias: "trt.ITensor | None" = None,
    ) -> "trt.ITensor":
        """round(x / input_scale) @ w [out, in] transposed, times input_scale * scale, plus bias; x is rounded to FP8.

        Quantize and dequantize layers have the constant scale 1, so that the product takes TensorRT's FP8 path although
        the real scales are inputs, which multiply before and after it.
        """
        one = self._scalar(1.0, ())
        step = self._as_row(input_scale)
        small = self._cast(self._elementwise(self.to_float32(x), step, "DIV"), x.dtype)
        rounded = self._output(self._network.add_quantize(small, one, self._trt.DataType.FP8), "quantize")
        left, right = (
            self._output(self._network.add_dequantize(tensor, one, x.dtype), "dequantize") for tensor in (rounded, w)
        )
        product = self.to_float32(self.matmul(left, right, transpose_w=True))
        scaled = self._elementwise(self._elementwise(product, step, "PROD"), self._as_row(scale), "PROD")
        return self._cast(scaled if bias is None else self.add(scaled, self.to_float32(self._as_row(bias))), x.dtype)

    def rms_norm(self, x: "trt.ITensor", w: "trt.ITensor", eps: float) -> "trt.ITensor":
        """Normalise rows in float32, return in x's type."""
        wide = self.to_float32(x)
        squares = self._elementwise(wide, wide, "PROD")
        layer = self._network.add_reduce(squares, self._trt.ReduceOperation.AVG, _COLUMNS, True)
        shifted = self.add(self._output(layer, "mean"), self._scalar(eps))
        root = self._output(self._network.add_unary(shifted, self._trt.UnaryOperation.SQRT), "sqrt")
        normed = self._cast(self._elementwise(wide, root, "DIV"), x.dtype)
        return self._elementwise(normed, self._as_row(w), "PROD")

    def silu_mul(self, gate_up: "trt.ITensor") -> "trt.ITensor":
        """silu(first half of the columns) * second half, in float32, returned in the input's type."""
        half = gate_up.shape[1] // 2
        gate, up = (self.to_float32(self._columns(gate_up, start, half)) for start in (0, half))
        layer = self._network.add_activation(gate, self._trt.ActivationType.SIGMOID)
        silu = self._elementwise(gate, self._output(layer, "sigmoid"), "PROD")
        return self._cast(self._elementwise(silu, up, "PROD"), gate_up.dtype)

    def add(self, a: "trt.ITensor", b: "trt.ITensor") -> "trt.ITensor":
        """Elementwise sum; sizes of 1 are broadcast."""
        return self._elementwise(a, b, "SUM")

    def to_float32(self, x: "trt.ITensor") -> "trt.ITensor":
        """Convert to float32."""
        return self._cast(x, self._trt.DataType.FLOAT)

    def _cast(self, x: "trt.ITensor", dtype: Any) -> "trt.ITensor":
        return x if x.dtype == dtype else self._output(self._network.add_cast(x, dtype), "cast")

    def _columns(self, x: "trt.ITensor", start: int, count: int) -> "trt.ITensor":
        dims = self._trt.Dims
        return self._output(
            self._network.add_slice(x, dims((0, start)), dims((x.shape[0], count)), dims((1, 1))), "slice"
        )

    def _as_row(self, vector: "trt.ITensor") -> "trt.ITensor":
        layer = self._network.add_shuffle(vector)
        layer.reshape_dims = self._trt.Dims((1, vector.shape[0]))
        return self._output(layer, "row")

    def _scalar(self, value: float, shape: tuple[int, ...] = (1, 1)) -> "trt.ITensor":
        self.constants.append(np.full(shape, value, dtype=np.float32))
        layer = self._network.add_constant(self._trt.Dims(shape), self._trt.Weights(self.constants[-1]))
        return self._output(layer, "constant")

    def _elementwise(self, a: "trt.ITensor", b: "trt.ITensor", operation: str) -> "trt.ITensor":
        kind = self._trt.ElementWiseOperation.__members__[operation]
        return self._output(self._network.add_elementwise(a, b, kind), operation.lower())

    def _output(self, layer: Any, op: str) -> "trt.ITensor":
        self._api.check(layer, f"add a {op} layer")
        layer.name = f"{op}.{self._network.num_layers - 1}"
        return layer.get_output(0)
