"""An OpenAI-compatible HTTP front over the served model `smc`: python -m smc_engines.serving.openai_front --grpc HOST:PORT

    POST /v1/completions  POST /v1/chat/completions  GET /v1/models  GET /health

It holds no model and no tokenizer: every request becomes a gRPC request (one for each prompt), so both doors give the same
answers, and the chat template is applied in the executor, where the tokenizer is, for gRPC clients too.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

import grpc
import tritonclient.grpc.aio as grpcaio
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from tritonclient.utils import InferenceServerException

from smc_engines.serving.grpc_tls import Trust, client_arguments
from smc_engines.serving.openai_answers import (
    Answer,
    ErrorAnswer,
    Format,
    WholeChat,
    WholeCompletion,
    chat_format,
    completion_format,
)
from smc_engines.serving.openai_guard import LimitBody, RequireKey, read_keys
from smc_engines.serving.openai_schema import ChatRequest, CompletionRequest, FrontError
from smc_engines.serving.triton_client import ERROR_OUTPUTS, ServingError, make_inputs, to_arrays, to_error

MODEL = "smc"
DISCONNECT_POLL_S = 0.25
GRACEFUL_SHUTDOWN_S = 8
# A connection may idle for longer than clients keep theirs (5 s, and 60 s in front of proxies): the side that closes first had
# better be the one that sends the next request, or a request meets a connection that is just being closed.
KEEP_ALIVE_S = 75
CLIENT_CLOSED = 499  # nobody reads it
T = TypeVar("T")
_STATUS = {
    "INVALID_ARGUMENT": 400,
    "UNIMPLEMENTED": 400,
    "NOT_FOUND": 404,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
# What /openapi.json says of errors; naming 4XX also keeps FastAPI from promising a 422 of its own.
_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "the request is refused"},
    "5XX": {"model": ErrorAnswer, "description": "the service cannot answer now"},
}


def _answers(whole: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """What an endpoint answers: an object, or server-sent events."""
    return {200: {"model": whole, "content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def create_app(grpc_address: str, model_name: str, keys: Sequence[bytes] = (), trust: Trust | None = None) -> FastAPI:
    """The front as an ASGI application.

    Args:
        grpc_address: host:port of the Triton Inference Server.
        model_name: what /v1/models lists; requests must name it.
        keys: API keys, of which a request must send one; without any the API is open.
        trust: whom to trust where that port has TLS.
    """
    started = int(time.time())
    clients: dict[str, grpcaio.InferenceServerClient] = {}

    @contextlib.asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        clients["grpc"] = grpcaio.InferenceServerClient(grpc_address, **client_arguments(trust))
        yield
        await clients["grpc"].close()

    app = FastAPI(title="smc-serve", lifespan=lifespan, docs_url=None, redoc_url=None, responses=_ERRORS)
    app.add_middleware(LimitBody)
    app.add_middleware(RequireKey, keys=keys)  # the last one added comes first

    @app.exception_handler(FrontError)
    async def refused(_request: Request, error: FrontError) -> JSONResponse:
        return JSONResponse(_error_body(error), error.status)

    @app.exception_handler(HTTPException)
    async def unknown(_request: Request, error: HTTPException) -> JSONResponse:
        message = f"the request cannot be served ({error.detail}), expected one of /openapi.json: correct path, method or body"
        return JSONResponse(_error_body(FrontError(message, error.status_code)), error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = first.get("ctx", {}).get("error", "unreadable")
            return JSONResponse(_error_body(FrontError(f"the body must be JSON, got {reason}: correct it")), 400)
        name, reason = _blame(error.errors())
        given = repr(first.get("input"))[:80]
        message = f"{name or 'the body'} is invalid, {reason}, got {given}: correct it or leave it out"
        return JSONResponse(_error_body(FrontError(message, 400, name)), 400)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        entry = {"id": model_name, "object": "model", "created": started, "owned_by": "smc-engine"}
        return {"object": "list", "data": [entry]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict[str, Any]:
        check_name(name)
        return (await models())["data"][0]

    def check_name(name: str) -> None:
        if name != model_name:
            raise FrontError(f"model {name!r} is not served, expected {model_name!r}: change it", 404, "model")

    @app.post("/v1/completions", responses=_answers(WholeCompletion))
    async def completions(body: CompletionRequest, request: Request) -> Any:
        return await answer(body, request, completion_format(body))

    @app.post("/v1/chat/completions", responses=_answers(WholeChat))
    async def chat(body: ChatRequest, request: Request) -> Any:
        return await answer(body, request, chat_format())

    async def answer(body: CompletionRequest | ChatRequest, request: Request, style: Format) -> Any:
        check_name(body.model)
        body.check()
        prompts, inputs = body.prompts(), body.inputs()
        head = {"id": f"{style.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model_name}
        pieces = _merged(clients["grpc"], prompts, inputs, head["id"])
        if not body.stream:
            return JSONResponse(await _whole(pieces, request, len(prompts) * body.n, style, head))
        # an error before the first piece is still a proper HTTP error
        first = await _attended(anext(pieces, None), request)
        if first is None:
            raise FrontError("the server ended the answer before it began, expected one: try again", 503)
        events = _events(first, pieces, len(prompts) * body.n, style, head, body.include_usage)
        return StreamingResponse(events, media_type="text/event-stream")

    return app


_WHOLE = "function-before[_whole(), int]"  # pydantic's name of openai_schema.Whole


def _blame(errors: Sequence[Any]) -> tuple[str, str]:
    """The first parameter at fault and why; pydantic reports each type of a union by itself: prompt.str, prompt.list[str].0."""
    places = [[str(part).replace(_WHOLE, "int") for part in error["loc"] if part != "body"] for error in errors]
    is_type = [part in ("str", "bool", "int", "float") or part.startswith("list[") for part in places[0]]
    if True not in is_type:
        return ".".join(places[0]), errors[0]["msg"].lower()
    path = places[0][: is_type.index(True)]
    types = dict.fromkeys(place[len(path)] for place in places if place[: len(path)] == path)
    return ".".join(path), f"expected one of {', '.join(types)}"


def _error_body(error: FrontError) -> dict[str, Any]:
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": None}}


def _front_error(error: BaseException) -> FrontError:
    if isinstance(error, ServingError):
        return FrontError(str(error), _STATUS.get(error.status, 500))
    if isinstance(error, grpc.aio.AioRpcError):
        return FrontError(error.details() or error.code().name, _STATUS.get(error.code().name, 500))
    if isinstance(error, InferenceServerException):
        error = to_error(error)
        return FrontError(str(error), _STATUS.get(error.status, 500))
    return FrontError(f"the front failed, expected an answer, got {type(error).__name__}: report this", 500)


Piece = tuple[int, dict[str, Any]]


async def _one(
    client: grpcaio.InferenceServerClient, number: int, inputs: dict[str, Any], request_id: str
) -> AsyncIterator[Piece]:
    """One prompt's pieces: (choice index, tensors). Leaving it cancels the request."""
    # made here: an error inside the iterator below would be swallowed and leave the stream waiting for ever
    ask = {
        "model_name": MODEL,
        "inputs": make_inputs(MODEL, inputs),
        "request_id": request_id,
        "parameters": ERROR_OUTPUTS,
    }

    async def requests() -> AsyncIterator[dict[str, Any]]:
        yield ask

    # the client's annotations leave out that an iterator always comes back
    call: Any = client.stream_infer(requests())
    try:
        async for result, error in call:
            if error is not None:
                raise error
            tensors = to_arrays(result)
            for sequence in range(tensors["sequence_index"].size if tensors else 0):
                index = int(tensors["sequence_index"].ravel()[sequence])
                yield number * inputs["n"] + index, {name: _of(tensor, sequence) for name, tensor in tensors.items()}
    except BaseException:
        call.cancel()
        raise


