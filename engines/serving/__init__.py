"""Serving at run time: the executor's process, supervision, the status page and the OpenAI-compatible front.

The message schema lives with the adapters (triton_repo/smc/1/smc_adapter), which must run without this package; importing
this package makes it importable here too, as `smc_adapter`.
"""

import sys
from pathlib import Path

_HERE = Path(__file__).resolve().parent
# Beside the packages in a checkout, inside this package's parent in a wheel.
REPOSITORY = next(
    (path for path in (_HERE.parent / "triton_repo", _HERE.parents[1] / "triton_repo") if path.is_dir()),
    _HERE.parents[1] / "triton_repo",
)

_ADAPTER = str(REPOSITORY / "smc" / "1")
if _ADAPTER not in sys.path:
    sys.path.append(_ADAPTER)
