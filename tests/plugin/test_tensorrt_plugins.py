"""The plugins against the real TensorRT classes: shapes, types, formats, registry, serialisation, and enqueue itself.

enqueue() runs here on CPU memory with the references; tests/gpu runs it on GPU memory with the kernels.
"""

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from smc_build.plans import build_plugin_plan
from smc_build.tensorrt_api import find
from smc_plugin.errors import ConfigError
from smc_plugin.reference import pages
from smc_plugin.tensorrt import NAMESPACE, add_plugin, plugin_class, register, tensor_at
from smc_plugin.tensorrt_contracts import CONTRACTS, KV_PAGE_COPY, WEIGH_RESAMPLE, Contract

_NAMES = {
    torch.float64: "INT64", torch.int64: "INT64", torch.int32: "INT32", torch.float32: "FLOAT",
    torch.bfloat16: "BF16", torch.float16: "HALF", torch.bool: "BOOL",
}  # fmt: skip


@pytest.fixture(scope="module")
def trt() -> Any:
    api = find("tensorrt-rtx")
    if api is None:
        pytest.skip("needs the extra tensorrt-rtx")
    return api.trt


def describe(trt: Any, tensor: torch.Tensor) -> Any:
    desc = trt.PluginTensorDesc()
    desc.dims, desc.type = trt.Dims(list(tensor.shape)), trt.DataType.__members__[_NAMES[tensor.dtype]]
    desc.format = trt.TensorFormat.LINEAR
    return desc


