"""The shipped form of the draft: decoder layers as small integers, everything else borrowed from the target.

Owns models/smollm2-draft/: `layers.safetensors` (per matrix packed codes and scales; norms in float16), `draft.json`.
A matrix [out, in] is cut into groups of `group` neighbouring inputs (group 0: one group per output row). In a group
    scale = max|w| / (2^(bits-1) - 1),   code = round(w / scale),   w' = code * scale.
For 8 bits and w = [0.254, -0.1, 0.03]: scale 0.002, codes [127, -50, 15], w' = [0.254, -0.1, 0.03].
Codes are stored offset by 2^(bits-1), bit after bit, so that 4 layers of SmolLM2's shape need 14.2 MB at 8 bits.
The embedding, which is also the head, is the target's own and is not stored.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from smc_plugin.errors import CheckpointError

LAYERS_FILE = "layers.safetensors"
DESCRIPTION_FILE = "draft.json"
MAX_SHIPPED_BYTES = 16_000_000


def quantize(weight: torch.Tensor, bits: int, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a matrix to symmetric integer codes.

    Args:
        weight: [out, in] float.
        bits: 2 to 8.
        group: inputs that share a scale, dividing `in`; 0 for the whole row.
    Returns:
        codes [out, groups, in / groups] float holding integers, scales [out, groups, 1] rounded to float16.
    """
    largest = 2 ** (bits - 1) - 1
    rows, columns = weight.shape
    grouped = weight.reshape(rows, columns // (group or columns), -1)
    # The floor keeps the scale normal in float16: an all-zero group must not divide by zero.
    scales = (grouped.abs().amax(-1, keepdim=True) / largest).clamp_min(2.0**-14).to(torch.float16).to(weight.dtype)
    return (grouped / scales).round().clamp(-largest, largest), scales


def fake_quantize(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What the shipped file will hold in place of `weight`, with the gradient of `weight` itself (straight-through)."""
    codes, scales = quantize(weight.detach(), bits, group)
    return weight + ((codes * scales).reshape_as(weight) - weight).detach()


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integer codes to bytes.

    Args:
        codes: any shape, integers of magnitude below 2^(bits-1).
        bits: bits a code.
    Returns:
        [ceil(count * bits / 8)] uint8.
    """
    offset = (codes.reshape(-1).cpu().numpy().astype(np.int16) + 2 ** (bits - 1)).astype(np.uint8)
    if bits == 8:
        return torch.from_numpy(offset)
    planes = (offset[:, None] >> np.arange(bits, dtype=np.uint8)) & 1
    return torch.from_numpy(np.packbits(planes.reshape(-1), bitorder="little"))


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Bytes back to `count` float32 integer codes; the inverse of `pack_codes`."""
    offset = packed.numpy()
    if bits < 8:
        planes = np.unpackbits(offset, count=count * bits, bitorder="little").reshape(count, bits)
        offset = (planes << np.arange(bits, dtype=np.uint8)).sum(1, dtype=np.int16)
    return torch.from_numpy(offset.astype(np.float32) - 2 ** (bits - 1))


def write_layers(folder: Path, weights: dict[str, torch.Tensor], config: dict[str, Any], bits: int, group: int) -> int:
    """Write the shipped files.

    Args:
        folder: existing folder, e.g. models/smollm2-draft.
        weights: name → tensor of every draft weight but the embedding; matrices [out, in].
        config: the draft's config.json.
        bits, group: as in `quantize`.
    Returns:
        Total size in bytes.
    Raises:
        CheckpointError: more than 16 MB.
    """
    stored: dict[str, torch.Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, weight in sorted(weights.items()):
        if weight.ndim == 1:
            stored[name] = weight.detach().to("cpu", torch.float16).contiguous()
            continue
        codes, scales = quantize(weight.detach().float(), bits, group)
        stored[f"{name}.codes"] = pack_codes(codes, bits)
        stored[f"{name}.scales"] = scales[..., 0].to("cpu", torch.float16).contiguous()
        shapes[name] = list(weight.shape)
    # Whole or not at all: a training run saves over its last draft and may be cut off at any moment.
    partial = folder / f"{LAYERS_FILE}.partial"
    save_file(stored, partial)
    partial.replace(folder / LAYERS_FILE)
    description = {"format": 1, "bits": bits, "group": group, "config": config, "shapes": shapes}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    total = sum((folder / name).stat().st_size for name in (LAYERS_FILE, DESCRIPTION_FILE))
    if total > MAX_SHIPPED_BYTES:
        raise CheckpointError(
            f"the draft layers take {total} bytes, at most {MAX_SHIPPED_BYTES} can ship: use fewer --layers or --bits"
        )
    return total


def read_layers(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the shipped files back as float32 weights.

    Args:
        folder: e.g. models/smollm2-draft.
    Returns:
        weights (name → float32 tensor, the embedding absent) and the draft's config.json dictionary.
    Raises:
        CheckpointError: files are missing or are of another format.
    """
    description_path = folder / DESCRIPTION_FILE
    if not description_path.is_file() or not (folder / LAYERS_FILE).is_file():
        raise CheckpointError(
            f"{folder} lacks {DESCRIPTION_FILE} or {LAYERS_FILE}, expected both: check the checkout out again, "
            "train a draft with scripts/train_draft.py, or pass --no-draft"
        )
    description = json.loads(description_path.read_text(encoding="utf-8"))
    if description.get("format") != 1:
        raise CheckpointError(
            f"{description_path} has format {description.get('format')!r}, this script reads 1: update the checkout"
        )
    bits, weights = int(description["bits"]), {}
    with safe_open(folder / LAYERS_FILE, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  safe_open is no mapping
            if not name.endswith((".codes", ".scales")):
                weights[name] = file.get_tensor(name).float()
        for name, shape in description["shapes"].items():
            scales = file.get_tensor(f"{name}.scales").float()
            codes = unpack_codes(file.get_tensor(f"{name}.codes"), bits, int(np.prod(shape)))
            weights[name] = (codes.reshape(*scales.shape, -1) * scales[..., None]).reshape(shape)
    return weights, description["config"]
