"""The table of benchmark cases. Each case says why it is there: which kind of problem it stands for."""

from typing import NamedTuple

import torch


class Case(NamedTuple):
    """A loss and its inputs."""

    loss: str
    rows: int  # of the Gram matrix, or of all Gram matrices together
    shapes: tuple  # of the inputs
    regime: str  # what the case stands for
    dtype: torch.dtype = torch.float32
    mode: str = "forward+backward"
    tau: float = 0.1
    constant: int = 0  # how many of the inputs, counted from the last, need no gradient

    @property
    def key(self):
        """The name on the command line: "nt_xent:512x128", with dtype and mode if they are not the usual ones."""
        short = {torch.float32: "", torch.bfloat16: ":bf16", torch.float16: ":fp16"}[self.dtype]
        return f"{self.loss}:{self.shape.split()[-1]}{short}" + (":forward" if self.mode == "forward" else "")

    @property
    def entries(self):
        """The number of entries of all Gram matrices together."""
        if self.loss in ("local_local", "global_local"):
            B, T, _ = self.shapes[0]
            return B * (2 * T) ** 2
        if self.loss in ("rectangle", "queue", "moco"):
            return self.shapes[0][0] * self.shapes[-1][0]
        return self.rows**2

    @property
    def shape(self):
        """The shapes of the inputs as text: "512x128 512x128"."""
        return " ".join("x".join(map(str, shape)) for shape in self.shapes)

    def inputs(self):
        """The inputs, the same on every run. Inputs of one shape are correlated, as two views of a video are."""
        learnt = len(self.shapes) - self.constant
        return [_view(i, shape).to(self.dtype).requires_grad_(i < learnt) for i, shape in enumerate(self.shapes)]


def _view(i, shape):
    common = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return common + torch.randn(shape, generator=torch.Generator().manual_seed(i + 1))


def nt_xent(rows, regime, D=128, **kind):
    return Case("nt_xent", rows, ((rows // 2, D),) * 2, regime, **kind)


def clip(N, regime):
    return Case("clip", 2 * N, ((N, 128),) * 2, regime)


def views(V, B, regime):
    return Case("views", V * B, ((V, B, 128),), regime)


def clips(loss, B, T):
    return Case(loss, 2 * B * T, ((B, T, 128),) * 2, f"a group of {2 * T} rows a video")


def rectangle(n, K, regime):
    return Case("rectangle", n + K, ((n, 128), (K, 128)), regime)


def queue(n, K, regime):
    return Case("queue", n + K, ((n, 128), (K, 128)), regime, constant=1)


def sup_con(M, regime):
    return Case("sup_con", M, ((M, 128),), regime)


def dcl(N, regime):
    return Case("dcl", 2 * N, ((N, 128),) * 2, regime)


def moco(n, K, regime):
    return Case("moco", n + K, ((n, 128), (n, 128), (K, 128)), regime, constant=2)


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
    *(nt_xent(M, f"{D} wide", D) for D in (64, 512) for M in (512, 2048, 8192)),
    *(nt_xent(8192, "half inputs", dtype=dtype) for dtype in (torch.bfloat16, torch.float16)),
    *(nt_xent(M, "values only", mode="forward") for M in (80, 2048, 8192)),
    views(8, 40, "the release's local clips: 56 ordered pairs of views from one Gram matrix"),
    views(8, 1024, "the same with a large batch"),
    *(clips(loss, B, 4) for loss in ("local_local", "global_local") for B in (40, 1024, 16384)),
    *(clips(loss, 1024, T) for loss in ("local_local", "global_local") for T in (8, 16)),
    clip(4096, "cross candidates only: two matrices of 67 MB in plain PyTorch"),
    clip(32768, "4.3 GB a matrix"),
    rectangle(1024, 65536, "log-sum-exp over other columns: a matrix of 268 MB in plain PyTorch"),
    queue(1024, 65536, "the same, the columns without gradient"),
    sup_con(4096, "labels of 100 classes: several matrices of 67 MB in plain PyTorch"),
    dcl(2048, "NT-Xent without the positive in its denominator"),
    moco(256, 65536, "a queue far larger than the batch: a matrix of 67 MB in plain PyTorch"),
    tclr_release(8, "the objective at a small batch"),
    tclr_release(40, "the recipe's batch: every term of the objective"),
    tclr_release(256, "a batch of several machines"),
    tclr_release(4096, "no longer bound by overheads"),
]
BY_KEY = {case.key: case for case in CASES}
WARM_UP = {
    case.loss: case
    for case in (
        nt_xent(16, "warm-up"),
        clip(8, "warm-up"),
        views(8, 4, "warm-up"),
        clips("local_local", 2, 4),
        clips("global_local", 2, 4),
        rectangle(8, 16, "warm-up"),
        queue(8, 16, "warm-up"),
        sup_con(16, "warm-up"),
        dcl(8, "warm-up"),
        moco(8, 16, "warm-up"),
        tclr_release(2, "warm-up"),
    )
}
