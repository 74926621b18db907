"""Runs a recorded TensorRT network with torch, layer by layer, so that its meaning can be checked without a GPU.

Only the layers that TensorrtOps adds are known; each is computed in float64 and rounded to its output's type.
"""

from typing import Any

import torch


def interpret(trt: Any, network: Any, constants: list[Any], inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Compute a network's outputs.

    Args:
        trt: the TensorRT module.
        network: strongly typed, static shapes.
        constants: values of its constant layers, in order.
        inputs: every network input.
    Returns:
        output name to tensor.
    """
    types = {
        trt.DataType.FLOAT: torch.float32, trt.DataType.BF16: torch.bfloat16, trt.DataType.FP8: torch.float8_e4m3fn
    }  # fmt: skip
    values, left = dict(inputs), iter(constants)
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        taken = [values[layer.get_input(place).name] for place in range(layer.num_inputs)]
        result = _compute(trt, layer, taken, left)
        output = layer.get_output(0)
        assert tuple(result.shape) == tuple(output.shape), layer.name
        values[output.name] = result.to(types[output.dtype])
    return {name: values[name] for name in (network.get_output(i).name for i in range(network.num_outputs))}


def _compute(trt: Any, layer: Any, taken: list[torch.Tensor], constants: Any) -> torch.Tensor:  # noqa: PLR0911 - a table
    kind = layer.type
    wide = [tensor.double() for tensor in taken]
    if kind == trt.LayerType.CONSTANT:
        return torch.from_numpy(next(constants)).double()
    if kind == trt.LayerType.CAST:
        return wide[0]
    if kind in (trt.LayerType.QUANTIZE, trt.LayerType.DEQUANTIZE):
        assert wide[1] == 1
        return wide[0].clamp(-448, 448)
    if kind == trt.LayerType.MATRIX_MULTIPLY:
        layer.__class__ = trt.IMatrixMultiplyLayer
        assert layer.op0 == trt.MatrixOperation.NONE
        return wide[0] @ (wide[1].t() if layer.op1 == trt.MatrixOperation.TRANSPOSE else wide[1])
    if kind == trt.LayerType.ELEMENTWISE:
        layer.__class__ = trt.IElementWiseLayer
        operations = {"SUM": torch.add, "PROD": torch.mul, "DIV": torch.div}
        return operations[layer.op.name](*wide)
    if kind == trt.LayerType.REDUCE:
        layer.__class__ = trt.IReduceLayer
        assert (layer.op, layer.axes, layer.keep_dims) == (trt.ReduceOperation.AVG, 2, True)
        return wide[0].mean(1, keepdim=True)
    if kind == trt.LayerType.UNARY:
        layer.__class__ = trt.IUnaryLayer
        assert layer.op == trt.UnaryOperation.SQRT
        return wide[0].sqrt()
    if kind == trt.LayerType.ACTIVATION:
        layer.__class__ = trt.IActivationLayer
        assert layer.type == trt.ActivationType.SIGMOID
        return wide[0].sigmoid()
    if kind == trt.LayerType.SHUFFLE:
        layer.__class__ = trt.IShuffleLayer
        return wide[0].reshape(tuple(layer.reshape_dims))
    assert kind == trt.LayerType.SLICE, kind
    layer.__class__ = trt.ISliceLayer
    (row, column), (rows, columns) = tuple(layer.start), tuple(layer.shape)
    return wide[0][row : row + rows, column : column + columns]
