"""The one table of cases: each stands for a regime."""

from typing import NamedTuple

import torch

TAU = 0.1


class Case(NamedTuple):
    """A loss at a size, forward and backward for all its inputs."""

    loss: str
    rows: int  # M of the Gram matrix
    shapes: tuple  # of the inputs
    regime: str
    dtype: torch.dtype = torch.float32
    mode: str = "forward+backward"

    @property
    def key(self):
        return f"{self.loss}:{self.rows}"

    @property
    def shape(self):
        """The inputs' shapes as text: "512x128 512x128"."""
        return " ".join("x".join(map(str, shape)) for shape in self.shapes)

    def inputs(self):
        """Leaves that require grad, the same on every run; those of one shape share a part, as views of a video do."""
        return [_view(i, shape).to(self.dtype).requires_grad_() for i, shape in enumerate(self.shapes)]


def _view(i, shape):
    common = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return common + torch.randn(shape, generator=torch.Generator().manual_seed(i + 1))


def nt_xent(rows, regime):
    return Case("nt_xent", rows, ((rows // 2, 128),) * 2, regime)


def tclr_release(B, regime):
    return Case("tclr_release", 8 * B, ((2, B, 128), (2, B, 4, 128), (2, B, 4, 128)), regime)


CASES = [
    nt_xent(80, "TCLR's own batch of 40: overheads"),
    nt_xent(512, "the Gram matrix fits the caches"),
    nt_xent(1024, "the crossover: products against passes over memory"),
    nt_xent(2048, "the Gram matrix leaves the caches"),
    nt_xent(8192, "several copies of 268 MB in plain PyTorch"),
    nt_xent(32768, "a copy is 4.3 GB"),
    nt_xent(131072, "a copy is 69 GB"),
    tclr_release(40, "the recipe's batch: every term of the objective"),
]
BY_KEY = {case.key: case for case in CASES}
WARM_UP = {case.loss: case for case in (nt_xent(16, "warm-up"), tclr_release(2, "warm-up"))}
