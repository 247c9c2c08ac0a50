"""Processes of pytest-xdist share the device: tests that take much of its memory form a group, run one by one."""

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, the tests of a group run in one process")


@pytest.fixture
def much_memory():
    """Gives the memory that PyTorch keeps back to the device, before and after."""
    torch.cuda.empty_cache()
    yield
    torch.cuda.empty_cache()
