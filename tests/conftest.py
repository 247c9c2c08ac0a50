"""Every test that takes `backend` runs for each that serves the CPU; `kernels`: for each but the reference.

With TRITON_INTERPRET=1 only what concerns the Triton backend runs, at sizes fit for an interpreter.
TCLR_KERNELS_TEST_CUDA=1: the CUDA kernels' source, run on the host, is one of them, and the default.
"""

import collections
import os
import tempfile
from pathlib import Path

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

torch.set_num_threads(1)  # most sizes here are small; more threads have tests of their own
if os.environ.get("TCLR_KERNELS_TEST_CUDA") == "1":
    from . import cuda

    with tempfile.TemporaryDirectory() as folder:
        host = cuda.Host(cuda.build(Path(folder), ["-O2", "-march=native"]))  # fuses multiply and add, as a GPU does
    backends.BACKENDS = {"cuda-on-host": host, **backends.BACKENDS}
BACKENDS = tk.available_backends("cpu")
USABLE = [name for name, reason in BACKENDS.items() if reason is None]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# many operations, 50-100 us each: what test_triton.py has with smaller tiles, and float64's gradcheck; or CPU threads
TOO_LONG = "many blocks, narrow", "is_the_slope", "test_bits_do_not_depend_on_threads", "test_threads_that_set"
WRONG_THERE = ("dtype6-1e-38",)  # bfloat16 below its normal range: the interpreter loses bits of it
if INTERPRETED and BACKENDS["triton"] is None:
    from .interpreted import repair

    repair()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="also run the tests marked full")
    parser.addoption("--sample", type=int, default=1, help="every how many-th set of a test's parameters is taken")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("full")])
        items[:] = [item for item in items if not item.get_closest_marker("full")]
    if not INTERPRETED:
        return
    seen = collections.Counter()

    def fits(item):
        if item.path.name == "test_triton.py":
            return True
        named = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "triton" not in named or any(name in item.nodeid for name in TOO_LONG + WRONG_THERE):
            return False
        seen[item.function] += 1
        return seen[item.function] % config.getoption("sample") == 1 % config.getoption("sample")

    taken = {item: fits(item) for item in items}
    config.hook.pytest_deselected(items=[item for item in items if not taken[item]])
    items[:] = [item for item in items if taken[item]]


def usable(name):
    if (reason := BACKENDS[name]) is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture(params=USABLE)
def backend(request):
    return request.param


@pytest.fixture(params=[name for name in USABLE if name != "reference"])
def kernels(request):
    return request.param


@pytest.fixture
def float64(backend):
    """The backend, where it takes float64."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    try:
        tk.nt_xent(x, x, backend=backend)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        pytest.skip(f"backend {backend}, float64: {error}")
    return backend


@pytest.fixture
def native():
    """The compiled CPU kernels."""
    return usable("native")


def pytest_terminal_summary(terminalreporter):
    for name, reason in BACKENDS.items():
        if reason is not None:
            terminalreporter.write_line(f"not tested: {name} on cpu: {reason}")
