"""The Triton kernels, compiled ahead of time for GPUs in processes without TRITON_INTERPRET."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPILE = """
from benchmarks.compile_triton import SELECTED, too_large, rows
made = list(rows(SELECTED, ["sm_90"]))
assert len({row["kernel"] for row in made}) == KERNELS, {row["kernel"] for row in made}
wrong = [(too_large(row), row) for row in made if too_large(row)]
assert not wrong, wrong
"""
AHEAD = """
from benchmarks.compile_triton import GRADIENTS, TRIED, read, rows, too_large
made = list(rows(GRADIENTS, ["sm_90"], "gradient"))
wrong = [(too_large(row), row) for row in made if too_large(row)]
assert not wrong, wrong
# With two stages, some fetch nothing ahead. Their tiles were the fastest of those tried.
waiting = [row for row in made if not row["ahead"]]
tried = {tuple(int(row[name]) for name in ("D", "BM", "BN", "warps", "stages")) for row in read(TRIED)}
unknown = [row for row in waiting if tuple(row[x] for x in ("DP", "BM", "BN", "warps", "stages")) not in tried]
assert not unknown, unknown
assert len(waiting) < len(made) / 3, (len(waiting), len(made))
"""


def test_the_triton_page_shows_the_committed_rows():
    pytest.importorskip("triton")
    code = "from benchmarks import compile_triton as c; assert c.PAGE.read_text() == c.page(c.read(c.RESULTS))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_importing_tclr_kernels_does_not_import_triton():
    code = "import sys, torch; n = set(sys.modules); import tclr_kernels; sys.exit('triton' in set(sys.modules) - n)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    "cases, kernels",
    [
        ("SELECTED", 9),
        pytest.param("CASES", 11, marks=pytest.mark.full),
        pytest.param("RECTANGLES", 9, marks=pytest.mark.full),
    ],
)
def test_the_kernels_selected_for_sm_90_compile_without_spills(cases, kernels):
    pytest.importorskip("triton")
    compile_all(COMPILE.replace("SELECTED", cases).replace("KERNELS", str(kernels)))


def test_gradients_fetch_the_next_columns_while_they_compute():
    """Those of half precision and TF32 with at most 256 features."""
    pytest.importorskip("triton")
    compile_all(AHEAD)


def compile_all(code):
    """Runs the code in a process whose kernels are compiled, not interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    status = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert status.returncode == 0, status.stderr[-2000:]
