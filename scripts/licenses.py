"""List the licence of every pinned package that is installed here: python scripts/licenses.py

Reads the requirements files and the metadata of installed packages, so it needs no network. Run it with either environment's
Python; what is pinned and not installed there is counted at the end. A package without any licence makes the exit status 1.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, files, metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"


def pinned() -> dict[str, str]:
    """Version by package name, over all requirements files."""
    found = {}
    for path in sorted((*REQUIREMENTS.glob("*.in"), REQUIREMENTS / "torch.txt")):
        for line in path.read_text().splitlines():
            if match := re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line):
                found[match[1]] = match[2]
    return found


def licence(name: str) -> str:
    """What a package says of its licence: the SPDX expression, else the field, the classifiers, or its file's first line."""
    about = metadata(name)
    stated = next(iter(about.get_all("License-Expression", []) or about.get_all("License", [])), "")
    if stated and "\n" not in stated and len(stated) < 80:
        return stated
    kinds = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    texts = [path.read_text() for path in files(name) or () if path.name.upper().startswith("LICEN")]
    return (
        ", ".join(kinds)
        or next((text for text in (stated, *texts) if text.strip()), "").strip().split("\n")[0].strip()[:80]
    )


def main() -> int:
    """Print the table."""
    missing, nameless = [], []
    for name, version in sorted(pinned().items()):
        try:
            stated = licence(name)
        except PackageNotFoundError:
            missing.append(name)
            continue
        print(f"{name:<28}{version:<14}{stated or 'none stated'}")
        if not stated:
            nameless.append(name)
    print(f"not installed here: {', '.join(missing) or 'none'}; no licence stated: {', '.join(nameless) or 'none'}")
    return 1 if nameless else 0


if __name__ == "__main__":
    sys.exit(main())
