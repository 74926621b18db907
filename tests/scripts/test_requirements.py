"""Requirements: what is pinned by hand is what is hashed, and nothing is left out."""

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
HASHED = sorted(path.stem for path in REQUIREMENTS.glob("*.in"))


def pins(text: str) -> set[str]:
    """Name and version of each requirement, with its marker."""
    lines = (line.split("#")[0].removesuffix("\\").strip() for line in text.replace(" \\", "").splitlines())
    return {line.lower().replace("_", "-") for line in lines if re.match(r"[A-Za-z0-9]", line)}


@pytest.mark.parametrize("name", HASHED)
def test_hashed_requirements_are_those_pinned_by_hand(name: str) -> None:
    made = (REQUIREMENTS / f"{name}.txt").read_text()
    by_hand = pins((REQUIREMENTS / f"{name}.in").read_text())
    assert pins(made) == by_hand, "run make hashes"
    assert all("==" in pin for pin in by_hand)
    # a hash for each
    assert len(re.findall(r"==\S+ \\\n    --hash=sha256:[0-9a-f]{64}", made)) == len(by_hand)


def test_only_torch_has_no_hashes() -> None:
    assert {path.stem for path in REQUIREMENTS.glob("*.txt")} - set(HASHED) == {"torch"}
    assert pins((REQUIREMENTS / "torch.txt").read_text()).pop().startswith("torch==")
