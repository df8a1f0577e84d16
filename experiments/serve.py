"""A server of the results page on this machine alone, with the state of runs while they are trained."""

import json
import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

from lawn.errors import UserError

LOOPBACK = "127.0.0.1"
HOSTS = (LOOPBACK, "localhost")  # as a browser on this machine, or at the other end of a tunnel, calls it
RECORDS = ("runs/[!.]*.jsonl", "tuning/[!.]*.jsonl", "simulations/[!.]*.json")  # those that are written now are hidden


class ResultsServer:
    """What is served: the page, made again when there are new records, the state of the runs, and the files of results.

    Args:
        results: folder of the records.
        page: makes the page's HTML, of the version of the records that it is given.
        status: rows with the state of the runs of each cell.
    """

    def __init__(self, results: Path, page: Callable[[str], str], status: Callable[[], list[dict[str, Any]]]) -> None:
        self.results = results
        self._make_page = page
        self._make_status = status
        self._making_page, self._making_status = threading.Lock(), threading.Lock()
        self._page: tuple[str, str] | None = None  # the version of the records and the page of them

    def version(self) -> str:
        """A text that changes with the records."""
        states = [path.stat() for pattern in RECORDS for path in self.results.glob(pattern)]
        return f"{len(states)}-{sum(s.st_size for s in states)}-{max((s.st_mtime_ns for s in states), default=0)}"

    def page(self) -> str:
        with self._making_page:
            version = self.version()
            if self._page is None or self._page[0] != version:
                self._page = version, self._make_page(version)
            return self._page[1]

    def status(self) -> str:
        """As JSON; with the reason where the records cannot be read."""
        answer: dict[str, Any] = {"rows": []}
        try:
            with self._making_status:
                answer["rows"] = self._make_status()
            answer["version"] = self.version()
        except (UserError, OSError) as error:
            answer["error"] = str(error)
        return json.dumps(answer)

    def listen(self, port: int) -> ThreadingHTTPServer:
        """An HTTP server on the loopback interface; port 0: a free one. Raises UserError if the port is taken."""
        try:
            return _Server((LOOPBACK, port), partial(_Handler, served=self, directory=str(self.results)))
        except OSError as error:
            raise UserError(f"--port {port}: {error.strerror}; choose another, or 0 for any that is free") from error


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing for a browser that has gone before it got the answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(SimpleHTTPRequestHandler):
    extensions_map = {**SimpleHTTPRequestHandler.extensions_map, ".jsonl": "text/plain"}  # shown instead of saved

    def __init__(self, *args: Any, served: ResultsServer, **kwargs: Any) -> None:
        self._served = served
        super().__init__(*args, **kwargs)

    def send_head(self) -> BytesIO | BinaryIO | None:
        """Sends the head and returns the body, which GET sends and HEAD does not."""
        if not self._from_here():
            return None
        path, results = self.translate_path(self.path), self._served.results
        if "\0" in path:
            self.send_error(HTTPStatus.NOT_FOUND)
            return None
        if Path(path) in (results, results / "index.html"):
            return self._made(self._served.page, "text/html; charset=utf-8")
        if Path(path) == results / "status.json":
            return self._made(self._served.status, "application/json")
        return super().send_head()

    def _from_here(self) -> bool:
        """Refuses pages of other sites whose name leads to this machine (DNS rebinding)."""
        host = self.headers.get("Host", "").lower()
        if host in HOSTS or host.rpartition(":")[0] in HOSTS:
            return True
        self.send_error(HTTPStatus.FORBIDDEN, f"only as {' or '.join(HOSTS)}")
        return False

    def _made(self, make: Callable[[], str], kind: str) -> BytesIO:
        try:
            status, body = HTTPStatus.OK, make().encode()
        except (UserError, OSError) as error:
            status, body, kind = HTTPStatus.INTERNAL_SERVER_ERROR, f"error: {error}\n".encode(), "text/plain"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        return BytesIO(body)

    def log_message(self, *args: Any) -> None:
        """Nothing: the page asks every few seconds."""
