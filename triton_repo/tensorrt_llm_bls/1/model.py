"""Served model; its contract and everything else is in smc/1/smc_adapter."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "smc" / "1"))

from smc_adapter.adapter import SmcModel


class TritonPythonModel(SmcModel):
    """Named as the Python backend expects."""
