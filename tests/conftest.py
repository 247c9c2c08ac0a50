"""Fixtures. A test with the argument `backend` runs on each backend that works on the CPU, and a test with the argument
`kernels` on all of them but the reference.

TRITON_INTERPRET=1 runs only the tests of the Triton backend, at small sizes, in Triton's interpreter.
TCLR_KERNELS_TEST_CUDA=1 adds a backend that runs the CUDA kernels on the CPU, and makes it the default.
"""

import collections
import os
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import backends

os.environ["TCLR_INDEX"] = tempfile.mkdtemp(prefix="tclr-index-")  # so that tests do not use the user's cache
torch.set_num_threads(1)  # most problems are small; tests of threads use more
if os.environ.get("TCLR_KERNELS_TEST_CUDA") == "1":
    from . import cuda

    with tempfile.TemporaryDirectory() as folder:
        host = cuda.Host(cuda.build(Path(folder), ["-O2", "-march=native"]))  # with fused multiply-add, as on a GPU
    backends.BACKENDS = {"cuda-on-host": host, **backends.BACKENDS}
BACKENDS = tk.available_backends("cpu")
USABLE = [name for name, reason in BACKENDS.items() if reason is None]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# Tests with these words in their names are not run in Triton's interpreter: they take too many operations of 50-100 us
# (test_triton.py has such tests with smaller tiles), or test the threads of the CPU.
TOO_LONG = "many blocks, narrow", "finite_differences", "test_bits_do_not_depend_on_threads", "own_thread_counts"
WRONG_THERE = ("dtype6-1e-38",)  # denormal bfloat16 numbers, which the interpreter computes less exactly
if INTERPRETED and BACKENDS["triton"] is None:
    from .interpreted import repair

    repair()


def pytest_addoption(parser):
    parser.addoption("--sample", type=int, default=1, help="take every N-th set of parameters of a test")
    parser.addoption("--full", action="store_true", help="also run the slow tests, marked full")
    parser.addoption(
        "--rotation", type=int, default=None, help="number of the sample of cases; by default it depends on the commit"
    )


def rotation_of(config):
    """The number of the sample of cases that runs. It differs after each commit, so that all cases run over time."""
    if (given := config.getoption("rotation")) is not None:
        return given
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return int(head.stdout[:6] or "0", 16) % 1000


def pytest_report_header(config):
    return f"samples: --rotation {rotation_of(config)}"


@pytest.fixture(scope="session")
def rotation(pytestconfig):
    return rotation_of(pytestconfig)


def pytest_collection_modifyitems(config, items):
    first, seen = rotation_of(config), collections.Counter()

    def taken(item, every):
        """Whether a test is in the sample. Of the sets of parameters of each test, the sample has one in `every`."""
        seen[item.function] += 1
        return seen[item.function] % every == first % every

    def short(item):
        rotating = item.get_closest_marker("rotating")
        return item.get_closest_marker("full") is None and (rotating is None or taken(item, *rotating.args))

    def fits(item):
        if item.path.name == "test_triton.py":
            return True
        named = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "triton" not in named or any(name in item.nodeid for name in TOO_LONG + WRONG_THERE):
            return False
        return taken(item, config.getoption("sample"))

    if INTERPRETED:
        keep(config, items, fits)
    seen.clear()
    if not config.getoption("full"):
        keep(config, items, short)


def keep(config, items, fits):
    """Keeps the items that fit and deselects the others."""
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
    """A backend that takes float64."""
    x = torch.zeros(1, 1, dtype=torch.float64)
    try:
        tk.nt_xent(x, x, backend=backend)
    except (NotImplementedError, RuntimeError, TypeError) as error:
        pytest.skip(f"backend {backend}, float64: {error}")
    return backend


@pytest.fixture(scope="session")
def pool():
    """Four processes that act as the ranks of a run."""
    from .ranks import Pool

    with Pool(4) as pool:
        yield pool


@pytest.fixture
def native():
    """The compiled CPU kernels."""
    return usable("native")


SECONDS = collections.Counter()  # test file -> seconds


def pytest_runtest_logreport(report):
    SECONDS[report.nodeid.split("::")[0]] += report.duration


def pytest_terminal_summary(terminalreporter):
    spent = ", ".join(f"{Path(name).stem} {seconds:.0f}" for name, seconds in SECONDS.most_common() if seconds > 1)
    terminalreporter.write_line(f"seconds by file, of all processes together: {spent}")
    for name, reason in BACKENDS.items():
        if reason is not None:
            terminalreporter.write_line(f"not tested: {name} on cpu: {reason}")
