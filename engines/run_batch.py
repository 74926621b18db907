"""A file of requests through one executor: concurrent inside, in the order of the lines outside.

Owns the order and the bookkeeping of `smc-run --input`. Lines are submitted until the executor's queue is full, then as
room appears. A bad line, or a request that fails, gives a line with its error; the others go on. For line 2 of a file:
    {"id": 2, "line": 2, "error": "the line is not JSON, ..."}
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from smc_engines.executor import Executor
from smc_engines.outputs import RequestOutput
from smc_engines.report import to_json
from smc_engines.run_prompt import PromptBuilder, parse_object
from smc_plugin.errors import QueueFullError, SmcError


@dataclass
class BatchFigures:
    """What a file of requests came to: answers finished, lines that failed, and answer tokens."""

    finished: int = 0
    failed: int = 0
    cancelled: int = 0
    tokens: int = 0


@dataclass
class Batch:
    """One run over the lines of a file.

    Args:
        executor: runs the requests.
        prompts: reads the lines.
        defaults: sampling parameters of the command line.
        trace: report every round of each request.
        interrupted: asked between steps; True cancels what runs and submits nothing more.
    """

    executor: Executor
    prompts: PromptBuilder
    defaults: Mapping[str, Any]
    trace: bool = False
    interrupted: Callable[[], bool] = lambda: False
    figures: BatchFigures = field(default_factory=BatchFigures)
    _results: dict[int, dict[str, Any]] = field(default_factory=dict)
    _ids: dict[str, tuple[int, Any]] = field(default_factory=dict)

    def run(self, lines: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Run every line; empty ones are passed over.

        Args:
            lines: JSON text of each.
        Yields:
            one result a line, in the order of the lines, as soon as it and those before it are there.
        """
        numbers = [number for number, line in enumerate(lines, start=1) if line.strip()]
        waiting, due = deque(numbers), deque(numbers)
        while due:
            if self.interrupted():
                waiting.clear()
                for request_id in self._ids:
                    self.executor.cancel(request_id)
            while waiting and self._submit(waiting[0], lines[waiting[0] - 1]):
                waiting.popleft()
            if self.executor.has_work:
                for output in self.executor.step():
                    self._take(output)
            while due and due[0] in self._results:
                yield self._results.pop(due.popleft())
            if not waiting and not self.executor.has_work:
                return  # whatever is still due was never submitted, or has been yielded

    def _submit(self, number: int, line: str) -> bool:
        """Submit a line; False when the queue is full and the line must wait."""
        request_id = f"line-{number}"
        name: Any = number
        try:
            name, prompt, params = self.prompts.from_line(number, line, self.defaults)
            self.executor.submit(request_id, prompt, params)
        except QueueFullError:
            return False
        except SmcError as error:
            self.figures.failed += 1
            self._results[number] = {"id": _name_of(line, name), "line": number, "error": str(error)}
        else:
            self._ids[request_id] = (number, name)
        return True

    def _take(self, output: RequestOutput) -> None:
        if not output.finished or output.request_id not in self._ids:
            return
        number, name = self._ids.pop(output.request_id)
        self._results[number] = {"id": name, "line": number, **to_json(output, trace=self.trace)}
        self.figures.tokens += len(output.token_ids)
        if output.finish_reason == "error":
            self.figures.failed += 1
        elif output.finish_reason == "cancelled":
            self.figures.cancelled += 1
        else:
            self.figures.finished += 1


def _name_of(line: str, fallback: Any) -> Any:
    """The id a refused line names, where it can be read."""
    try:
        return parse_object(line).get("id", fallback)
    except SmcError:
        return fallback
