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
halves = [row for row in made if row["kernel"] == "gradient_kernel" and "bfloat16" in row["case"]]
waiting = [row for row in halves if 64 <= row["DP"] <= 256 and not row["ahead"]]
# On an H100, such kernels without prefetching took 819 us with two stages and 1,030 us with three, which need too many
# registers.
assert all((row["DP"], row["stages"]) == (128, 2) for row in waiting), waiting
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
        pytest.param("CASES", 9, marks=pytest.mark.full),
        pytest.param("RECTANGLES", 9, marks=pytest.mark.full),
    ],
)
def test_the_kernels_selected_for_sm_90_compile_without_spills(cases, kernels):
    pytest.importorskip("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", COMPILE.replace("SELECTED", cases).replace("KERNELS", str(kernels))]
    status = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert status.returncode == 0, status.stderr[-2000:]
