"""The "did you mean" ending of error messages.

Example: suggest("lama", ("llama", "qwen2")) is "did you mean 'llama'?".
"""

import difflib
from collections.abc import Iterable


def suggest(value: object, known: Iterable[str], *, fallback: str) -> str:
    """Name the known word closest to a wrong one.

    Args:
        value: what was given.
        known: the words that would have been accepted.
        fallback: the remedy when no known word is close.
    Returns:
        the last part of an error message, without a full stop.
    """
    matches = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else fallback
