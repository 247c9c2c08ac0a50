"""The general operation on a GPU (rectangles, ranges, labels), and losses that use it."""

import pytest
import torch

import tclr_kernels as tk
from tclr_kernels import general

from ..oracle import DTYPES, run, same_bits
from ..test_general import PROBLEMS, Problem, judge

if not torch.cuda.is_available():
    pytest.skip("no CUDA or HIP device", allow_module_level=True)


class OnGPU(Problem):
    """A problem of test_general.py on the GPU."""

    def sets(self, dtype=torch.float64):
        return tuple([x.cuda() for x in side] for side in super().sets(dtype))

    def call(self, backend, tau, rows, columns):
        keys = [x if x is None else x.cuda() for x in self.keys()]
        return general.rectangle(self.settings(backend), tau, tuple(keys), rows, columns)[:4]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PROBLEMS)
def test_every_problem_meets_the_accuracy_criteria(name, dtype, backend):
    judge(OnGPU(*PROBLEMS[name]), 0.1, dtype, backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tau", [10.0, 0.01])
@pytest.mark.parametrize("name", ["ragged", "keys of sets"])
def test_extreme_temperatures_meet_the_accuracy_criteria(name, tau, dtype, backend):
    judge(OnGPU(*PROBLEMS[name]), tau, dtype, backend)


def queued(a, b, negatives, backend):
    return tk.info_nce(a, b, negatives=negatives, backend=backend)


def labelled(a, b, negatives, backend):
    labels = torch.arange(len(a), device=a.device) % 50
    return tk.info_nce(a, b, labels=labels, negatives=negatives, backend=backend)


def supervised(a, b, negatives, backend):
    labels = torch.arange(len(a), device=a.device).repeat(2) % 50
    return tk.sup_con(torch.cat([a, b]), labels, backend=backend) + 0 * negatives.sum()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", [queued, labelled, supervised])
def test_losses_of_many_rows_agree_with_the_reference_and_repeat_their_bits(loss, dtype, backend):
    generator = torch.Generator("cuda").manual_seed(0)
    inputs = [torch.randn(size, 96, device="cuda", generator=generator).to(dtype) for size in (700, 700, 3000)]
    found = run(loss, inputs, backend=backend)
    wanted = run(loss, [x.double() for x in inputs], backend="reference")
    assert abs(found[0] - wanted[0]) < (1e-5 if dtype == torch.float32 else 1e-3) * max(1, wanted[0])
    for g, w in zip(found[1], wanted[1], strict=True):
        assert not w.any() or torch.cosine_similarity(g.double().flatten(), w.flatten(), dim=0) > 1 - 1e-4
    same_bits(run(loss, inputs, backend=backend), found)
