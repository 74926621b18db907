"""What the fuzzer feeds, and the rule: whatever comes in, the only exceptions are the project's own errors.

A target is a function of bytes. The bytes are decisions, not contents: which value of a sound file to change, and into what, so
that a coverage-guided fuzzer gets past the first brace. b"" changes nothing. `Targets.outcomes` counts what was accepted and
where the rest was refused, which shows that a target gets deep.

    Choices(b"\\x05\\x02").pick(4) is 1, then pick(3) is 2, then every pick is 0
"""

from __future__ import annotations

import copy
import io
import json
import math
import struct
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zmq
from distill.tiny import write_tiny_target
from pydantic import ValidationError

from smc_build.builder import BuildOptions, build_engine
from smc_build.checkpoint import Checkpoint, read_config
from smc_build.engine_dir import load_manifest, load_weights
from smc_build.tokenizer_files import check_fits_vocabulary, fingerprint
from smc_engines.config import ExecutorConfig
from smc_engines.engine import Engine
from smc_engines.executor import Executor
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving.openai_schema import ChatRequest, CompletionRequest, FrontError
from smc_engines.serving.service import ExecutorService
from smc_engines.serving.triton_client import make_inputs
from smc_engines.text import Detokenizer, Tokenizer
from smc_plugin.errors import SmcError

# isort: split
import contextlib

from smc_adapter import protocol
from smc_adapter.contracts import CONTRACTS, Contract
from smc_adapter.fields import InputError

# what a service or a command line turns into a message; anything else is a bug
ALLOWED = (SmcError, InputError, protocol.ProtocolError, FrontError, ValidationError)
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3, 16, 255, 2**31, 2**63, 2**64, -(2**70), 10**400, 0.5, -0.0, 1e308, 1e-320),
    *(float("nan"), float("inf"), -float("inf")),
    *("", "a", "x" * 3000, "\ud800", "\0", "../../etc/passwd", "/etc/passwd", "nan", "1", "é", "{{ 1/0 }}", "{% for"),
    *(
        [],
        {},
        [[]],
        [None],
        [0],
        [-1],
        [2**40],
        {"a": {}},
        [1, "a"],
        [[1], [2]],
        "F64",
        "BOOL",
        "llama3",
        "qwen3",
        "llama",
    ),
)

SOUND_PARAMS: dict[str, Any] = {
    "mode": "smc",
    "num_particles": 2,
    "num_draft_tokens": 0,
    "ess_threshold": 0.5,
    "temperature": 0.7,
    "top_k": 4,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 3,
    "max_tokens": 4,
    "min_tokens": 1,
    "stop": ["a", "bc"],
    "stop_token_ids": [1],
    "ignore_eos": True,
    "select": "argmax",
    "return_particles": True,
    "draft_temperature": 0.5,
    "logprobs": True,
    "cache_prompt": True,
    "power_alpha": 2.0,
}
SUBMIT: dict[str, Any] = {
    "v": protocol.VERSION,
    "op": "submit",
    "id": "a",
    "params": SOUND_PARAMS,
    "prompt": {"ids": [1, 2]},
    "stop_sequences": [[5, 6]],
    "priority": 0,
    "timeout_ms": 60_000,
    "tag": "t",
}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
MESSAGES: tuple[dict[str, Any], ...] = (
    SUBMIT,
    {**SUBMIT, "id": "b", "prompt": {"text": "hello"}},
    {**SUBMIT, "id": "c", "prompt": CHAT},
    {"op": "cancel", "id": "a"},
    {"op": "probe", "id": "p"},
    {"op": "stats", "detail": True},
    {"op": "refused", "tag": "t", "code": "INVALID_ARG"},
    {"op": "hello", "model": "smc", "pid": 1},
)
NUMPY_TYPES: dict[str, Any] = {
    "INT32": np.int32,
    "INT64": np.int64,
    "UINT64": np.uint64,
    "UINT8": np.uint8,
    "FP32": np.float32,
    "FP16": np.float16,
    "BOOL": np.bool_,
    "STRING": object,
}


class Choices:
    """Decisions read off some bytes."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def pick(self, count: int) -> int:
        """A number below count; 0 once the bytes are used up."""
        width = 1 if count <= 256 else 2
        taken = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(taken, "big") % count if taken else 0


def mutate(value: Any, choices: Choices) -> Any:
    """A JSON value with a few of its parts changed, removed, added or swapped."""
    value = copy.deepcopy(value)
    for _ in range(choices.pick(6)):
        places = list(_places(value))
        if not places:
            return _odd(choices)
        holder, key = places[choices.pick(len(places))]
        action = choices.pick(6)
        if action == 0:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[("new", "", "../x", "__class__", str(key) + " ")[choices.pick(5)]] = _odd(choices)
        elif action == 2:
            other, name = places[choices.pick(len(places))]
            holder[key] = copy.deepcopy(other[name])
        elif action == 3 and isinstance(holder[key], (int, float)) and not isinstance(holder[key], bool):
            holder[key] = holder[key] * (1, -1, 2, 0, 1000003)[choices.pick(5)] + choices.pick(3) - 1
        else:
            holder[key] = _odd(choices)
    return value


def _odd(choices: Choices) -> Any:
    return copy.deepcopy(ODD[choices.pick(len(ODD))])  # a later change must not change it


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value."""
    if isinstance(value, dict):
        for key, entry in list(value.items()):
            yield value, key
            yield from _places(entry)
    elif isinstance(value, list):
        for index, entry in enumerate(value[:40]):
            yield value, index
            yield from _places(entry)


