import os
import subprocess
import sys
from pathlib import Path

from experiments.spec import compose_all
from lawn.config import Config

ROOT = Path(__file__).resolve().parents[1]


def compose(*overrides: str) -> Config:
    return compose_all([overrides])[0]


def run(*arguments: str, script: str = "run.py", **environment: str) -> subprocess.CompletedProcess[str]:
    """The real command in its own process."""
    command = [sys.executable, str(ROOT / script), *arguments]
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables, timeout=300)


def write_ratings(path: Path, rows: list[tuple[int, int, int, int]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def synthetic_ratings(users: int = 30, items: int = 150, each: int = 12) -> list[tuple[int, int, int, int]]:
    """Every user likes items near its own number; in the form of MovieLens-100k's u.data."""
    rows = []
    for user in range(1, users + 1):
        for k in range(each):
            rows.append((user, (3 * user + 7 * k * k) % items + 1, 1 + k % 5, 880_000_000 + 100 * k + user % 7))
    rows += [(1, item, 3, 870_000_000) for item in range(1, items + 1) if item % 3 == 0]
    return list({(u, i): (u, i, r, t) for u, i, r, t in rows}.values())
