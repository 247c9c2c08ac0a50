"""Every test that takes `backend` runs for each backend of the CPU; `kernels`: for each but the reference.

TCLR_KERNELS_TEST_CUDA=1: the CUDA kernels' source, run on the host, is one of them, and the default.
"""

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
        host = cuda.Host(cuda.build(Path(folder)))
    backends.BACKENDS = {"cuda-on-host": host, **backends.BACKENDS}
BACKENDS = tk.available_backends("cpu")


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
