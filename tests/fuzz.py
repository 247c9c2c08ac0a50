"""Compares NT-Xent of random inputs with float64: python -m tests.fuzz --count 3000 --backend native

B is 2 to 16, D 1 to 128, the dtype float32, bfloat16 or float16. The temperature is log-uniform in 1e-3..1, and the
cosine rho of matching rows is in 0..1. 30 % of the inputs are scaled by 1e-18..1e18 (float16: 10^-2.5..10^3). An input
passes if loss and gradients are within TOLERANCE of those of the same rounded rows in float64.
"""

import argparse
import random
import sys
from typing import NamedTuple

import torch

import tclr_kernels as tk

from . import oracle

TOLERANCE = {torch.float32: (1e-4, 1e-3), torch.bfloat16: (5e-2, 0.2), torch.float16: (1e-2, 0.05)}  # loss, gradient


class Draw(NamedTuple):
    seed: int
    dtype: torch.dtype
    B: int
    D: int
    tau: float
    rho: float
    scale: float

    def inputs(self):
        """a, b: [B, D], the two views"""
        return oracle.LOSSES["nt_xent"].inputs((self.B, 1, self.D), self.dtype, self.rho, self.scale, self.seed)


def draw(seed):
    choose = random.Random(seed)
    dtype = choose.choice(list(TOLERANCE))
    powers = (-2.5, 3) if dtype == torch.float16 else (-18, 18)
    scale = 10 ** choose.uniform(*powers) if choose.random() < 0.3 else 1.0
    B, D = choose.randint(2, 16), choose.randint(1, 128)
    return Draw(seed, dtype, B, D, 10 ** choose.uniform(-3, 0), choose.choice([0, choose.random(), 1]), scale)


def passes(case, backend):
    inputs = case.inputs()
    exact = oracle.run(textbook, [x.double() for x in inputs], temperature=case.tau)
    return near(oracle.run(tk.nt_xent, inputs, temperature=case.tau, backend=backend), exact, inputs, case)


def near(found, exact, inputs, case):
    """Whether a loss and its gradients are within TOLERANCE of the exact ones."""
    for_loss, for_gradient = TOLERANCE[case.dtype]
    if not oracle.error(found[0], exact[0]) <= for_loss * max(1, exact[0].abs().item()):
        return False
    largest = max(g.to(case.dtype).double().abs().nan_to_num(posinf=0).max().item() for g in exact[1])
    allowed = for_gradient * largest + torch.finfo(case.dtype).smallest_normal  # smaller numbers have few bits
    if case.D == 1:  # unit rows are +-1 and the exact gradient is 0, so only rounding errors are left
        allowed += for_gradient / case.tau / min(x.double().abs().min().item() for x in inputs)
    return all(oracle.error(f, e.to(case.dtype)) <= allowed for f, e in zip(found[1], exact[1], strict=True))


def textbook(a, b, temperature):
    """NT-Xent in float64; a zero row has similarity 0."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return oracle.nt_xent_eager(a, b, temperature, oracle.without_positive).mean()


def agrees_with_reference(case, backend):
    """Whether case.loss on this backend is near that on the reference in float64."""
    inputs = case.inputs()
    exact = oracle.run(case.loss, [x.double() for x in inputs], backend="reference")
    return near(oracle.run(case.loss, inputs, backend=backend), exact, inputs, case.rows)


def failing(seeds, backend, draw=draw, passes=passes):
    """The random inputs of these seeds that do not pass."""
    return [case for case in map(draw, seeds) if not passes(case, backend)]


def main(about, draw, passes=agrees_with_reference):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds, to go on where a run ended")
    parser.add_argument("--backend", default=None)
    options = parser.parse_args()
    failed = failing(range(options.first, options.first + options.count), options.backend, draw, passes)
    print(*failed, sep="\n", end="\n" if failed else "")
    print(f"{options.backend or 'default'}: {options.count - len(failed)} of {options.count} pass")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(__doc__, draw, passes))
