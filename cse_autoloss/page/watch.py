"""Runs in a browser while they go on: their pages over HTTP, on the loopback interface alone.

Other users of the machine reach that interface too, so every request needs the token that is in the
printed address; and only names of this machine are answered, so that no web page can reach it by a
name of its own.
"""

from __future__ import annotations

import hmac
import html
import secrets
import sqlite3
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from cse_autoloss.errors import UserError
from cse_autoloss.journal import Journal
from cse_autoloss.page.page import page
from cse_autoloss.run_folder import unreadable

HOST = "127.0.0.1"

_SIDE_BY_SIDE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>loss searches</title>
<style>body {{ margin: 0; display: grid; height: 100vh; color-scheme: light dark;
grid-template-columns: repeat({columns}, 1fr); }} iframe {{ border: 0; border-right: 1px solid
#8884; width: 100%; height: 100% }}</style>{frames}</html>"""


class WatchServer(ThreadingHTTPServer):
    """Serves the pages of runs.

    Args:
        folders: of the runs.
        port: to listen on; any that is free where 0.

    Attributes:
        url: what to open, the token included.
    """

    daemon_threads = True

    def __init__(self, folders: Sequence[Path], port: int = 0) -> None:
        self.folders = list(folders)
        self.token = secrets.token_urlsafe(24)
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise UserError(f"--port {port}: cannot listen on it: {error}") from error
        self.url = f"http://{HOST}:{self.server_address[1]}/?token={self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away before it had its page is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    def answer(self, path: str) -> str | None:
        """The page at a path, or None: ``/`` is the run's, or all runs' side by side; ``/N`` is run
        N's."""
        place = path.strip("/")
        if not place and len(self.folders) > 1:
            frames = "".join(
                f'<iframe src="/{n}?token={self.token}" title="{html.escape(folder)}"></iframe>'
                for n, folder in enumerate(map(str, self.folders))
            )
            return _SIDE_BY_SIDE.format(columns=len(self.folders), frames=frames)
        if place and not (place.isdecimal() and int(place) < len(self.folders)):
            return None
        journal = Journal.read(self.folders[int(place or 0)])
        try:
            return page(journal, live=True)
        except sqlite3.DatabaseError as error:
            raise unreadable(journal.folder, error) from error
        finally:
            journal.close()


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        token = parse_qs(asked.query).get("token", [""])[0]
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in (HOST, "localhost"):
            self._send(421, "this server answers to 127.0.0.1 and localhost alone")
        elif not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._send(403, "open the address that cse-search watch printed, token included")
        else:
            try:
                text = self.server.answer(asked.path)
            except UserError as error:
                self._send(503, html.escape(str(error)))
                return
            self._send(404, "no such run") if text is None else self._send(200, text)

    def _send(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent: the address with its token stays out of logs."""
