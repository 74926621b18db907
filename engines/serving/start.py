"""The start of a served engine: wait until everything answers, and start again what does not.

    executor       its process lives, and is found on its line within --start-timeout
    tritonserver   its process and its stubs live, and it has loaded its models within SERVER_START_S
    OpenAI front   its process lives, and it answers within SERVER_START_S
    then           each model answers a real inference

A part that was killed or shows nothing in its time is started again, while the others go on loading. RESTARTS such restarts
may be made in all; one more is an error. A part that ended by itself (a damaged engine directory, no memory, a port in
use) has said why and would end again, so that is an error at once.
"""

from __future__ import annotations

import math
import time
from typing import Protocol

from smc_engines.serving.control import ControlLine
from smc_engines.serving.logs import Log
from smc_engines.serving.part import Part
from smc_engines.serving.process import killed_members
from smc_engines.serving.tritonserver import MODELS
from smc_plugin.errors import SmcError

RESTARTS = 2
SERVER_START_S = 60.0
PROBE_S = 5.0
TURNS_OF_A_PROBE = 4  # turns of the executor within which it has surely answered a probe that reached it
# A server that ends kills stubs too, but waits for them at once (0.04 s); those of others stay zombies for 0.8 s or for ever.
OWN_KILL_S = 0.3
KILLED_BY_SIGNAL = 128  # mpirun's status when a signal ended a rank is more than this, by the signal's number


class Parts(Protocol):
    """What a start needs of the supervisor."""

    executor: Part
    server: Part
    front: Part
    control: ControlLine

    @property
    def parts(self) -> list[Part]:
        """Those that were launched."""
        ...

    def answers(self, part: Part) -> bool:
        """Whether a part is there."""
        ...

    def probe_model(self, model: str, timeout_s: float) -> str | None:
        """None if a model answers a real inference, else what is wrong."""
        ...

    def replace(self, part: Part) -> None:
        """Kill a part and start it again."""
        ...


class Start:
    """One start, of parts that have been launched.

    Args:
        supervisor: whose parts they are.
        start_timeout_s, hang_timeout_s: see ServeOptions.
    """

    def __init__(self, supervisor: Parts, start_timeout_s: float, hang_timeout_s: float) -> None:
        self._of = supervisor
        self._start_timeout_s, self._hang_timeout_s = start_timeout_s, hang_timeout_s
        self._log = Log("supervisor")
        self._restarts = 0
        self._killed: dict[int, float] = {}
        self._expect_models()

    def _expect_models(self) -> None:
        self._models = list(MODELS)
        self._probing_since = math.inf
        self._unanswered = 0

    def look(self) -> bool:
        """Look at every part once, start again what is dead or silent, and probe the next model.

        Returns:
            whether everything has answered.
        Raises:
            SmcError: a part ended by itself, or there are no restarts left.
        """
        for part in self._of.parts:
            wrong = self._wrong(part)
            if wrong is not None:
                self._start_again(part, wrong)
                return False
            part.answered = part.answered or self._of.answers(part)
        if all(part.answered for part in self._of.parts):
            self._probe_next()
        return not self._models

    def _wrong(self, part: Part) -> str | None:
        """What is wrong with a part, or None."""
        if part.process is None:
            return None
        status = part.process.poll()
        killed = status is not None and not 0 <= status <= KILLED_BY_SIGNAL
        if not killed and part is self._of.server and self._lost_stub(part.process.pid):
            return "lost a stub to a signal while starting"
        if status is not None and not killed:
            raise SmcError(
                f"{part.name} ended with status {status} while starting, expected it to serve: see its messages above"
            )
        return f"ended with status {status} while starting" if killed else self._silent(part)

    def _lost_stub(self, server: int) -> bool:
        """Whether something killed a stub: its server would wait for it for ever, or end as if its model were to blame."""
        now = time.monotonic()
        self._killed = {pid: self._killed.get(pid, now) for pid in killed_members(server)}
        return any(now - seen > OWN_KILL_S for seen in self._killed.values())

    def _silent(self, part: Part) -> str | None:
        """What a part that lives has not said in time, or None."""
        now = time.monotonic()
        age_s, limit_s = now - part.starts[-1], self._limit_s(part)
        if not part.answered and age_s > limit_s:
            return f"did not answer within {limit_s:g} s"
        silence_s = min(self._of.control.silence_s, age_s)
        if part is self._of.executor and silence_s > self._hang_timeout_s:
            return f"said nothing for {silence_s:.0f} s"
        late = self._unanswered > 1 or now - self._probing_since > self._start_timeout_s
        return f"did not answer for {self._models[0]}" if part is self._of.server and late else None

    def _limit_s(self, part: Part) -> float:
        """How long a part may take until it answers: only the executor has much to load."""
        limit_s = self._start_timeout_s
        return limit_s if part is self._of.executor else min(limit_s, SERVER_START_S)

    def _start_again(self, part: Part, wrong: str) -> None:
        if self._restarts == RESTARTS:
            raise SmcError(
                f"{part.name} {wrong}, expected a start with at most {RESTARTS} restarts: see the messages above, free memory "
                "and processors, or raise --start-timeout"
            )
        self._restarts += 1
        self._log.error("restart", name=part.name, reason=wrong, restarts_left=RESTARTS - self._restarts)
        self._of.replace(part)
        self._expect_models()

    def _probe_next(self) -> None:
        """Probe a model. One that stays silent while the executor takes turns is counted against tritonserver."""
        started = time.monotonic()
        self._probing_since = min(self._probing_since, started)
        if self._of.probe_model(self._models[0], PROBE_S) is None:
            self._models.pop(0)
            self._unanswered = 0
        elif self._of.control.turns_since(started) >= TURNS_OF_A_PROBE:
            self._unanswered += 1
