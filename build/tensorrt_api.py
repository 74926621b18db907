"""The one module that knows how `tensorrt` (10.14 to 11.x) and `tensorrt_rtx` differ.

                          tensorrt                             tensorrt_rtx (bindings wheel: tensorrt_rtx_bindings)
    builder needs a GPU   yes                                  no
    plan runs on          the compute capability it saw        8.0, 8.6, 8.9, 12.0; 9.0 too before version 1.7
    kernels               in the plan                          compiled on first use, kept in a runtime cache
    add_plugin_v3         yes                                  no
    strong typing         a creation flag, ignored from 11.0   a creation flag

Everything else is one API, type-checked against the stubs of `tensorrt`. Example: on a computer without a GPU that has
tensorrt-rtx-cu13 1.6.1.120, load("auto", "bfloat16") gives the API of "tensorrt-rtx", load("auto", "float32") gives
None (torch), and load("tensorrt", "bfloat16") raises a ConfigError that names the extra `tensorrt`.
"""

import importlib
import logging
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from smc_build.closest import suggest
from smc_plugin.errors import ConfigError, EngineDirError, SmcError

if TYPE_CHECKING:
    import tensorrt as trt

COMPILERS = ("auto", "tensorrt", "tensorrt-rtx", "torch")
# In the order in which "auto" tries them; each with its import names and the extra that installs it.
_MODULES = {"tensorrt": ("tensorrt",), "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_LOWEST = {"tensorrt": (10, 14), "tensorrt-rtx": (1, 4)}
# The first version that refuses Hopper GPUs (compute capability 9.0), and the one to use there.
_RTX_WITHOUT_HOPPER = (1, 7)
RTX_FOR_HOPPER = "1.6.1.120"
# Plans that run on every GPU their TensorRT supports.
PORTABLE = "portable"

_log = logging.getLogger("smc_build.tensorrt")


class TensorrtApi:
    """One installed TensorRT.

    Attributes:
        compiler: "tensorrt" or "tensorrt-rtx".
        trt: its Python module.
        version: for example "1.6.1.120".
        first_error: the first error TensorRT logged since `forget_errors`, "" if none: its calls return None or raise
            without saying why, and later errors are often consequences.
    """

    def __init__(self, compiler: str, module_name: str) -> None:
        self.compiler = compiler
        self.trt = _import(module_name)
        self.version: str = self.trt.__version__
        self.first_error = ""
        self.logger = _make_logger(self)

    @property
    def builds_without_gpu(self) -> bool:
        """Whether plans can be compiled where there is no GPU."""
        return self.compiler == "tensorrt-rtx"

    @property
    def hosts_plugins(self) -> bool:
        """Whether a network can contain IPluginV3 layers."""
        return hasattr(self.trt.INetworkDefinition, "add_plugin_v3")

    @property
    def has_runtime_cache(self) -> bool:
        """Whether kernels are compiled at run time and can be kept in a cache."""
        return hasattr(self.trt.IRuntimeConfig, "create_runtime_cache")

    def target(self) -> str:
        """Which GPUs a plan built now runs on: "portable", or "sm_90" for this GPU's compute capability."""
        return PORTABLE if self.builds_without_gpu else f"sm_{_capability()[0]}{_capability()[1]}"

    def create_network(self, builder: "trt.Builder") -> "trt.INetworkDefinition":
        """Create an empty strongly typed network."""
        flag = getattr(self.trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        return builder.create_network(0 if flag is None else 1 << int(flag))

    def create_config(self, builder: "trt.Builder") -> "trt.IBuilderConfig":
        """Create a builder configuration: float32 products stay float32, and plugins may work in place."""
        config = builder.create_builder_config()
        config.clear_flag(self.trt.BuilderFlag.TF32)
        aliasing = getattr(self.trt.PreviewFeature, "ALIASED_PLUGIN_IO_10_03", None)
        if self.hosts_plugins and aliasing is not None:
            config.set_preview_feature(aliasing, True)
        return config

    def create_runtime_config(self, engine: "trt.ICudaEngine", runtime_cache: Any = None) -> Any:
        """Create the settings of an execution context that owns no scratch memory; they must outlive the context.

        Args:
            engine: a loaded plan.
            runtime_cache: what `create_runtime_cache` returned, or None.
        """
        config: Any = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(self.trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if runtime_cache is not None:
            config.set_runtime_cache(runtime_cache)
        return config

    def create_runtime_cache(self, engine: "trt.ICudaEngine", saved: bytes | None) -> Any:
        """Create a cache for kernels compiled at run time; `saved` is ignored where TensorRT finds it unfit."""
        runtime_config: Any = engine.create_runtime_config()
        runtime_cache = runtime_config.create_runtime_cache()
        if saved and not runtime_cache.deserialize(saved):
            _log.info("the saved runtime cache fits another GPU, driver or version: kernels are compiled again")
        return runtime_cache

    def forget_errors(self) -> None:
        """Start afresh, before calls whose errors matter; without a GPU, mere initialisation logs some."""
        self.first_error = ""

    def check(self, result: Any, action: str) -> Any:
        """Return a call's result; None means that it failed.

        Raises:
            SmcError: the result is None.
        """
        if result is None:
            reason = self.first_error or "no reason given"
            self.forget_errors()
            raise SmcError(
                f"{self.compiler} {self.version} could not {action} ({reason}), expected it to succeed: use --compiler "
                "torch, or another version of it"
            )
        return result

    def check_gpu(self, target: str = PORTABLE) -> None:
        """Refuse a GPU that plans for `target` do not run on.

        Raises:
            EngineDirError: no GPU, another GPU, or a version that refuses it.
        """
        if not torch.cuda.is_available():
            raise EngineDirError("plans need a GPU, torch sees none: run with --device cpu, which needs no plans")
        capability = _capability()
        here = f"sm_{capability[0]}{capability[1]}"
        if target not in (PORTABLE, here):
            raise EngineDirError(
                f"the plans were built for {target}, this GPU is {here}: rebuild the engine directory here with "
                "smc-build"
            )
        if self.compiler == "tensorrt-rtx" and here == "sm_90" and _version_tuple(self.version) >= _RTX_WITHOUT_HOPPER:
            raise EngineDirError(
                f"tensorrt-rtx {self.version} refuses Hopper GPUs, expected a version below "
                f"{'.'.join(map(str, _RTX_WITHOUT_HOPPER))}: pip install tensorrt-rtx-cu13-libs=={RTX_FOR_HOPPER} "
                f"tensorrt-rtx-cu13-bindings=={RTX_FOR_HOPPER}"
            )


def load(compiler: str, dtype: str) -> TensorrtApi | None:
    """Resolve --compiler.

    Args:
        compiler: one of COMPILERS. "auto" takes the first that is installed and can build here; it takes torch for
            float32, the type of engines that run on CPUs.
        dtype: the engine's element type.
    Returns:
        the API, or None for torch.
    Raises:
        ConfigError: an unknown name, or a compiler that is not installed, too old, or cannot build here.
    """
    if compiler not in COMPILERS:
        raise ConfigError(
            f"--compiler is {compiler!r}, expected one of {', '.join(COMPILERS)}: "
            + suggest(compiler, COMPILERS, fallback="use auto")
        )
    if compiler == "torch" or (compiler == "auto" and dtype == "float32"):
        return None
    names = tuple(_MODULES) if compiler == "auto" else (compiler,)
    for name in names:
        problem = _problem(name)
        if problem is None:
            return find(name)
        if compiler != "auto":
            raise ConfigError(f"--compiler {name} cannot be used: {problem}")
    return None


@cache
def find(compiler: str) -> TensorrtApi | None:
    """Return the API of an installed TensorRT, None where it is not installed."""
    for module_name in _MODULES[compiler]:
        # Type stubs install a folder of the same name, which imports as an empty namespace.
        if hasattr(_import_or_none(module_name), "Builder"):
            return TensorrtApi(compiler, module_name)
    return None


def _problem(compiler: str) -> str | None:
    api = find(compiler)
    lowest = ".".join(map(str, _LOWEST[compiler]))
    if api is None:
        return f"it is not installed, expected version {lowest} or later: pip install 'smc-engine[{compiler}]'"
    if _version_tuple(api.version) < _LOWEST[compiler]:
        return (
            f"version {api.version} is installed, expected {lowest} or later: pip install -U 'smc-engine[{compiler}]'"
        )
    if not api.builds_without_gpu and not torch.cuda.is_available():
        return "its builder needs a GPU, torch sees none: use --compiler tensorrt-rtx, or build on the GPU machine"
    return None


def _import(name: str):
    # A module has no type to write down; the type checker infers that of the stubs.
    if TYPE_CHECKING:
        return trt
    return importlib.import_module(name)


def _import_or_none(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except (ImportError, OSError, RuntimeError) as error:  # a stub package or a missing CUDA library raises these
        _log.debug("cannot import %s: %s", name, error)
        return None


def _make_logger(api: TensorrtApi) -> Any:
    """Keep errors for the exception that follows; pass warnings to `logging`."""

    class Logger(api.trt.ILogger):
        def __init__(self) -> None:
            api.trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if severity in (api.trt.ILogger.ERROR, api.trt.ILogger.INTERNAL_ERROR):
                api.first_error = api.first_error or message.strip()
                _log.debug("%s", message)
            elif severity == api.trt.ILogger.WARNING:
                _log.info("%s", message)

    return Logger()


def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


def _version_tuple(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdecimal())
