"""Check the requirements without a network: python scripts/check_requirements.py [--write]

Every file but torch.txt must pin each package to a version and to hashes of its files, and LICENSES.md must list each pinned
package with its licence, of a kind that ALLOWED or OTHERS names. What is installed here must state the licence that is listed.
`make lint` runs it. --write brings the list up to date for what is installed here; run it with each environment's Python.
"""

from __future__ import annotations

import argparse
import re
import sys
from importlib.metadata import PackageNotFoundError, files, metadata
from pathlib import Path

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
LIST = "LICENSES.md"
UNHASHED = "torch.txt"  # each kind of machine has a build of its own of one version
# all that a package may be under: nothing here reaches the code that uses it
ALLOWED = re.compile(
    r"(0BSD|Apache|BSD|CC0|CNRI|ISC|MIT|MPL|PSF|Python Software Foundation|Zlib|[23]-Clause BSD)\b", re.IGNORECASE
)
OTHERS = {
    "openmpi": "LicenseRef-OpenMPI",  # the 3-clause BSD licence of its many holders
    "tensorrt-rtx-cu13-bindings": "Proprietary",  # NVIDIA's own terms; only engines with TensorRT plans need it
    "tensorrt-rtx-cu13-libs": "Proprietary",
}
_HEAD = """# Licences of what is pinned here

As the packages state them. Made by `python scripts/check_requirements.py --write`, checked by `make lint`.

| package | version | licence |
| --- | --- | --- |
"""
Pin = tuple[str, str]  # name and version


def lines_of(path: Path) -> list[str]:
    """A requirements file's entries, each on one line and without comments."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.split("#")[0].strip()]


def pins_of(folder: Path) -> list[Pin]:
    """Every package and version that any requirements file pins."""
    found = {
        (match[1], match[2])
        for path in folder.glob("*.txt")
        for line in lines_of(path)
        if (match := re.match(r"([A-Za-z0-9._-]+)==([^ ;]+)", line))
    }
    return sorted(found)


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


def stated_here(pins: list[Pin]) -> dict[Pin, str]:
    """The licence of each pinned package that is installed here in the pinned version."""
    found = {}
    for name, version in pins:
        try:
            installed = metadata(name)["Version"].partition("+")[0]
        except PackageNotFoundError:
            continue
        if installed == version:
            found[name, version] = licence(name)
    return found


def read_list(folder: Path) -> dict[Pin, str]:
    """The licences that LICENSES.md lists; empty where there is none."""
    path = folder / LIST
    rows = re.findall(r"^\| (\S+) \| (\d\S*) \| (.*) \|$", path.read_text(), re.MULTILINE) if path.exists() else []
    return {(name, version): kind for name, version, kind in rows}


def write_list(folder: Path) -> None:
    """Write LICENSES.md: what is installed here as it says, the rest as it was listed."""
    pins = pins_of(folder)
    kinds = read_list(folder) | stated_here(pins)
    rows = (f"| {name} | {version} | {kinds.get((name, version), '')} |\n" for name, version in pins)
    (folder / LIST).write_text(_HEAD + "".join(rows))


def is_allowed(kind: str) -> bool:
    """Whether every licence that a statement names is of an allowed kind, without conditions of others' making."""
    parts = re.split(r" and | or |[,;/] ?", kind, flags=re.IGNORECASE)
    return all(ALLOWED.match(part) for part in parts) and not re.search(r"GPL|Commons Clause", kind, re.IGNORECASE)


def problems(folder: Path) -> list[str]:
    """All that is wrong, a line each."""
    wrong = []
    entry = re.compile(r"[A-Za-z0-9._-]+==[^ ;]+( ; .+?)?( --hash=sha256:[0-9a-f]{64})+")
    for path in sorted(folder.glob("*.txt")):
        wrong += [
            f"{path.name}: {line[:60]!r} is not name==version with hashes: write it into {path.stem}.in and run make hashes"
            for line in lines_of(path)
            if path.name != UNHASHED and not entry.fullmatch(line)
        ]
    pins, listed = pins_of(folder), read_list(folder)
    here, write = stated_here(pins), "run python scripts/check_requirements.py --write"
    wrong += [f"{LIST}: {' '.join(pin)} is listed and not pinned: {write}" for pin in sorted(listed.keys() - set(pins))]
    for pin in pins:
        kind = listed.get(pin, "").strip()
        if not kind:
            wrong.append(f"{LIST}: {' '.join(pin)} is pinned and has no licence: {write} where it is installed")
        elif here.get(pin, kind).strip() != kind:
            wrong.append(f"{LIST}: {' '.join(pin)} is listed as {kind!r}, the package says {here[pin]!r}: {write}")
        elif kind != OTHERS.get(pin[0]) and not is_allowed(kind):
            wrong.append(
                f"{LIST}: {' '.join(pin)} is under {kind!r}, none of the kinds known here: read it, then name it in OTHERS"
            )
    return wrong


def main() -> int:
    """Check, or write the list."""
    parser = argparse.ArgumentParser(description="Check hashes and licences of the requirements.")
    parser.add_argument("--write", action="store_true", help=f"bring {LIST} up to date for what is installed here")
    if parser.parse_args().write:
        write_list(REQUIREMENTS)
    wrong = problems(REQUIREMENTS)
    pins = pins_of(REQUIREMENTS)
    print(
        "\n".join(wrong)
        or f"{len(pins)} requirements: hashes and licences are there, {len(stated_here(pins))} read here"
    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
