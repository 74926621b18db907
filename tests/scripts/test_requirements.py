"""Requirements: what is pinned by hand is what is hashed, and nothing is left out."""

import re
import shutil
from pathlib import Path

import pytest

from scripts import check_requirements

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


def test_hashes_and_licences_are_in_order() -> None:
    assert check_requirements.problems(REQUIREMENTS) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "message"),
    [
        ("dev.txt", r" \\\n    --hash=\S+", "", "'pytest==9.+' is not name==version with hashes: write it into dev.in"),
        ("dev.txt", r"pytest==\S+", "pytest>=1", "'pytest>=1 --hash"),
        ("dev.txt", r"pytest==", "--index-url https://example.org\npytest==", "'--index-url https://example.org'"),
        ("dev.txt", r"pytest==", "pytest==0.", r"pytest 0\.\S+ is pinned and has no licence"),
        ("LICENSES.md", r"\| pytest \| \S+ \| MIT", "| pytest | 1.0 | MIT", r"pytest 1\.0 is listed and not pinned"),
        ("LICENSES.md", r"(\| pytest \| \S+ \|) MIT", r"\1 ISC", "listed as 'ISC', the package says 'MIT'"),
        (
            "LICENSES.md",
            r"(\| atheris \| \S+ \|) .* \|",
            r"\1 MIT AND GPL-3.0-only |",
            "is under 'MIT AND GPL-3.0-only', none of",
        ),
        ("LICENSES.md", r"(\| atheris \| \S+ \|) .* \|", r"\1 MIT/AGPL-3.0 |", "is under 'MIT/AGPL-3.0', none of"),
        ("LICENSES.md", r"(\| atheris \| \S+ \|) .* \|", r"\1 MIT or Other |", "is under 'MIT or Other', none of"),
        ("LICENSES.md", r"(\| atheris \| \S+ \|) .* \|", r"\1 Apache License with Commons Clause |", "none of"),
        ("LICENSES.md", r"(\| atheris \| \S+ \|) .* \|", r"\1 Proprietary |", "is under 'Proprietary', none of"),
        ("LICENSES.md", r"(\| atheris \| \S+ \|) .* \|", r"\1  |", r"atheris \S+ is pinned and has no licence"),
    ],
)
def test_what_is_out_of_order_is_named(tmp_path: Path, file: str, before: str, after: str, message: str) -> None:
    folder = Path(shutil.copytree(REQUIREMENTS, tmp_path / "requirements"))
    text = (folder / file).read_text()
    start = text.index("pytest==") if file == "dev.txt" else 0
    changed, count = re.subn(before, after, text[start:], count=0 if "hash" in before else 1)
    assert count
    (folder / file).write_text(text[:start] + changed)
    assert any(re.search(message, problem) for problem in check_requirements.problems(folder))


def test_writing_the_list_keeps_what_is_not_installed(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(REQUIREMENTS, tmp_path / "requirements"))
    check_requirements.write_list(folder)
    assert (folder / "LICENSES.md").read_text() == (REQUIREMENTS / "LICENSES.md").read_text()
