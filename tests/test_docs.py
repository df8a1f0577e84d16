import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_readmes_programs_run(number, tmp_path):
    assert len(PROGRAMS) == 2
    variables = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAMS[number]]
    subprocess.run(command, cwd=tmp_path, env=variables, check=True, timeout=120)


def test_links_lead_somewhere():
    for page in (
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "results").glob("*.md"),
    ):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_names_every_member():
    for group in ("dataset", "model", "optim", "loss", "schedule", "diagnostics", "logger", "sweep"):
        row = next(line for line in README.splitlines() if line.startswith(f"| `{group}="))
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", row), f"{group}={path.stem}"


def test_make_help_lists_the_readmes_targets():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"\bmake ([a-z][a-z0-9-]*)", README):
        assert re.search(rf"\bmake .*\b{target}\b", listed), target
