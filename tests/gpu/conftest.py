"""All processes of pytest-xdist share the GPU. Tests that need much of its memory form a group that runs one by one."""

import pytest
import torch

import tclr_kernels as tk


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, the tests of a group run in one process")


@pytest.fixture(params=["triton", "native"])
def backend(request):
    if (reason := tk.available_backends("cuda")[request.param]) is not None:
        pytest.skip(f"{request.param} on cuda: {reason}")
    return request.param


@pytest.fixture
def much_memory():
    """Frees the memory that PyTorch has cached on the GPU, before and after a test."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()
