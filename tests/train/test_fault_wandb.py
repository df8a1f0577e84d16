"""A wandb server that hangs does not keep a run."""

import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import SimpleNamespace

import pytest

from lawn.train import logger, train
from lawn.train.run_directory import RunDirectory
from tests.helpers import ROOT
from tests.train.faults import DIGITS, overrides


@pytest.mark.parametrize("asked", ["init", "log", "finish"])
def test_a_wandb_server_that_hangs(tiny, monkeypatch, capsys, asked):
    import wandb

    hanging = Event()
    answers = dict.fromkeys(("init", "log", "finish"), lambda *_, **__: None)
    answers[asked] = lambda *_, **__: hanging.wait(60)
    stub = SimpleNamespace(log=answers["log"], finish=answers["finish"], summary={})
    monkeypatch.setattr(wandb, "init", lambda **_: answers["init"]() or stub)
    monkeypatch.setattr(logger, "TIMEOUT_SECONDS", 0.2)
    monkeypatch.setattr(logger.WandbLogger, "silent", False)
    assert train(tiny("logger=wandb"))["status"] == "done"
    hanging.set()
    assert capsys.readouterr().out.count("wandb: no answer in 0.2 s; logging to it ends here") == 1


@pytest.mark.slow
def test_a_real_wandb_with_a_server_that_hangs_at_the_end(tiny):
    """A server that answers until files are to be uploaded."""
    config = tiny(*DIGITS)
    asked: list[str] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            query = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode(errors="replace")
            asked.append(self.path)
            if self.path != "/graphql" or "createRunFiles" in query:
                closing.wait(300)
                return
            bucket = {"id": "b", "name": "r", "displayName": "r", "config": "{}", "historyLineCount": 0}
            bucket["project"] = {"id": "p", "name": "lawn", "entity": {"id": "e", "name": "me"}}
            viewer = {"id": "v", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            data = {"upsertBucket": {"bucket": bucket, "inserted": True}, "viewer": viewer, "model": None}
            content = json.dumps({"data": data}).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    closing = Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, daemon=True).start()
    code = "from lawn.train import logger; logger.TIMEOUT_SECONDS = 8; import sys, run; sys.exit(run.main())"
    where = {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": "0" * 40}
    command = [sys.executable, "-c", code, *overrides(config), "logger=wandb"]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=200, env={**os.environ, **where}
        )
    finally:
        closing.set()
        server.shutdown()
        server.server_close()
    assert done.returncode == 0
    assert "wandb: no answer in 8 s; logging to it ends here\ndone after epoch 4" in done.stdout
    assert any(path.endswith("file_stream") for path in asked)
    assert RunDirectory(config).done
