"""Every test that takes `backend` runs for each backend of the CPU; `kernels`: for each but the reference.

With TRITON_INTERPRET=1 only what concerns the Triton backend runs, at sizes fit for an interpreter.
"""

import os

import pytest
import torch

import tclr_kernels as tk

torch.set_num_threads(1)  # most sizes here are small; more threads have tests of their own
BACKENDS = tk.available_backends("cpu")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# too many operations, for regimes of the tiling that other sizes reach: 50-100 us each, of any size
TOO_LONG = "many blocks, narrow", "test_bits_do_not_depend_on_threads"


def pytest_collection_modifyitems(config, items):
    if not INTERPRETED:
        return

    def fits(item):
        named = item.callspec.params.values() if hasattr(item, "callspec") else ()
        ours = item.path.name == "test_triton.py" or "triton" in named
        return ours and not any(name in item.nodeid for name in TOO_LONG)

    left_out = [item for item in items if not fits(item)]
    items[:] = [item for item in items if fits(item)]
    config.hook.pytest_deselected(items=left_out)


def usable(name):
    if (reason := BACKENDS[name]) is not None:
        pytest.skip(f"backend {name}: {reason}")
    return name


@pytest.fixture(params=BACKENDS)
def backend(request):
    return usable(request.param)


@pytest.fixture(params=[name for name in BACKENDS if name != "reference"])
def kernels(request):
    return usable(request.param)


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
