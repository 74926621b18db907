"""Who may come in at the OpenAI-compatible front, and with how much: checked before a body is read.

RequireKey   401 unless the request says "Authorization: Bearer KEY" with one of the keys; /health is open to all
LimitBody    413 beyond MAX_BODY_BYTES, whatever the client announced, so that nobody fills the front's memory
"""

from __future__ import annotations

import contextlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from fastapi.responses import JSONResponse
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from smc_plugin.errors import ConfigError

MAX_BODY_BYTES = 16 * 2**20
MIN_KEY_LENGTH = 16


def read_keys(path: str) -> list[bytes]:
    """Read API keys, one a line; empty lines and lines that begin with # are ignored.

    Raises:
        ConfigError: the file cannot be read, has no key, or one that can be guessed.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the API keys ({error}), expected a text file: correct the path") from None
    keys = [key for line in lines if (key := line.strip()) and not key.startswith("#")]
    if not keys or min(map(len, keys)) < MIN_KEY_LENGTH:
        raise ConfigError(
            f"{path} has {len(keys)} API keys, expected at least one and none shorter than {MIN_KEY_LENGTH} characters: "
            "write one a line, for example from `openssl rand -hex 24`"
        )
    return [key.encode() for key in keys]


async def _refuse(scope: Scope, receive: Receive, send: Send, status: int, message: str, code: str) -> None:
    error = {"message": message, "type": "invalid_request_error", "param": None, "code": code}
    await JSONResponse({"error": error}, status)(scope, receive, send)


class RequireKey:
    """Lets only requests with a key reach the API.

    Args:
        keys: any of them opens; none leaves the API open.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[bytes]) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or pass on."""
        if scope["type"] == "http" and self._keys and scope["path"] != "/health" and not self._known(scope):
            message = "the API key is missing or wrong, expected Authorization: Bearer KEY: send a key of this service"
            await _refuse(scope, receive, send, 401, message, "invalid_api_key")
        else:
            await self._app(scope, receive, send)

    def _known(self, scope: Scope) -> bool:
        scheme, _, given = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        # every key is compared, in constant time, so that the time says nothing about them
        found = any([hmac.compare_digest(given, key) for key in self._keys])
        return found and scheme.lower() == b"bearer"


class LimitBody:
    """Ends requests whose body is too long."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count what comes in; the application sees a body that is too long as a client that hung up."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = dict(scope["headers"]).get(b"content-length", b"")
        got = int(announced) if announced.isdigit() and len(announced) < 20 else 0
        too_long = got > MAX_BODY_BYTES
        got = 0

        async def counted() -> Message:
            nonlocal got, too_long
            message = await receive()
            got += len(message.get("body", b""))
            too_long = too_long or got > MAX_BODY_BYTES
            return {"type": "http.disconnect"} if too_long else message

        async def watched(message: Message) -> None:
            if not too_long:
                await send(message)

        if not too_long:
            with contextlib.suppress(ClientDisconnect):
                await self._app(scope, counted, watched)
        if too_long:
            message = f"the body is too long, expected at most {MAX_BODY_BYTES} bytes: shorten the request"
            await _refuse(scope, receive, send, 413, message, "body_too_long")
