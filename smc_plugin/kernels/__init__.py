"""Kernels of the SMC round in OpenAI Triton, one module beside each module of smc_plugin.reference.

A module here has the public functions of its reference, with the same arguments and results, and fused entry points
where one launch does the work of several: `sampling.sample`, `sampling.score`, `resample.weigh_and_resample`,
`attention.attend`, `matmul.linear`. One source runs on a GPU, under the interpreter on a CPU (TRITON_INTERPRET=1, set
before the first import) and compiles ahead of time without a GPU (`compile`). Nothing waits for the GPU or looks at a
value on the host, so that every call can be captured in a CUDA graph; run each shape once before capturing it.
"""

from smc_plugin.errors import ConfigError

try:
    import triton as _triton  # noqa: F401 - only to name the missing extra
except ImportError as error:
    raise ConfigError(
        "the Triton kernels need the triton package, which is not installed: install the extra with "
        "pip install 'smc-engine[gpu]', or use smc_plugin.reference"
    ) from error
