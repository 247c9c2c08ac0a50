"""The native kernels of the TCLR objective on a GPU. test_gpu.py tests the operation."""

import functools

import pytest
import torch

import tclr_kernels as tk

from ..oracle import LOSSES, same_bits
from .test_gpu import check_replays

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)
if (reason := tk.available_backends("cuda")["native"]) is not None:
    pytest.skip(f"native on cuda: {reason}", allow_module_level=True)


def objective(inputs, tau):
    total = tk.tclr(*inputs, temperature=tau, form="release", backend="native").total
    return total, *torch.autograd.grad(total, (*inputs, tau))


@pytest.fixture
def paper_size():
    inputs = [x.cuda().requires_grad_() for x in LOSSES["tclr"].inputs((40, 4, 128), torch.float32)]
    return inputs, torch.tensor(0.1, device="cuda", requires_grad=True)


def test_the_objective_repeats_its_bits_without_synchronisation(paper_size):
    first = objective(*paper_size)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [objective(*paper_size) for _ in range(20)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for other in again:
        same_bits((other[0], other[1:]), (first[0], first[1:]))


def test_the_objective_takes_six_launches_at_most(paper_size):
    """Six is the limit. `objective_launches` in csrc/cuda/objective.cuh is the number that the kernels take now."""
    inputs, tau = paper_size
    upstream = torch.ones((), device="cuda")
    objective(inputs, tau)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        total = tk.tclr(*inputs, temperature=tau, form="release", backend="native").total
        torch.autograd.grad(total, inputs, upstream)
        torch.cuda.synchronize()
    assert 0 < sum(event.count for event in profile.key_averages() if event.device_time_total > 0) <= 6


def test_the_objective_captured_in_a_graph_replays_the_same_bits(paper_size):
    check_replays(functools.partial(objective, *paper_size), paper_size[1], 0.01)
