# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors
"""A browser, and a server that sends the built pages as static hosts do: text compressed with gzip."""

from __future__ import annotations

import functools
import gzip
import os
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from built import HTML

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
# Nothing that the browser does by itself may look like a request of a page.
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--no-first-run"]  # fmt: skip


def find_chromium() -> str | None:
    """The system's Chromium: the variable CHROMIUM, else the first of NAMES on the path."""
    return os.environ.get("CHROMIUM") or next((path for n in NAMES if (path := shutil.which(n))), None)


class Static(SimpleHTTPRequestHandler):
    """Files of a folder; text goes out compressed."""

    protocol_version = "HTTP/1.1"
    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".woff2": "font/woff2",
        ".woff": "font/woff",
    }

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        body, kind = path.read_bytes(), self.guess_type(path)
        text = kind.startswith("text/") or kind.endswith(("javascript", "json", "svg+xml"))
        self.send_response(200)
        self.send_header("Content-Type", kind)
        if text:
            body = gzip.compress(body, 6)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture(scope="session")
def html() -> Path:
    if not HTML.is_dir():
        pytest.skip("the pages are not built: run `make book`")
    return HTML


@pytest.fixture(scope="session")
def origin(html: Path) -> Iterator[str]:
    """http://127.0.0.1:port/, where the built pages are served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Static, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


@pytest.fixture(scope="session")
def browser(html: Path):
    api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: run `make test-browser`"
    )
    executable = find_chromium()
    if executable is None:
        pytest.skip(f"no Chromium: install one of {', '.join(NAMES)}, or name it in CHROMIUM")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        yield chromium
        chromium.close()
