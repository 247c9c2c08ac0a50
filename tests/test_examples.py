"""The examples run on the CPU, and their loss decreases."""

import contextlib
import io
import json
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples"
NEEDED = {"lightning_module": "lightning", "accelerate_loop": "accelerate"}
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py"))


def losses(printed):
    found = [float(x) for x in re.findall(r"loss (\S+?),?\s", printed)]
    assert len(found) == 4, printed
    return found


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.full) if name == "compiled" else name
        for name in SCRIPTS
        if name != "distributed"
    ],
)
def test_an_example_lowers_its_loss(name):
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    first, *_, last = losses(printed.getvalue())[name == "moco" :]  # MoCo's first negatives are random
    assert last < 0.9 * first


def test_the_example_of_several_processes_lowers_its_loss():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run([*command, FOLDER / "distributed.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, *_, last = losses(done.stdout)
    assert last < 0.5 * first


def test_the_notebook_runs_and_shows_what_it_prints(capsys):
    """The cells run in order, and print the outputs that are stored in the file."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    cells = [c for c in json.loads((FOLDER / "accuracy.ipynb").read_text())["cells"] if c["cell_type"] == "code"]
    names = {}
    for cell in cells:
        exec("".join(cell["source"]), names)
        stored = "".join("".join(out.get("text", "")) for out in cell["outputs"])
        digits = re.compile(r"-?\d[\d.]*(e[-+]\d+)?")  # numbers depend on the machine
        assert digits.sub("#", capsys.readouterr().out) == digits.sub("#", stored)
    assert sum("error(" in "".join(cell["source"]) for cell in cells) >= 3


def test_the_readme_lists_every_example():
    listed = re.findall(r"^\| \[(.*?)\]", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".py", ".ipynb"))
