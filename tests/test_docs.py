import re
import subprocess

import pytest

from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()


PROGRAMS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore")
def test_the_readmes_programs_run(number, tmp_path, monkeypatch):
    assert len(PROGRAMS) == 2
    monkeypatch.chdir(tmp_path)
    exec(compile(PROGRAMS[number], "README.md", "exec"), {"__name__": "__main__"})


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


def test_the_tests_that_the_docs_name_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for page in (ROOT / "docs").glob("*.md"):
        name = None
        for file, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", page.read_text()):
            name = file or name
            assert f"def {test}(" in files[name], f"{page.name}: {name}::{test}"