def _of(tensor: Any, sequence: int) -> Any:
    """One sequence's part of a tensor [1, sequences or 1, ...]."""
    return tensor[0][min(sequence, tensor.shape[1] - 1)]


async def _merged(
    client: grpcaio.InferenceServerClient, prompts: list[dict[str, Any]], inputs: dict[str, Any], request_id: str
) -> AsyncIterator[Piece]:
    """The pieces of several prompts as they come.

    Raises:
        FrontError: the server refused one, or ended it.
    """
    arrived: asyncio.Queue[Piece | BaseException | None] = asyncio.Queue()

    async def pump(number: int, prompt: dict[str, Any]) -> None:
        try:
            async for piece in _one(client, number, {**inputs, **prompt}, request_id):
                await arrived.put(piece)
            await arrived.put(None)
        except Exception as error:  # whatever it is, somebody waits for an answer
            await arrived.put(error)

    tasks = [asyncio.create_task(pump(number, prompt)) for number, prompt in enumerate(prompts)]
    try:
        running = len(tasks)
        while running:
            piece = await arrived.get()
            if isinstance(piece, BaseException):
                raise _front_error(piece)
            if piece is None:
                running -= 1
            else:
                yield piece
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _whole(
    pieces: AsyncIterator[Piece], request: Request, choices: int, style: Format, head: dict[str, Any]
) -> dict[str, Any]:
    """Collect everything; a client that hangs up cancels it."""
    answers = [Answer(index) for index in range(choices)]

    async def collect() -> None:
        async for index, tensors in pieces:
            answers[index].add(tensors)

    await _attended(collect(), request)
    return style.whole(head, answers)


