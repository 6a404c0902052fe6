"""The README's and the notebooks' code runs, and the commands answer what the README says."""

import json
import re
import shlex
from pathlib import Path

import matplotlib
import matplotlib.pyplot
import pytest
import torch

from dpfunc import cli

README = Path(__file__).parents[1] / "README.md"
DOCS = README.parent / "docs"
pytestmark = pytest.mark.skipif(not README.exists(), reason="runs from the source tree")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(), re.DOTALL)


@pytest.mark.uses_global_generator  # torch.rand and nn's own initialisation
def test_the_code_runs_from_top_to_bottom(capsys, fresh_compiler, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace = {}
    assert len(blocks("python")) >= 4
    for block in blocks("python"):
        exec(compile(block, str(README), "exec"), namespace)
    assert "differential privacy" in capsys.readouterr().out


def test_the_commands_answer_what_the_readme_says(capsys):
    asked = 0
    for block in blocks("console"):
        for command, answer in re.findall(r"\$ dpfunc (.*)\n(.*)", block):
            if "run/log.jsonl" in command:
                continue
            assert cli.main(shlex.split(command)) == 0
            assert capsys.readouterr().out.strip() == answer
            asked += 1
    assert asked == 2


def test_the_two_commands_are_those_of_the_dev_script():
    commands = re.findall(r"^\$ (\./dev \w+)$", README.read_text(), re.MULTILINE)
    assert commands == ["./dev train", "./dev test"]
    assert "exec ./dev test" in (README.parent / ".ci" / "run").read_text()


@pytest.mark.uses_global_generator  # nn's own initialisation
@pytest.mark.parametrize(
    "path", sorted(README.parent.glob("notebooks/*.ipynb")), ids=lambda p: p.name
)
def test_notebooks_hold_no_output_and_run(path):
    matplotlib.use("Agg")
    namespace = {}
    cells = json.loads(path.read_text())["cells"]
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == []
            exec(compile("".join(cell["source"]), str(path), "exec"), namespace)
    matplotlib.pyplot.close("all")


@pytest.mark.parametrize("page", sorted(DOCS.glob("*.md")), ids=lambda path: path.name)
def test_every_test_that_a_page_names_is_there(page):
    known = {
        name
        for path in Path(__file__).parent.glob("test_*.py")
        for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= known
    assert named or page.name not in ("guarantees.md", "opacus.md")
