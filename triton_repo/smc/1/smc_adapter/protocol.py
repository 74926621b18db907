"""What adapters and the executor say to each other: JSON messages over ZeroMQ, one frame each.

An adapter (DEALER) and the executor (ROUTER) exchange objects with a version `v` and an operation `op`:

    adapter  -> executor   hello, submit, refused, cancel, probe, stats, drain, goodbye
    executor -> adapter    batch of: hello, output, probed, stats, draining, goodbye

    >>> decode(encode("cancel", id="smc-71-1"))
    {'v': 2, 'op': 'cancel', 'id': 'smc-71-1'}

Everything that a step of the executor has for one adapter travels as one `batch` with `messages`: what a frame costs the
process that computes does not grow with the streams.

`output` carries what is new for one request (token ids, text), and with the last one a finish reason, and figures or an
error. Several outputs of one request may be merged into one (`merge`), so that a receiver that falls behind holds at most
one answer for each request. `refused` reports a request that the adapter itself answered with an error, for log and metrics.
A draining executor says `goodbye` last and leaves once each adapter has said it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

VERSION = 2
_ENCODER = json.JSONEncoder(separators=(",", ":"))

# Error codes; the names are those of Triton Inference Server where it has one.
INVALID_ARG = "INVALID_ARG"
UNAVAILABLE = "UNAVAILABLE"
DEADLINE = "DEADLINE"
INTERNAL = "INTERNAL"
UNSUPPORTED = "UNSUPPORTED"


class ProtocolError(ValueError):
    """A message that this version cannot read."""


def encode(op: str, **fields: Any) -> bytes:
    """Write a message.

    Args:
        op: the operation.
        fields: JSON values; NaN and infinities are kept.
    Returns:
        one frame.
    """
    return _ENCODER.encode({"v": VERSION, "op": op, **fields}).encode()


def decode(frame: bytes) -> dict[str, Any]:
    """Read a message.

    Raises:
        ProtocolError: not JSON, not an object, or of another version.
    """
    try:
        message = json.loads(frame)
    except (ValueError, RecursionError) as error:
        raise ProtocolError(
            f"cannot read a message, expected JSON, got {frame[:40]!r} ({error}): use one release"
        ) from None
    if not isinstance(message, dict) or not isinstance(message.get("op"), str):
        raise ProtocolError(f"cannot read a message, expected an object with op, got {frame[:40]!r}: use one release")
    if message.get("v") != VERSION:
        raise ProtocolError(
            f"cannot read a message, expected protocol version {VERSION}, got {message.get('v')!r}: serve triton_repo and "
            "executor from one release"
        )
    return message


def merge(earlier: Mapping[str, Any], later: Mapping[str, Any]) -> dict[str, Any]:
    """Join two outputs of one request into one.

    Args:
        earlier: an output; one with a finish reason is complete and wins.
        later: the next one.
    Returns:
        an output that says what both said.
    """
    if earlier.get("finish"):
        return dict(earlier)
    return {**later, "ids": [*earlier["ids"], *later["ids"]], "text": earlier["text"] + later["text"]}