def enqueue(trt: Any, contract: Contract, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
    plugin = plugin_class(trt, contract)()
    descs = [[describe(trt, tensor) for tensor in tensors] for tensors in (inputs, outputs)]
    addresses = [[tensor.data_ptr() for tensor in tensors] for tensors in (inputs, outputs)]
    plugin.on_shape_change(*descs)
    plugin.enqueue(*descs, *addresses, 0, 0)


def round_inputs(groups: int = 3, particles: int = 4, drafts: int = 2, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return [
        normal(groups, particles).double(),
        normal(groups, particles, drafts) * 3,
        normal(groups, particles, drafts),
        torch.ones(groups),
        torch.full((groups, particles), drafts + 1),
        torch.zeros((groups, particles), dtype=torch.bool),
        torch.zeros(groups, dtype=torch.bool),
        normal(groups, particles).double() * 0.1,
        torch.arange(groups) + 7,
        torch.arange(groups) + 1,
        torch.full((groups,), 0.999, dtype=torch.float64),
        torch.tensor([True, False, True])[:groups],
        torch.zeros(groups, dtype=torch.float64),
    ]


def poisoned_outputs(contract: Contract, sizes: dict[str, int]) -> list[torch.Tensor]:
    out = []
    for tensor in contract.outputs:
        dtype = getattr(torch, tensor.dtype)
        shape = [sizes[symbol] for symbol in tensor.dims]
        out.append(
            torch.full(shape, math.nan, dtype=dtype) if dtype.is_floating_point else torch.ones(shape, dtype=dtype)
        )
    return out


def by_hand(inputs: list[torch.Tensor], group: int) -> tuple[torch.Tensor, float, float]:
    """Weights before resampling, ESS and log mean weight of one group whose particles all go on."""
    log_weights, log_p, log_q = (tensor[group].double() for tensor in inputs[:3])
    total = log_weights + (log_p - log_q).float().double().sum(-1) + inputs[7][group]
    normal = torch.softmax(total, 0)
    return total, float(1 / (normal**2).sum()), float(torch.logsumexp(total, 0) - math.log(len(total)))


@pytest.mark.parametrize("in_place", [False, True])
def test_enqueue_ends_a_round(trt: Any, in_place: bool) -> None:
    inputs = round_inputs()
    kept = [tensor.clone() for tensor in inputs]
    outputs = poisoned_outputs(WEIGH_RESAMPLE, {"G": 3, "N": 4, "K": 2})
    if in_place:
        for output, source in WEIGH_RESAMPLE.aliased.items():
            outputs[output] = inputs[source]
    enqueue(trt, WEIGH_RESAMPLE, inputs, outputs)
    log_weights, evidence, ancestors, ess, resampled, committed, recovered = outputs
    for group, eligible in enumerate((True, False, True)):
        before, expected_ess, mean = by_hand(kept, group)
        assert ess[group].item() == pytest.approx(expected_ess)
        assert bool(resampled[group]) == eligible
        expected = torch.zeros(4).double() if eligible else before
        torch.testing.assert_close(log_weights[group], expected)
        assert evidence[group].item() == pytest.approx(mean if eligible else 0.0)
        counts = torch.bincount(ancestors[group], minlength=4)
        share = 4 * torch.softmax(before, 0) if eligible else torch.ones(4)
        assert ((counts >= share.floor()) & (counts <= share.ceil())).all()
    assert committed.tolist() == [2, 2, 2]
    assert not recovered.any()


def test_a_round_in_which_every_particle_dies_is_recovered(trt: Any) -> None:
    inputs = round_inputs()
    inputs[1][0, :, 1] = -math.inf
    inputs[6][2] = True
    outputs = poisoned_outputs(WEIGH_RESAMPLE, {"G": 3, "N": 4, "K": 2})
    enqueue(trt, WEIGH_RESAMPLE, inputs, outputs)
    assert outputs[5].tolist() == [1, 2, 2]
    assert outputs[6].tolist() == [True, False, False]
    unchanged = torch.softmax(inputs[0][2], 0)
    assert outputs[3][2].item() == pytest.approx(float(1 / (unchanged**2).sum())), "a failed group adds 0"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("in_place", [False, True])
def test_enqueue_copies_pages(trt: Any, dtype: torch.dtype, in_place: bool) -> None:
    cache = torch.randn((2, 2, 9, 4, 1, 8), generator=torch.Generator().manual_seed(0)).to(dtype)
    source = torch.tensor([[3, 0], [5, 3]], dtype=torch.int32)
    destination = torch.tensor([[4, 0], [6, 7]], dtype=torch.int32)
    expected = cache.clone()
    pages.copy_pages(expected, source, destination)
    assert not torch.equal(expected, cache)
    before = cache.clone()
    output = cache if in_place else torch.full_like(cache, math.nan)
    enqueue(trt, KV_PAGE_COPY, [cache, source, destination], [output])
    assert torch.equal(output, expected)
    assert torch.equal(cache, expected if in_place else before)


def test_two_batch_sizes_in_one_call_are_refused(trt: Any) -> None:
    inputs = round_inputs()
    inputs[3] = torch.ones(2)
    with pytest.raises(ValueError, match="alpha has G = 2, expected 3"):
        enqueue(trt, WEIGH_RESAMPLE, inputs, poisoned_outputs(WEIGH_RESAMPLE, {"G": 3, "N": 4, "K": 2}))


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_registry_round_trip(trt: Any, contract: Contract) -> None:
    creators = register(trt)
    assert register(trt) == creators
    creator = trt.get_plugin_registry().get_creator(contract.name, str(contract.version), NAMESPACE)
    assert creator is not None
    assert (creator.name, creator.plugin_namespace) == (contract.name, NAMESPACE)
    fields = plugin_class(trt, contract)().get_fields_to_serialize()
    assert [field.name for field in fields] == ["contract_version"]
    for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
        made = creators[contract.name].create_plugin("step", fields, phase)
        for plugin in (made, made.clone(), made.attach_to_context(None)):
            assert isinstance(plugin, trt.IPluginV3)
            assert (plugin.plugin_name, plugin.plugin_version, plugin.num_outputs) == (
                contract.name, str(contract.version), len(contract.outputs),
            )  # fmt: skip
            for capability in trt.PluginCapabilityType.__members__.values():
                assert plugin.get_capability_interface(capability) is plugin
        assert made.clone() is not made


def test_an_engine_of_another_contract_version_is_refused(trt: Any) -> None:
    newer = Contract(
        "SmcKvPageCopy", KV_PAGE_COPY.inputs, KV_PAGE_COPY.outputs, {0: 0}, KV_PAGE_COPY.compute, version=2
    )
    fields = plugin_class(trt, newer)().get_fields_to_serialize()
    with pytest.raises(ConfigError, match="of contract version 2, expected 1: rebuild the engine"):
        register(trt)["SmcKvPageCopy"].create_plugin("step", fields, trt.TensorRTPhase.RUNTIME)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_output_types_formats_and_aliases(trt: Any, contract: Contract) -> None:
    plugin = plugin_class(trt, contract)()
    types = [
        trt.DataType.BF16 if tensor.dtype == "cache" else trt.DataType.__members__[_NAMES[getattr(torch, tensor.dtype)]]
        for tensor in (*contract.inputs, *contract.outputs)
    ]
    split = len(contract.inputs)
    assert plugin.get_output_data_types(types[:split]) == types[split:]
    for output, tensor in enumerate(contract.outputs):
        source = plugin.get_aliased_input(output)
        assert source == contract.aliased.get(output, -1)
        if source >= 0:
            assert (tensor.dims, tensor.dtype) == (contract.inputs[source].dims, contract.inputs[source].dtype)
    in_out = [trt.DynamicPluginTensorDesc() for _ in types]
    for each, dtype in zip(in_out, types, strict=True):
        each.desc.type, each.desc.format = dtype, trt.TensorFormat.LINEAR
    for position in range(len(types)):
        assert plugin.supports_format_combination(position, in_out, split)
        in_out[position].desc.format = trt.TensorFormat.CHW32
        assert not plugin.supports_format_combination(position, in_out, split)
        in_out[position].desc.format = trt.TensorFormat.LINEAR
        in_out[position].desc.type = trt.DataType.INT8
        assert not plugin.supports_format_combination(position, in_out, split)
        in_out[position].desc.type = types[position]


def test_output_shapes_follow_the_inputs(trt: Any) -> None:
    """Dimension expressions only exist while a builder runs, so symbols stand in for them."""
    fake = SimpleNamespace(**{name: getattr(trt, name) for name in dir(trt) if not name.startswith("__")})
    fake.DimsExprs = lambda count: [None] * count
    plugin = plugin_class(HashableNamespace(fake), WEIGH_RESAMPLE)()
    inputs = [[f"{symbol}!" for symbol in tensor.dims] for tensor in WEIGH_RESAMPLE.inputs]
    assert plugin.get_output_shapes(inputs, [], None)[:3] == [["G!", "N!"], ["G!"], ["G!", "N!"]]


class HashableNamespace:
    """TensorRT's module with a stand-in for what only its builder can make."""

    def __init__(self, values: SimpleNamespace) -> None:
        self.__dict__.update(vars(values))


def test_tensorrt_rtx_says_that_it_hosts_no_plugins(trt: Any) -> None:
    api = find("tensorrt-rtx")
    assert api is not None
    assert not api.hosts_plugins
    with pytest.raises(ConfigError, match=r"cannot host SmcKvPageCopy \(no add_plugin_v3\), expected full TensorRT"):
        build_plugin_plan(api, KV_PAGE_COPY, {}, "bfloat16")


class HostingNetwork:
    """A real network plus add_plugin_v3, which only full TensorRT has; it notes the call and gives real tensors back."""

    def __init__(self, network: Any) -> None:
        self.network, self.taken, self.plugin = network, [], None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.network, name)

    def add_plugin_v3(self, inputs: list[Any], shape_inputs: list[Any], plugin: Any) -> Any:
        self.taken, self.plugin = inputs, plugin
        outputs = [self.network.add_identity(inputs[0]).get_output(0) for _ in range(plugin.num_outputs)]
        return SimpleNamespace(get_output=outputs.__getitem__, shape_inputs=shape_inputs)


@pytest.mark.parametrize("contract", CONTRACTS, ids=lambda contract: contract.name)
def test_a_hosting_network_gets_every_input_and_output(trt: Any, contract: Contract) -> None:
    api = find("tensorrt-rtx")
    assert api is not None
    builder = trt.Builder(api.logger)
    network = HostingNetwork(api.create_network(builder))
    sizes = {symbol: size for size, symbol in enumerate(sorted({s for t in contract.inputs for s in t.dims}), start=2)}
    layer = add_plugin(trt, network, contract, sizes, "bfloat16")
    assert layer.shape_inputs == []
    assert isinstance(network.plugin, trt.IPluginV3)
    assert [tensor.name for tensor in network.taken] == [tensor.name for tensor in contract.inputs]
    assert [tuple(tensor.shape) for tensor in network.taken] == [
        tuple(sizes[symbol] for symbol in tensor.dims) for tensor in contract.inputs
    ]
    assert network.taken[0].dtype == (trt.DataType.BF16 if contract is KV_PAGE_COPY else trt.DataType.INT64)
    outputs = [network.get_output(index).name for index in range(network.num_outputs)]
    assert outputs == [tensor.name for tensor in contract.outputs]


def test_tensor_at_shares_memory() -> None:
    owner = torch.arange(6, dtype=torch.float64)
    view = tensor_at(owner.data_ptr(), (2, 3), torch.float64, "cpu")
    view[1, 2] = -1
    assert owner.tolist() == [0, 1, 2, 3, 4, -1]
