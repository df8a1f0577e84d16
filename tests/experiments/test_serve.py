"""The server of the results page."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from http.client import HTTPConnection

import pytest

from experiments.__main__ import main
from experiments.serve import LOOPBACK, ResultsServer
from lawn.errors import RunError
from tests.helpers import ROOT


@contextmanager
def listening(served: ResultsServer):
    """The port of a server that answers in the body."""
    with served.listen(0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            assert server.server_address[0] == LOOPBACK
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def ask(port: int, path: str, host: str | None = None, method: str = "GET") -> tuple[int, str]:
    connection = HTTPConnection(LOOPBACK, port, timeout=10)
    connection.request(method, path, headers={"Host": host or f"localhost:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def served(tmp_path):
    (tmp_path / "results" / "runs").mkdir(parents=True)
    (tmp_path / "secret").write_text("secret")
    made = []

    def page(version: str) -> str:
        made.append(1)
        return f"page {len(made)}"

    return ResultsServer(tmp_path / "results", page, lambda: [{"cell": "A", "done": "1/2"}])


def test_the_page_is_made_again_when_there_are_new_records(served):
    with listening(served) as port:
        assert ask(port, "/") == (200, "page 1")
        assert ask(port, "/index.html?x=1") == (200, "page 1")
        before = json.loads(ask(port, "/status.json")[1])
        assert before["rows"] == [{"cell": "A", "done": "1/2"}]
        (served.results / "runs" / "a.jsonl").write_text("{}")
        assert json.loads(ask(port, "/status.json")[1])["version"] != before["version"]
        assert ask(port, "/") == (200, "page 2")
        assert ask(port, "/runs/a.jsonl") == (200, "{}")


def test_a_file_of_records_is_shown_by_a_browser(served):
    (served.results / "runs" / "a.jsonl").write_text("{}")
    with listening(served) as port:
        connection = HTTPConnection(LOOPBACK, port, timeout=10)
        connection.request("GET", "/runs/a.jsonl", headers={"Host": f"localhost:{port}"})
        assert connection.getresponse().headers["Content-Type"] == "text/plain"


def test_the_page_that_was_written_is_not_served(served):
    """It may be of fewer records."""
    (served.results / "index.html").write_text("written before")
    with listening(served) as port:
        for path in ("/", "//", "/./", "/%69ndex.html", "/runs/../", "/#table4"):
            assert ask(port, path) == (200, "page 1"), path
        connection = HTTPConnection(LOOPBACK, port, timeout=10)
        connection.request("HEAD", "/")
        answer = connection.getresponse()
        assert (answer.status, answer.getheader("Content-Length"), answer.read()) == (200, str(len("page 1")), b"")


def test_a_record_that_is_being_written_is_not_counted(served):
    before = served.version()
    (served.results / "runs" / ".a.jsonl.123.jsonl").write_text("{")
    assert served.version() == before


def test_a_browser_that_goes_away_is_no_error(tmp_path, capsys):
    gone, sent = threading.Event(), threading.Event()

    def page(version: str) -> str:
        gone.wait(10)
        return "x" * 10_000_000

    class Served(ResultsServer):
        def page(self) -> str:
            try:
                return super().page()
            finally:
                sent.set()

    with listening(Served(tmp_path, page, list)) as port:
        connection = HTTPConnection(LOOPBACK, port, timeout=10)
        connection.request("GET", "/")
        connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        gone.set()
        assert sent.wait(10)
        assert ask(port, "/absent")[0] == 404
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("port", ["65536", "-1", "http"])
def test_a_port_that_does_not_exist(port, capsys):
    with pytest.raises(SystemExit):
        main(["serve", f"--port={port}"])
    assert "must be a number up to 65535" in capsys.readouterr().err


def test_nothing_beside_the_results_is_served(served):
    with listening(served) as port:
        for path in ("/../secret", "/%2e%2e/secret", "/runs/../../secret", "//etc/passwd", "/absent", "/%00"):
            status, text = ask(port, path)
            assert status == 404, path
            assert "secret" not in text.replace(path, "")


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_other_names_of_this_machine_are_refused(served, method):
    """A page of another site, whose name leads here, must not read the results."""
    with listening(served) as port:
        for host in ("evil.example", f"evil.example:{port}", f"127.0.0.1.evil.example:{port}", "localhost.evil:80"):
            assert ask(port, "/status.json", host, method)[0] == 403
        for host in ("localhost", f"127.0.0.1:{port}", "localhost:9999"):
            assert ask(port, "/", host)[0] == 200
        assert ask(port, "/", f"LOCALHOST:{port}", method)[0] == 200


def test_a_damaged_record_is_told(tmp_path):
    def fails(*_):
        raise RunError("results/runs/a.json: damaged record")

    with listening(ResultsServer(tmp_path, fails, fails)) as port:
        assert ask(port, "/") == (500, "error: results/runs/a.json: damaged record\n")
        assert json.loads(ask(port, "/status.json")[1])["error"] == "results/runs/a.json: damaged record"


@pytest.mark.slow
def test_the_command_serves_a_checkout_until_it_is_interrupted(tmp_path):
    command = [sys.executable, "-m", "experiments", "serve", "demo", "--port", "0", "--set", f"runs_dir={tmp_path}"]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    ) as process:
        line = process.stdout.readline()
        port = int(line.split(":")[2].partition("/")[0])
        (demo, *_) = json.loads(ask(port, "/status.json")[1])["rows"]
        assert demo["done"] == "3/3"
        connection = HTTPConnection(LOOPBACK, port, timeout=300)
        connection.request("GET", "/", headers={"Host": "localhost"})
        text = connection.getresponse().read().decode()
        version = json.loads(ask(port, "/status.json")[1])["version"]
        assert f'<body data-mode="value" data-version="{version}">' in text
        taken = subprocess.run(
            [*command[:-3], str(port)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
        )
        assert taken.returncode != 0
        assert taken.stderr.startswith(f"error: --port {port}: ")
        assert taken.stderr.count("\n") == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
        assert process.stderr.read() == "ended\n"
