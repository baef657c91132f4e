"""A run in a browser while it trains: a page that this machine serves to itself alone."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

from advkd.deploy.page import POLICY, base_style, environment
from advkd.report.charts import DARK, LIGHT, chart, panels_of

REFRESH_SECONDS = 10
HOST = "127.0.0.1"  # a run's pictures are nobody else's business


@dataclass(frozen=True)
class Live:
    """A run as it is now.

    state: where it stands, in a sentence. metrics: the entries of metrics.jsonl. preview: the bytes
    of preview.png, if there is one. report: those of report.html, once the run is finished.
    """

    name: str
    state: str
    metrics: Sequence[Mapping[str, Any]]
    preview: bytes | None = None
    report: bytes | None = None

    @property
    def finished(self) -> bool:
        """Whether nothing more will change."""
        return self.report is not None


def live_page(run: Live) -> str:
    """The page of a run, whole in itself, which loads itself anew until the run is finished."""
    charts = [
        (_data_url(chart([panel], LIGHT)), _data_url(chart([panel], DARK)))
        for panel in panels_of(run.metrics)
    ]
    return environment(Path(__file__).parent).get_template("live.html.j2").render(
        run=run,
        preview=None if run.preview is None else _data_url(run.preview),
        charts=charts,
        seconds=REFRESH_SECONDS,
        policy=POLICY,
        style=base_style(),
    )  # fmt: skip


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


class LiveServer(HTTPServer):
    """Serves the page of a run at `address`; `now` says, for each request, how the run is.

    One request at a time, since charts are drawn by a library that is not made for several.
    """

    def __init__(self, port: int, now: Callable[[], Live]):
        """`port` 0 takes any that is free. OSError where it is taken."""
        super().__init__((HOST, port), _Handler)
        self.now = now
        self.address = f"http://{HOST}:{self.server_port}/"


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing of requests."""

    def do_GET(self) -> None:
        """The page, or the report of a finished run."""
        try:
            run = self.server.now()
            if self.path == "/":
                content: bytes | None = live_page(run).encode("utf-8", "backslashreplace")
            else:
                content = run.report if self.path == "/report.html" else None
        except (RuntimeError, ValueError, OSError) as error:  # a file that is broken, or being made
            self.send_error(HTTPStatus.INTERNAL_SERVER_ERROR, explain=str(error))
            return
        if content is None:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)
