"""The CUDA kernels without a GPU: their source run on the host, and compiled for every target."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

from . import cuda, kernels
from .oracle import LOSSES

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

BUGS = {
    "own row counted": ("if (first + j != i)", "if (true)"),
    "own row counted, a group a tile": ("if (j != i) add_exponential", "add_exponential"),
    "own blocks in cross": ("bool exists = p.sets().exists(a, c);", "bool exists = true;"),
    "the next set's columns": ("row * lds + c * N", "row * lds + (c + 1) % V * N"),
    "ragged columns counted": ("j < count && valid", "j < tile && valid"),
    "one quarter of the columns forgotten": ("exp(largest - top)), 4, shared", "exp(largest - top)), 2, shared"),
    "missing maximum": ("sum = sum * exp(largest - s) + 1", "sum += 1"),
    "rows of another panel": ("if (!again || p.panels() > 1)", "if (!again)"),
    "wrong power of tau": ("double factor = 1 / value_of(c.p.tau);", "double factor = 1;"),
    "missing factor 2": (" + weight(p, back, s, inverse_unit)", ""),
    "swapped positive": ("p.g_pos[at] + p.g_pos[back]", "2 * p.g_pos[at]"),
    "no projection": ("normalize ? dz(d) - z(d) * along", "normalize ? dz(d)"),
    "a part forgotten": ("part < p->parts", "part < 1"),
    "unit forgotten": ("return sum * unit;", "return sum;"),
    "LL: the mate among the negatives": ("c != f.r.a && c != mate", "c != f.r.a"),
    "LL: its gradient forgotten": ("if (gradient && g != 0)", "if (false)"),
    "GL: s and x in one half": ("kind == gl, o.call.tau", "false, o.call.tau"),
    "GL: the gradient of x from s": ("r.v + (r.input == 2 ? call.V : 0)", "r.v"),
    "the temperature's gradient halved": ("(2 * tau * tau)", "(4 * tau * tau)"),
    "missing barrier": ("  __syncthreads();\n  const T* row", "  const T* row"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cuda")
    return cuda.build(folder), folder / "bind.o"


@pytest.fixture(scope="module")
def host(built):
    return cuda.Host(built[0])


def test_the_kernels_agree_with_the_reference(host):
    assert not list(cuda.deviations(host, kernels.DTYPES))


def results(host, inputs):
    leaves = [z.detach().requires_grad_() for z in inputs]
    total = tk.tclr(*leaves, form="release", backend="host").total
    return [total.detach(), *torch.autograd.grad(total, leaves)]


def test_the_order_of_threads_and_blocks_changes_no_bit(host, monkeypatch):
    """Threads between two barriers, upwards or downwards: a difference is a race."""
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    for dtype in torch.float64, torch.float16:
        inputs = [z.to(dtype) for z in LOSSES["tclr"].inputs((33, 3, 20))]
        upwards = results(host, inputs)
        host.executor.run_downwards(True)
        downwards = results(host, inputs)
        host.executor.run_downwards(False)
        assert all(map(torch.equal, upwards, downwards))


def test_the_objective_takes_the_launches_that_its_source_names(host, monkeypatch):
    named = int(re.search(r"objective_launches = (\d+);", (kernels.CSRC / "cuda/objective.cuh").read_text())[1])
    monkeypatch.setitem(backends.BACKENDS, "host", host)
    before = host.executor.launches()
    results(host, LOSSES["tclr"].inputs((40, 4, 128)))
    assert host.executor.launches() - before == named <= 6


def test_sanitizers_find_nothing(tmp_path):
    runtimes = [
        subprocess.run([kernels.compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if "/" not in runtimes[0]:
        pytest.skip("the compiler has no libasan.so")
    library = cuda.build(tmp_path, ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"])
    run = subprocess.run(
        [sys.executable, "-m", "tests.cuda", str(library)],
        env={
            "LD_PRELOAD": ":".join(runtimes),
            "ASAN_OPTIONS": "detect_leaks=0",
            "PYTHONPATH": ".",
            "PATH": "/usr/bin:/bin",
        },
        cwd=kernels.CSRC.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_found(bug, built, tmp_path, host):
    planted = cuda.Host(cuda.build(tmp_path, ["-O0"], [BUGS[bug]], binding=built[1]))
    assert any(cuda.deviations(planted, [torch.float32])), f"the kernels pass with a planted bug: {bug}"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_every_target_compiles_without_a_warning_or_a_spill(tmp_path):
    """The binding too, linked, loaded beside whatever PyTorch is here, and registered under its CUDA key."""
    environment = {**os.environ, "TCLR_KERNELS_CUDA": "1", "NVCC_APPEND_FLAGS": "-Werror all-warnings -Xptxas -v"}
    call = "import setup, sys; from pathlib import Path; setup.cuda(Path(sys.argv[1]), Path(sys.argv[1]))"
    command = [sys.executable, "-c", call, str(tmp_path)]
    built = subprocess.run(command, env=environment, cwd=kernels.CSRC.parent, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", built.stderr)
    print("\n".join(line for line in built.stderr.splitlines() if "Used" in line or "properties" in line))
    assert len(spills) >= 3 * 20 and set(spills) == {("0", "0")}, "kernels for three targets, none of which spills"
    check = (
        "import sys, torch, tclr_kernels._C; torch.ops.load_library(sys.argv[1]);"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key;"
        "names = 'gram_forward', 'gram_backward', 'objective', 'objective_backward';"
        "sys.exit(not all(has(f'tclr_kernels::{name}', 'CUDA') for name in names))"
    )
    command = [sys.executable, "-c", check, str(tmp_path / "_cuda.so")]
    assert subprocess.run(command, cwd=kernels.CSRC.parent).returncode == 0
