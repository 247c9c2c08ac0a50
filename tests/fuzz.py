"""Random inputs of every kind against float64: python -m tests.fuzz --count 3000 --backend native

B 2-16, D 1-128, fp32/bf16/fp16, tau log-uniform in 1e-3..1, views matched by rho 0..1, 30 % at scales 1e-18..1e18
(fp16: 10^-2.5..10^3). An input survives if loss and gradient are within TOLERANCE of float64 on the same rounded rows.
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


def survives(case, backend):
    inputs = case.inputs()
    exact = oracle.run(textbook, [x.double() for x in inputs], temperature=case.tau)
    return near(oracle.run(tk.nt_xent, inputs, temperature=case.tau, backend=backend), exact, inputs, case)


def near(found, exact, inputs, case):
    """Whether a loss and its gradients are within TOLERANCE of the exact ones."""
    for_loss, for_gradient = TOLERANCE[case.dtype]
    if not oracle.error(found[0], exact[0]) <= for_loss * max(1, exact[0].abs().item()):
        return False
    largest = max(g.to(case.dtype).double().abs().nan_to_num(posinf=0).max().item() for g in exact[1])
    allowed = for_gradient * largest + torch.finfo(case.dtype).smallest_normal  # below it a gradient has few bits
    if case.D == 1:  # rows are +-1 and the gradient is 0: what is left is the rounding of what cancels
        allowed += for_gradient / case.tau / min(x.double().abs().min().item() for x in inputs)
    return all(oracle.error(f, e.to(case.dtype)) <= allowed for f, e in zip(found[1], exact[1], strict=True))


def textbook(a, b, temperature):
    """NT-Xent in float64; a zero row has similarity 0."""
    a, b = (x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300) for x in (a, b))
    return oracle.nt_xent_eager(a, b, temperature, oracle.without_positive).mean()


def lost(seeds, backend, draw=draw, survives=survives):
    """The draws that do not survive."""
    return [case for case in map(draw, seeds) if not survives(case, backend)]


def main(about, draw, survives):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=3000)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds, to go on where a run ended")
    parser.add_argument("--backend", default=None)
    options = parser.parse_args()
    dead = lost(range(options.first, options.first + options.count), options.backend, draw, survives)
    print(*dead, sep="\n", end="\n" if dead else "")
    print(f"{options.backend or 'default'}: {options.count - len(dead)} of {options.count} survive")
    return bool(dead)


if __name__ == "__main__":
    sys.exit(main(__doc__, draw, survives))
