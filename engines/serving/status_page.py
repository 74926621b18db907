"""The status page: one HTML file and the executor's report as JSON, read-only.

GET /             the page
GET /status.json  the report with every live request
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from smc_engines.serving.control import ControlLine

PAGE = Path(__file__).with_name("status.html")
ANSWER_TIMEOUT_S = 5.0


class StatusPage:
    """Serves the page in a thread of its own.

    Args:
        control: where reports come from.
    """

    def __init__(self, host: str, port: int, control: ControlLine) -> None:
        page = PAGE.read_bytes()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    self._send(200, "text/html; charset=utf-8", page)
                elif self.path == "/status.json":
                    report = control.ask(ANSWER_TIMEOUT_S, detail=True)
                    body = json.dumps(report if report is not None else {"down": True}).encode()
                    self._send(200 if report is not None else 503, "application/json", body)
                else:
                    self._send(404, "text/plain", b"not found\n")

            def _send(self, status: int, kind: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """A page that asks twice a second is not worth a log line."""

        self._server = ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, name="status-page", daemon=True).start()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
