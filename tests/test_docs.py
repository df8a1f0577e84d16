import re
import subprocess

import pytest

from experiments.selection import EXPERIMENTS, SIMULATIONS
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
HARNESS = (ROOT / "docs" / "harness.md").read_text()
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["README.md", pytest.param("docs/harness.md", marks=pytest.mark.slow)])
def test_the_program_of_a_page_runs(page, tmp_path, monkeypatch):
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(program, page, "exec"), {})


def test_the_readme_is_short():
    """What is written by hand; the findings grow with the records."""
    written = re.sub(r"<!-- (findings|summary-table \w+) -->.*?<!-- end -->", "", README, flags=re.DOTALL)
    assert len(written.encode()) <= 6000
    assert len(README.encode()) <= 10_000


def test_links_lead_somewhere():
    for page in (*GUIDES, *(ROOT / "results").rglob("*.md")):
        for target in re.findall(r"\]\((?!http)([^)#\s]+)[^)#]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_harness_page_names_every_member():
    for group in ("dataset", "model", "optim", "loss", "schedule", "diagnostics", "logger", "sweep"):
        row = next(line for line in HARNESS.splitlines() if line.startswith(f"| `{group}="))
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            assert re.search(rf"\b{path.stem}\b", row), f"{group}={path.stem}"


def test_make_help_lists_the_targets_of_the_pages():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for page in GUIDES:
        for target in re.findall(r"(?:^|`)make ([a-z][a-z0-9_-]*)", page.read_text(), flags=re.MULTILINE):
            assert re.search(rf"\bmake .*\b{target}\b", listed), f"{page.name}: {target}"


def test_make_has_a_target_for_every_experiment():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {*EXPERIMENTS, *SIMULATIONS} <= set(listed.split())


def test_the_tests_that_the_docs_name_exist():
    files = {path.name: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for page in (ROOT / "docs").glob("*.md"):
        name = ""
        for file, test in re.findall(r"`(test_\w+\.py)?::(test_\w+)`", page.read_text()):
            name = file or name
            assert f"def {test}(" in files[name], f"{page.name}: {name}::{test}"
