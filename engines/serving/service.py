"""The executor's end of the line: commands from adapters in, settled text out, between the executor's steps.

One thread owns the executor and the ROUTER socket. Each turn of the loop reads what came, ends what is overdue, steps once,
and sends what can be sent without waiting:

    submit "smc-71-1"  ->  output "smc-71-1" {"text": "Pa"}  ->  output {"text": "ris.", "finish": "stop", "info": {...}}

A client that is gone has its requests cancelled at the next message to it (at the latest at the next report, in a second).
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import Any

import zmq
from smc_adapter import protocol

from smc_engines.executor import Executor
from smc_engines.outputs import RequestInfo, RequestOutput
from smc_engines.sampling_params import SamplingParams
from smc_engines.serving import live_view
from smc_engines.serving.live_view import Tally
from smc_engines.serving.logs import Log
from smc_engines.serving.outbox import Outbox
from smc_plugin.errors import NumericalError, QueueFullError, RequestError, SmcError

REPORT_S = 1.0
IDLE_POLL_MS = 200
GOODBYE_S = 5.0
PROBE_PRIORITY = -(2**40)
MAX_LOST = 64
MAX_TOKEN_CHARACTERS = 128  # the longest tokens of real vocabularies are runs of as many spaces


@dataclass
class _Served:
    """A request of a client, or a probe."""

    identity: bytes
    tag: str
    params: SamplingParams
    deadline: float | None
    timeout_ms: int | None
    overdue: bool = False
    cut_off: bool = False  # a drain's time was over before its end
    probe: bool = False


@dataclass
class _Client:
    """An adapter: the model that it serves, and its process."""

    model: str = "?"
    pid: int = 0


class ExecutorService:
    """Serves one executor on one socket.

    Args:
        socket: a bound ROUTER socket with ROUTER_MANDATORY set.
        name: of the engine, as reports show it.
        show_text: the detailed report includes texts.
        drain_s: how long running requests may go on once a drain begins, in seconds.
    """

    def __init__(
        self, executor: Executor, socket: zmq.Socket, name: str = "", show_text: bool = False, drain_s: float = 30.0
    ) -> None:
        self._executor = executor
        self._socket = socket
        self._outbox = Outbox(socket)
        self._name, self._show_text, self._drain_s = name, show_text, drain_s
        self._clients: dict[bytes, _Client] = {}
        self._parted: set[bytes] = set()
        self._lost: dict[int, int] = {}
        self._served: dict[str, _Served] = {}
        self._ended: list[tuple[_Served, RequestOutput]] = []
        self._waiting_probes: list[tuple[bytes, str]] = []
        self._tally = Tally()
        self._log = Log("executor")
        self._started = time.time()
        self._next_report = time.monotonic() + REPORT_S
        self._last_report = (time.monotonic(), 0)
        self._tokens_per_second = 0.0
        self._probe_tokens = 0
        self._turns = 0
        self._drain_until: float | None = None

    def drain(self) -> None:
        """Refuse new requests, let running ones finish, then leave `run`. Safe in a signal handler."""
        if self._drain_until is None:
            self._drain_until = time.monotonic() + self._drain_s

    def run(self) -> None:
        """Serve until a drain is done."""
        while not self._drained():
            self.turn()
        self._part()

    def _part(self) -> None:
        """Wait until every client has said that it read its last message, so that none sees the line end before its answer."""
        unread = {identity for identity, client in self._clients.items() if client.pid}
        for identity in unread:
            self._outbox.put(identity, {"op": "goodbye"})
        limit = time.monotonic() + GOODBYE_S
        while time.monotonic() < limit:
            self._flush()
            if not (unread & self._clients.keys()) - self._parted:  # those that are still there and have not answered
                break
            self._receive(IDLE_POLL_MS)

    def turn(self) -> None:
        """One turn: commands, deadlines, a step, messages."""
        self._receive(0 if self._executor.has_work else IDLE_POLL_MS)
        self._expire()
        if self._executor.has_work:
            for output in self._executor.step():
                self._publish(output)
            self._answer_probes()
            self._flush()  # what only observes comes after the answers are on their way
            self._note_ends()
        self._turns += 1
        if time.monotonic() >= self._next_report:
            self._report()
        self._flush()

    def _drained(self) -> bool:
        if self._drain_until is None:
            return False
        late = time.monotonic() >= self._drain_until
        if late:
            for request_id, served in self._served.items():
                served.cut_off = True
                self._executor.cancel(request_id)
        return not self._executor.has_work and (self._outbox.empty or late)

    def _receive(self, timeout_ms: int) -> None:
        if timeout_ms and not self._socket.poll(timeout_ms):
            return
        while int(self._socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
            identity, frame = self._socket.recv_multipart()
            self._clients.setdefault(identity, _Client())
            try:
                message = protocol.decode(frame)
                handler = getattr(self, f"_on_{message['op']}", None)
                if handler is None:
                    raise protocol.ProtocolError(f"unknown operation {message['op']!r}: use one release on both sides")
                handler(identity, message)
            except Exception as error:  # one message that nobody thought of must not end the others' service
                self._log.error("bad_message", client=self._clients[identity].model, error=repr(error))

    def _on_hello(self, identity: bytes, message: dict[str, Any]) -> None:
        self._clients[identity] = _Client(message["model"], message["pid"])
        engine = self._executor.engine
        self._outbox.put(identity, {"op": "hello", "page_size": engine.page_size, "engine": self._name})
        self._log.info("client", model=message["model"], pid=message["pid"])

    def _on_submit(self, identity: bytes, message: dict[str, Any]) -> None:
        request_id = message["id"]
        try:
            if self._drain_until is not None:
                raise QueueFullError("the service is shutting down, expected it to stay: try again on another instance")
            params, prompt = self._read(message)
            timeout_ms = message.get("timeout_ms")
            deadline = None if timeout_ms is None else time.monotonic() + timeout_ms / 1e3
            self._executor.submit(request_id, prompt, params, message.get("priority", 0))
        except Exception as error:
            text = str(error)
            if isinstance(error, QueueFullError):
                code = protocol.UNAVAILABLE
            elif isinstance(error, RequestError):
                code = protocol.INVALID_ARG
            else:
                code = protocol.INTERNAL
            if not isinstance(error, SmcError):  # a request that nobody thought of must not end the others' service
                text = f"the request failed unexpectedly, expected it to be queued, got {type(error).__name__}: report this"
            self._tally.counts["refused"] += 1
            kind = type(error).__name__  # the message may quote the prompt, which no log shows
            self._log.info("refused", id=request_id, tag=message.get("tag"), code=code, error=kind)
            self._send_error(identity, request_id, code, text)
            return
        self._served[request_id] = _Served(identity, message.get("tag", ""), params, deadline, timeout_ms)
        self._tally.counts["requests"] += 1
        self._log.info("accepted", id=request_id, tag=message.get("tag"), model=self._clients[identity].model)

    def _read(self, message: dict[str, Any]) -> tuple[SamplingParams, str | list[int]]:
        """Parameters and prompt of a submit message."""
        tokenizer, given = self._executor.engine.tokenizer, dict(message["params"])
        for sequence in message.get("stop_sequences", ()):
            if tokenizer is None:
                raise RequestError(
                    "stop words of several tokens need a tokenizer, the engine has none: use single tokens"
                )
            given["stop"] = [*given.get("stop", ()), tokenizer.decode(sequence)]
        prompt = message["prompt"]
        params = SamplingParams.from_mapping(given)
        if "ids" in prompt:
            return params, prompt["ids"]
        if tokenizer is not None:
            self._check_size(prompt["text"] if "text" in prompt else json.dumps(prompt["messages"], ensure_ascii=False))
        if "text" in prompt:
            return params, prompt["text"]
        if tokenizer is None:
            raise RequestError("messages need a tokenizer, the engine directory has none: send token ids")
        return params, tokenizer.apply_chat_template(prompt["messages"])[1]

    def _check_size(self, text: str) -> None:
        """Refuse what cannot fit before it is encoded: seconds of work on one prompt would stop everybody's streams."""
        most = self._executor.engine.limits.max_seq_len * MAX_TOKEN_CHARACTERS
        if len(text) > most:
            raise RequestError(
                f"the prompt has {len(text)} characters, expected at most {most}, far more than "
                f"{self._executor.engine.limits.max_seq_len} tokens hold: shorten it"
            )

    def _on_refused(self, identity: bytes, message: dict[str, Any]) -> None:
        self._tally.counts["refused"] += 1
        self._log.info("refused", tag=message["tag"], code=message["code"], model=self._clients[identity].model)

    def _on_cancel(self, identity: bytes, message: dict[str, Any]) -> None:
        if message["id"] in self._served:
            self._executor.cancel(message["id"])

    def _on_probe(self, identity: bytes, message: dict[str, Any]) -> None:
        """Answer once real inference has happened: a token of its own when idle, else the next step's."""
        if not self._executor.has_work and self._drain_until is None:
            params = SamplingParams(mode="target", max_tokens=1, ignore_eos=True, seed=0, cache_prompt=False)
            self._executor.submit(message["id"], [0], params, PROBE_PRIORITY)
            self._served[message["id"]] = _Served(identity, "probe", params, None, None, probe=True)
        else:
            self._waiting_probes.append((identity, message["id"]))

    def _answer_probes(self) -> None:
        for identity, probe_id in self._waiting_probes:
            self._outbox.put(identity, {"op": "probed", "id": probe_id})
        self._waiting_probes.clear()

    def _on_stats(self, identity: bytes, message: dict[str, Any]) -> None:
        detail = {"live": self._requests()} if message.get("detail") else {}
        self._outbox.put(identity, {"op": "stats", **self._stats(), **detail})

    def _on_goodbye(self, identity: bytes, message: dict[str, Any]) -> None:
        self._parted.add(identity)

    def _on_drain(self, identity: bytes, message: dict[str, Any]) -> None:
        self.drain()
        self._outbox.put(identity, {"op": "draining"})

    def _requests(self) -> list[dict[str, Any]]:
        views = live_view.requests(self._executor, self._show_text)
        for view in views:
            served = self._served.get(view["id"])
            if served is not None:
                client = self._clients.get(served.identity, _Client())
                view |= {"tag": served.tag, "model": "watchdog" if served.probe else client.model}
        return views

    def _stats(self) -> dict[str, Any]:
        self._tally.catch_up(self._executor.scheduler.running)
        live: dict[bytes, int] = {}
        for served in self._served.values():
            live[served.identity] = live.get(served.identity, 0) + 1
        known = [(identity, client) for identity, client in self._clients.items() if client.pid]
        clients = [{"model": c.model, "pid": c.pid, "live": live.get(identity, 0)} for identity, c in known]
        return {
            **live_view.summary(self._executor),
            **self._tally.counts,
            "tokens": self._answer_tokens,
            "turns": self._turns,
            "ess_mean": self._tally.ess_mean,
            "tokens_per_second": self._tokens_per_second,
            "started": self._started,
            "uptime_s": time.time() - self._started,
            "engine": self._name,
            "draining": self._drain_until is not None,
            "num_clients": len(clients),
            "clients": clients,
            "lost_clients": {str(pid): count for pid, count in self._lost.items()},
        }

    @property
    def _answer_tokens(self) -> int:
        """Tokens of real answers: an idle service that only probes itself makes none."""
        return self._executor.stats.tokens - self._probe_tokens

    def _report(self) -> None:
        now, tokens = time.monotonic(), self._answer_tokens
        earlier, before = self._last_report
        self._tokens_per_second = (tokens - before) / (now - earlier)
        self._last_report, self._next_report = (now, tokens), now + REPORT_S
        self._tally.catch_up(self._executor.scheduler.running)
        self._tally.close_report()
        stats = self._stats()
        for identity, client in self._clients.items():
            if client.pid:
                self._outbox.put(identity, {"op": "stats", **stats})

    def _expire(self) -> None:
        now = time.monotonic()
        for request_id, served in self._served.items():
            if served.deadline is not None and now >= served.deadline and not served.overdue:
                served.overdue = True
                self._executor.cancel(request_id)

    def _publish(self, output: RequestOutput) -> None:
        served = self._served.get(output.request_id)
        if served is None:
            return
        if served.probe:
            self._probe_tokens += len(output.new_token_ids)
        if not output.finished:
            self._put_output(served, output, {})
            return
        del self._served[output.request_id]
        self._ended.append((served, output))
        if served.probe:
            self._outbox.put(served.identity, {"op": "probed", "id": output.request_id})
            return
        if output.error is not None:
            self._tally.counts["failed"] += 1
            code = protocol.INTERNAL if isinstance(output.error, NumericalError) else protocol.INVALID_ARG
            self._send_error(served.identity, output.request_id, code, str(output.error))
        elif served.overdue:
            self._tally.counts["failed"] += 1
            message = (
                f"the request's deadline passed, expected an end within {served.timeout_ms} ms, got "
                f"{len(output.token_ids)} tokens: raise the timeout or lower max_tokens"
            )
            self._send_error(served.identity, output.request_id, protocol.DEADLINE, message)
        elif served.cut_off and output.finish_reason == "cancelled":
            self._tally.counts["failed"] += 1
            message = (
                f"the service shut down, expected an end within --drain {self._drain_s:g} s, got {len(output.token_ids)} "
                "tokens: try again on another instance"
            )
            self._send_error(served.identity, output.request_id, protocol.UNAVAILABLE, message)
        else:
            self._tally.counts["cancelled"] += output.finish_reason == "cancelled"
            self._put_output(served, output, {"finish": output.finish_reason, "info": self._info(served, output)})

    def _put_output(self, served: _Served, output: RequestOutput, end: dict[str, Any]) -> None:
        new = {"op": "output", "id": output.request_id, "ids": output.new_token_ids, "text": output.new_text, **end}
        self._outbox.put(served.identity, new)

    def _info(self, served: _Served, output: RequestOutput) -> dict[str, Any]:
        info = output.info
        assert info is not None
        params, engine = served.params, self._executor.engine
        k = params.num_draft_tokens if params.num_draft_tokens is not None else engine.limits.max_draft_tokens
        figures = {name: getattr(info, name) for name in _FIGURES}
        figures |= {"mode": params.mode, "num_draft_tokens": k, "stop_reason": self._stop_reason(served, output)}
        if params.logprobs:
            figures["token_logprobs"] = info.token_logprobs
            figures["token_bytes"] = self._token_bytes(output)
        if params.return_particles:
            figures["particles"] = [{"text": p.text, "log_weight": p.log_weight} for p in info.particles]
        return figures

    def _token_bytes(self, output: RequestOutput) -> list[str]:
        tokenizer = self._executor.engine.tokenizer
        if tokenizer is None:
            return []
        known = tokenizer.token_bytes(self._executor.engine.limits.vocab_size)
        return [known[token].hex() for token in output.token_ids]

    def _stop_reason(self, served: _Served, output: RequestOutput) -> str:
        """The stop string or stop token id that ended the answer; nothing for the model's own end token."""
        if output.finish_reason != "stop" or not output.token_ids:
            return ""
        if output.token_ids[-1] in served.params.stop_token_ids:
            return str(output.token_ids[-1])
        tokenizer = self._executor.engine.tokenizer
        if not served.params.stop or tokenizer is None:
            return ""
        text = tokenizer.decode(output.token_ids)
        found = [(text.find(stop), stop) for stop in served.params.stop if stop in text]
        return min(found)[1] if found else ""

    def _send_error(self, identity: bytes, request_id: str, code: str, message: str) -> None:
        error = {"code": code, "message": message}
        self._outbox.put(
            identity, {"op": "output", "id": request_id, "ids": [], "text": "", "finish": "error", "error": error}
        )

    def _note_ends(self) -> None:
        for served, output in self._ended:
            self._tally.end(output)
            if served.probe:
                continue
            info: RequestInfo | None = output.info
            figures = {name: getattr(info, name) for name in _LOGGED} if info is not None else {}
            reason = "deadline" if served.overdue else output.finish_reason
            self._log.info("finished", id=output.request_id, tag=served.tag, reason=reason, **figures)
        self._ended.clear()

    def _flush(self) -> None:
        for identity in self._outbox.flush():
            client = self._clients.pop(identity, _Client())
            lost = [request_id for request_id, served in self._served.items() if served.identity == identity]
            for request_id in lost:
                self._executor.cancel(request_id)
            if client.pid:
                self._lost[client.pid] = len(lost)
                while len(self._lost) > MAX_LOST:
                    del self._lost[next(iter(self._lost))]
                self._log.info("client_gone", model=client.model, pid=client.pid, requests=len(lost))


_FIGURES = (
    "prompt_tokens",
    "cached_tokens",
    "output_tokens",
    "rounds",
    "resamples",
    "recoveries",
    "accepted_tokens",
    "log_evidence",
    "log_evidence_sd",
    "final_ess",
    "fell_back",
    "discarded_rounds",
    "ess",
    "seed",
    "queue_ms",
    "first_token_ms",
    "total_ms",
)
_LOGGED = ("prompt_tokens", "output_tokens", "rounds", "resamples", "queue_ms", "first_token_ms", "total_ms")
