"""The status page in a real browser."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest

from tests.serving.service import Service

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="needs Chromium: apt-get install chromium (CI does)"
)
def test_page_shows_live_requests(service: Service, tmp_path: Path) -> None:
    stop = threading.Event()

    def keep_busy(max_tokens: int) -> None:
        values = {
            "text_input": "hello",
            "max_tokens": max_tokens,
            "stream": True,
            "num_particles": 4,
            "ignore_eos": True,
        }
        while not stop.is_set():
            for _ in service.stream("smc", values, request_id="seen-on-the-page"):
                if stop.is_set():
                    break

    # several of unlike lengths, so that the page is never looked at in a pause that all of them make
    workers = [threading.Thread(target=keep_busy, args=(length,)) for length in (450, 390, 330)]
    for worker in workers:
        worker.start()
    try:
        service.wait(lambda: any(view["particles"] for view in service.status()["live"]), 20, "a request decodes")
        assert CHROMIUM is not None
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
        command += ["--virtual-time-budget=2500", "--dump-dom", service.url("status", "/")]
        page = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    finally:
        stop.set()
        for worker in workers:
            worker.join(30)
    assert int(re.search(r'data-reports="(\d+)"', page).group(1)) >= 1  # type: ignore[union-attr]
    assert "seen-on-the-page" in page
    assert page.count('class="particle"') >= 4
    assert re.search(r"ESS \d+\.\d\d of 4", page)
    assert "KV pages in use" in page
    assert "tokens per second" in page
    assert re.search(r"\d+ resamples in \d+ rounds", page)
    assert re.search(r"\d+ of at most (450|390|330) tokens settled", page)
    service.idle()