async def _attended(work: Coroutine[Any, Any, T], request: Request) -> T:
    """The result of some work that is cancelled when its client hangs up.

    Raises:
        FrontError: it hung up; nobody will read the answer.
    """
    task = asyncio.create_task(work)
    try:
        while not task.done():
            await asyncio.wait([task], timeout=DISCONNECT_POLL_S)
            if not task.done() and await request.is_disconnected():
                raise FrontError("the client hung up, expected it to wait: send the request again", CLIENT_CLOSED)
        return await task
    finally:
        task.cancel()


async def _events(
    first: Piece, rest: AsyncIterator[Piece], choices: int, style: Format, head: dict[str, Any], include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of a stream, the last one [DONE]; an error becomes an event, then the stream ends."""
    answers = [Answer(index) for index in range(choices)]

    async def chained() -> AsyncIterator[Piece]:
        yield first
        async for piece in rest:
            yield piece

    try:
        async for index, tensors in chained():
            new = answers[index].add(tensors)
            for chunk in style.chunks(head, answers[index], new):
                yield f"data: {json.dumps(chunk)}\n\n"
        if include_usage:
            yield f"data: {json.dumps(style.usage_chunk(head, answers))}\n\n"
        yield "data: [DONE]\n\n"
    except FrontError as error:
        yield f"data: {json.dumps(_error_body(error))}\n\n"
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


def main() -> None:
    """Parse the command line and serve."""
    parser = argparse.ArgumentParser(prog="smc-openai-front", description="OpenAI-compatible HTTP over gRPC.")
    parser.add_argument("--grpc", required=True, help="host:port of the Triton Inference Server")
    parser.add_argument("--grpc-ca", help="certificates to trust where that port has TLS, PEM")
    parser.add_argument("--grpc-name", help="name in its certificate")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model-name", required=True)
    parser.add_argument("--api-key-file", help="keys, one a line; without it the API is open")
    parser.add_argument("--cert", help="TLS certificate, PEM")
    parser.add_argument("--key", help="its private key, PEM")
    options = parser.parse_args()
    keys = read_keys(options.api_key_file) if options.api_key_file else ()
    trust = Trust(options.grpc_ca, options.grpc_name) if options.grpc_ca else None
    uvicorn.run(
        create_app(options.grpc, options.model_name, keys, trust),
        host=options.host,
        port=options.port,
        log_level="warning",
        timeout_graceful_shutdown=GRACEFUL_SHUTDOWN_S,
        timeout_keep_alive=KEEP_ALIVE_S,
        ssl_certfile=options.cert,
        ssl_keyfile=options.key,
    )


if __name__ == "__main__":
    main()
