"""Tokenizers as files: which ones are copied, and whether two models have the same one.

Two tokenizers are the same when vocabulary and merges are; file bytes may differ (key order, merges as "a b" or ["a",
"b"], chat templates). Example: the tokenizer.json files of Llama-3.1-8B and Llama-3.2-1B have equal fingerprints.
"""

import hashlib
import json
import operator
import shutil
from pathlib import Path
from typing import Any

from smc_build.checkpoint import check_small, read_json, read_small, safe_file
from smc_plugin.errors import CheckpointError

# Data only; a checkpoint's Python files are never copied.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.jinja",
    "chat_template.json",
)


def tokenizer_files(folder: Path) -> list[Path]:
    """List the tokenizer files a checkpoint folder has.

    Raises:
        CheckpointError: one of them is a link that leaves the folder, or is too large.
    """
    return [check_small(safe_file(folder, name)) for name in TOKENIZER_FILES if (folder / name).exists()]


def fingerprint(folder: Path) -> str | None:
    """Hash what a tokenizer does.

    Args:
        folder: a checkpoint folder.
    Returns:
        SHA-256, or None when the folder has neither tokenizer.json nor tokenizer.model.
    Raises:
        CheckpointError: tokenizer.json cannot be read.
    """
    if (folder / "tokenizer.json").exists():
        model = _tokenizer_model(folder)
        try:
            merges = [pair.split(" ") if isinstance(pair, str) else list(pair) for pair in model.get("merges") or []]
        except TypeError as error:
            raise _unreadable(folder, f"merges that are no pairs ({error})") from None
        return hashlib.sha256(json.dumps([model["vocab"], merges], sort_keys=True).encode()).hexdigest()
    if (folder / "tokenizer.model").exists():
        return hashlib.sha256(read_small(safe_file(folder, "tokenizer.model"))).hexdigest()
    return None


def check_same_tokenizer(target: Path, draft: Path) -> None:
    """Refuse a draft whose tokenizer differs; a draft folder without tokenizer files is taken to use the target's.

    Raises:
        CheckpointError: the tokenizers differ.
    """
    ours, theirs = fingerprint(target), fingerprint(draft)
    if ours is not None and theirs is not None and ours != theirs:
        raise CheckpointError(
            f"target and draft have different tokenizers: {target.name} has fingerprint {ours[:12]}, {draft.name} has "
            f"{theirs[:12]}, expected the same vocabulary and merges: choose a draft of the target's model family"
        )


def check_fits_vocabulary(folder: Path, vocab_size: int) -> None:
    """Refuse a tokenizer that can produce a token id beyond the embedding.

    Raises:
        CheckpointError: an id is too large.
    """
    if not (folder / "tokenizer.json").exists():
        return
    vocab = _tokenizer_model(folder)["vocab"]
    try:
        ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
        added = [token["id"] for token in read_json(safe_file(folder, "tokenizer.json")).get("added_tokens") or []]
        highest = max(map(operator.index, [*ids, *added]), default=-1)
    except (TypeError, KeyError) as error:
        raise _unreadable(folder, f"ids that are none ({error})") from None
    if highest >= vocab_size:
        raise CheckpointError(
            f"the tokenizer of {folder.name} has token id {highest}, expected ids below the vocabulary size "
            f"{vocab_size}: "
            "use the tokenizer that belongs to the weights"
        )


def copy_tokenizer(folder: Path, destination: Path) -> list[Path]:
    """Copy a checkpoint's tokenizer files; creates the destination only when there are any.

    Returns:
        the copies.
    """
    files = tokenizer_files(folder)
    if files:
        destination.mkdir(parents=True)
    return [Path(shutil.copyfile(file, destination / file.name)) for file in files]


def _unreadable(folder: Path, found: str) -> CheckpointError:
    return CheckpointError(f"tokenizer.json in {folder.name} has {found}, expected a tokenizers file: fetch it again")


def _tokenizer_model(folder: Path) -> dict[str, Any]:
    model = read_json(safe_file(folder, "tokenizer.json")).get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise _unreadable(folder, "no model.vocab")
    return model