def _dump(value: Any) -> str:
    return json.dumps(value)


def _place(error: BaseException) -> str:
    """Where an error was raised."""
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return f"{error.title} {'.'.join(map(str, first['loc'][:1]))} {first['type']}"
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _other_tensors(header: dict[str, Any], choices: Choices) -> bytes:
    """A sound safetensors file whose tensors have other names, types and shapes than those of a header."""
    names = {name: entry for name, entry in header.items() if name != "__metadata__"}
    changed, table, size = mutate(names, choices), {}, 0
    for name, entry in changed.items() if isinstance(changed, dict) else ():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        shape = entry.get("shape") if isinstance(entry, dict) else None
        width = {"F32": 4, "BF16": 2, "F64": 8, "BOOL": 1, "I32": 4, "F8_E4M3": 1}.get(str(dtype))
        if (
            width is None
            or not isinstance(shape, list)
            or not all(type(dim) is int and 0 <= dim < 5000 for dim in shape)
        ):
            continue
        nbytes = width * math.prod(shape)
        if nbytes < 2**22:
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [size, size + nbytes]}
            size += nbytes
    text = json.dumps(table, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(size)


class NotAtRestError(Exception):
    """The executor service did not come to rest."""


class Targets:
    """All targets over one tiny checkpoint and one tiny engine directory, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._checkpoint, self.engine = folder / "target", folder / "engine"
        self._checkpoint.mkdir()
        write_tiny_target(self._checkpoint)
        build_engine(
            BuildOptions(
                str(self._checkpoint), output=self.engine, draft="none", particles=2, groups=1, dtype="float32"
            )
        )
        self._config = json.loads((self._checkpoint / "config.json").read_text())
        self._tokenizer = json.loads((self._checkpoint / "tokenizer.json").read_text())
        self._manifest = json.loads((self.engine / "manifest.json").read_text())
        files = {"target": {"entry": {"8": "target/config.json"}}}
        self._manifest["plans"] = {"compiler": "tensorrt-rtx", "version": "1", "gpu": "portable", "files": files}
        self._weights = (self._checkpoint / "model.safetensors").read_bytes()
        self._shard_path = self.engine / "target" / "weights" / "rank0.safetensors"
        self._shard = self._shard_path.read_bytes()
        self.sound = Engine.from_dir(self.engine, ExecutorConfig(device="cpu", num_pages=40, verify=False))
        self._executor = Executor(self.sound)
        self._wire = zmq.Context()
        self._bound, self._adapter = self._wire.socket(zmq.ROUTER), self._wire.socket(zmq.DEALER)
        self._bound.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._bound.bind("inproc://executor")
        self._adapter.connect("inproc://executor")
        self.outcomes: Counter[str] = Counter()

    @property
    def all(self) -> dict[str, Callable[[bytes], None]]:
        """Targets by name."""
        names = (
            "config",
            "checkpoint",
            "manifest",
            "engine_weights",
            "tokenizer",
            "parameters",
            "contract",
            "message",
            "service",
            "openai",
        )
        return {name: getattr(self, name) for name in names}

    @contextlib.contextmanager
    def _judged(self) -> Iterator[None]:
        """Let the project's own errors pass, and count."""
        try:
            yield
        except ALLOWED as error:
            self.outcomes[_place(error)] += 1
        else:
            self.outcomes["accepted"] += 1

    def config(self, data: bytes) -> None:
        """config.json and generation_config.json of a checkpoint."""
        choices = Choices(data)
        folder = self._checkpoint
        (folder / "config.json").write_text(_dump(mutate(self._config, choices)))
        generation = folder / "generation_config.json"
        if choices.pick(2):
            generation.write_text(_dump(mutate({"eos_token_id": [1, 2]}, choices)))
        try:
            with self._judged():
                read_config(folder)
        finally:
            generation.unlink(missing_ok=True)
            (folder / "config.json").write_text(_dump(self._config))

    def checkpoint(self, data: bytes) -> None:
        """A safetensors file whose header, length or data is wrong."""
        self._damaged(data, self._weights, self._checkpoint / "model.safetensors", self._open_checkpoint)

    def _open_checkpoint(self) -> None:
        with Checkpoint(self._checkpoint) as checkpoint:
            for _name, tensor in checkpoint.tensors("float32"):
                tensor.sum()

    def engine_weights(self, data: bytes) -> None:
        """The same for a shard of an engine directory, whose manifest has the damaged file's size."""
        manifest = self.engine / "manifest.json"

        def read() -> None:
            listed = copy.deepcopy(self._manifest)
            listed["files"]["target/weights/rank0.safetensors"]["bytes"] = self._shard_path.stat().st_size
            manifest.write_text(_dump(listed))
            load_weights(self.engine, "target")

        try:
            self._damaged(data, self._shard, self._shard_path, read)
        finally:
            manifest.write_text(_dump(self._manifest))

    def _damaged(self, data: bytes, sound: bytes, path: Path, read: Callable[[], object]) -> None:
        choices = Choices(data)
        length = struct.unpack("<Q", sound[:8])[0]
        header, body = json.loads(sound[8 : 8 + length]), sound[8 + length :]
        if choices.pick(2):
            path.write_bytes(_other_tensors(header, choices))
        else:
            text = json.dumps(mutate(header, choices), separators=(",", ":")).encode().ljust(length)
            lies = (0, 1, 2**63, len(text) + 7, 100_000_001)
            claimed = lies[choices.pick(5)] if choices.pick(4) == 3 else len(text)
            if choices.pick(4) == 3:
                body = body[: choices.pick(65536) % (len(body) + 1)]
            path.write_bytes(struct.pack("<Q", claimed) + text + body)
        try:
            with self._judged():
                read()
        finally:
            path.write_bytes(sound)

    def manifest(self, data: bytes) -> None:
        """manifest.json of an engine directory, as far as a loaded engine."""
        choices = Choices(data)
        path = self.engine / "manifest.json"
        path.write_text(_dump(mutate(self._manifest, choices)))
        try:
            with self._judged():
                load_manifest(self.engine, verify=bool(choices.pick(2)))
                Engine.from_dir(self.engine, ExecutorConfig(device="cpu", num_pages=20, verify=False))
        finally:
            path.write_text(_dump(self._manifest))

    def tokenizer(self, data: bytes) -> None:
        """tokenizer.json and tokenizer_config.json, used for text in and out."""
        choices = Choices(data)
        folder = self._checkpoint
        (folder / "tokenizer.json").write_text(_dump(mutate(self._tokenizer, choices)))
        plain = {
            "bos_token": "<|im_start|>",
            "eos_token": {"content": "<|im_end|>"},
            "chat_template": "{{ messages[0].content }}",
        }
        (folder / "tokenizer_config.json").write_text(_dump(mutate(plain, choices)))
        if choices.pick(8) == 7:
            (folder / "chat_template.jinja").write_bytes(data)
        try:
            with self._judged():
                fingerprint(folder)
                check_fits_vocabulary(folder, 259)
                tokenizer = Tokenizer.load(folder)
                ids = tokenizer.encode("a é \ud83d" if choices.pick(9) == 8 else "a é")
                Detokenizer(tokenizer).push(ids)
                if tokenizer.has_chat_template:
                    tokenizer.apply_chat_template([{"role": "user", "content": "hi"}])
        finally:
            (folder / "tokenizer_config.json").unlink()
            (folder / "chat_template.jinja").unlink(missing_ok=True)
            (folder / "tokenizer.json").write_text(_dump(self._tokenizer))

    def parameters(self, data: bytes) -> None:
        """Sampling parameters and prompt, as far as the executor's plan of the request."""
        asked = mutate({"params": SOUND_PARAMS, "prompt": [1, 2, 3]}, Choices(data))
        if not isinstance(asked, dict) or not isinstance(asked.get("params"), dict):
            return
        prompt = asked.get("prompt")
        with self._judged():
            params = SamplingParams.from_mapping(asked["params"])
            self.sound.plan(prompt if isinstance(prompt, list) else [1], params)

    def contract(self, data: bytes) -> None:
        """Input tensors and request parameters of every model, as far as the executor's plan of each answer."""
        choices = Choices(data)
        contract = CONTRACTS[sorted(CONTRACTS)[choices.pick(len(CONTRACTS))]]
        arrays = {"text_input": np.array([[b"hi"]], object), "max_tokens": np.ones((1, 1), np.int32)}
        if "request_output_len" in contract.inputs:
            arrays = {"input_ids": np.ones((1, 2), np.int32), "input_lengths": np.full((1, 1), 2, np.int32)}
            arrays["request_output_len"] = np.ones((1, 1), np.int32)
        for _ in range(choices.pick(6)):
            name = [*contract.inputs, "made_up"][choices.pick(len(contract.inputs) + 1)]
            arrays[name] = self._tensor(contract, name, choices)
        parameters = mutate({"smc_priority": 1, "smc_timeout_ms": 5}, choices)
        with self._judged():
            parsed = contract.parse(arrays, parameters if isinstance(parameters, dict) else {}, [])
            for sub in parsed.subs:
                params = SamplingParams.from_mapping(sub.params)
                self.sound.plan(sub.prompt.get("ids", [1]), params)

    @staticmethod
    def _tensor(contract: Contract, name: str, choices: Choices) -> np.ndarray:
        """A tensor for an input, mostly of the right type and shape."""
        entry = contract.inputs.get(name)
        dtype: Any = (np.int32, np.int64, np.float32, np.bool_, np.uint64, object)[choices.pick(6)]
        shape = tuple((1, 2, 0, 3, 65)[choices.pick(5)] for _ in range((2, 2, 1, 3)[choices.pick(4)]))
        if entry is not None and choices.pick(4):
            dtype = NUMPY_TYPES[entry.dtype]
            shape = (1, *(max(dim, 1 + choices.pick(3)) if dim < 0 else dim for dim in entry.dims))
        texts = (b"hi", b"\xff", b"", b'[{"role": "user", "content": "hi"}]', b"[[[[", b"target", b"argmax", "x")
        text, number = texts[choices.pick(8)], (1, 0, -1, 7, 2**31 - 1, np.nan, np.inf, 0.5)[choices.pick(8)]
        with np.errstate(all="ignore"):
            return np.full(shape, text, object) if dtype is object else np.full(shape, number).astype(dtype)

    def message(self, data: bytes) -> None:
        """Frames between adapter and executor: first as they are, then damaged JSON."""
        frames = [data, _dump(mutate(SUBMIT, Choices(data))).encode(), b"[" * min(len(data) * 50, 100_000)]
        for frame in frames:
            with self._judged():
                protocol.decode(frame)

    def service(self, data: bytes) -> None:
        """Well-formed messages with odd contents, to a real executor service, which must go on and lose no page."""
        choices, messages = Choices(data), []
        for _ in range(1 + choices.pick(3)):
            sound = MESSAGES[choices.pick(len(MESSAGES))]
            changed = mutate(sound, choices)
            messages.append({**(changed if isinstance(changed, dict) else sound), "op": sound["op"]})
        self.exchange(messages, turns=1 + choices.pick(4))

    def exchange(self, messages: Iterable[dict[str, Any]], turns: int) -> None:
        """Send messages to a new service, let it work for some turns, cancel what is left and see that nothing is."""
        service = ExecutorService(self._executor, self._bound)
        for message in ({"op": "hello", "model": "smc", "pid": 1}, *messages):
            self._adapter.send(_dump({**message, "v": protocol.VERSION}).encode())
        with contextlib.redirect_stderr(io.StringIO()):
            service.turn()
            for _ in range(turns - 1):
                if self._executor.has_work:
                    service.turn()
            for request_id in list(self._executor.scheduler.requests):
                self._executor.cancel(request_id)
            while self._executor.has_work:
                service.turn()
        self._executor.check_integrity()
        if self._executor.stats.pages_promised:
            raise NotAtRestError("a request that is gone holds pages")
        self._read_answers()

    def _read_answers(self) -> None:
        while self._adapter.poll(0):
            for message in protocol.decode(self._adapter.recv())["messages"]:
                error = message.get("error") or {}
                self.outcomes[f"{message['op']} {error.get('code', message.get('finish', ''))}".strip()] += 1

    def openai(self, data: bytes) -> None:
        """Bodies of the OpenAI front, as far as the tensors that it sends."""
        choices = Choices(data)
        shared = {"model": "m", "max_tokens": 3, "temperature": 0.5, "n": 2, "seed": 1, "stop": ["a"], "stream": True}
        shared |= {
            "stream_options": {"include_usage": True},
            "num_particles": 2,
            "presence_penalty": 0,
            "logit_bias": {},
        }
        chat = {**shared, "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "logprobs": True}
        kinds = (
            (CompletionRequest, {**shared, "prompt": ["hi", "ho"], "logprobs": 0, "echo": True}),
            (ChatRequest, chat),
        )
        kind, sound = kinds[choices.pick(2)]
        with self._judged():
            body = kind.model_validate(mutate(sound, choices))
            body.check()
            for prompt in body.prompts():
                make_inputs("smc", {**body.inputs(), **prompt})


def make_targets() -> Targets:
    """Targets in a temporary folder, which lives as long as the process."""
    torch.set_num_threads(1)
    memory = Path("/dev/shm")  # files there are quick to write, and there are two of them a case
    folder = tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
    targets = Targets(Path(folder.name))
    targets.folder = folder  # type: ignore[attr-defined] (keeps it)
    return targets
