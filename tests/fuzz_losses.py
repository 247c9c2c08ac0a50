"""The losses on random inputs: python -m tests.fuzz_losses --count 3000 --backend native

Each input goes to a random loss of `CALLS`, with labels or without, with 0 to 40 further negatives, which may require a
gradient, and decoupled or not. Sizes, dtypes, temperatures, scales and tolerances are those of `fuzz.py`. Results are
compared with the reference backend in float64.
"""

import random
import sys
from typing import NamedTuple

import torch

import tclr_kernels as tk

from . import fuzz, oracle

CALLS = {
    "nt_xent": lambda a, b, q, **s: tk.nt_xent(a, b, negatives=q, **s),
    "nt_xent one way": lambda a, b, q, **s: tk.nt_xent(a, b, negatives=q, symmetric=False, **s),
    "clip_loss": lambda a, b, q, **s: tk.clip_loss(a, b, negatives=(q, q), **s),
    "clip_loss of one side": lambda a, b, q, **s: tk.clip_loss(a, b, negatives=(None, q), **s),
    "info_nce": lambda a, b, q, **s: tk.info_nce(a, b, negatives=q, **s),
    "moco": lambda a, b, q, labels, **s: tk.info_nce(a, b, negatives=q, in_batch=False, **s),
    "views": lambda a, b, q, **s: tk.instance_contrastive([a, b, a.flip(0)], negatives=q, **s),
    "joint": lambda a, b, q, **s: tk.instance_contrastive([a, b, b.flip(0)], negatives=q, softmax="joint", **s),
    "sup_con": lambda a, b, q, labels, decoupled, **s: tk.sup_con(
        torch.cat([a, b]), torch.arange(2 * len(a)) % len(a) if labels is None else labels.repeat(2), **s
    ),
}


class Draw(NamedTuple):
    rows: fuzz.Draw
    name: str
    classes: int
    extra: int
    frozen: bool
    decoupled: bool

    def inputs(self):
        """a, b: [B, D], the two views, and further negatives [K, D] that take a gradient"""
        a, b = self.rows.inputs()
        return [a, b] if self.frozen or not self.extra else [a, b, self.further(a.dtype)]

    def further(self, dtype):
        (x,) = oracle.correlated([(self.extra, self.rows.D)], 0, self.rows.seed + 1)
        return (x * self.rows.scale).to(self.rows.dtype).to(dtype)

    def labels(self):
        generator = torch.Generator().manual_seed(self.rows.seed)
        return torch.randint(-1, self.classes, (self.rows.B,), generator=generator) if self.classes else None

    def loss(self, a, b, q=None, *, backend):
        if q is None and self.extra:
            q = self.further(a.dtype)
        settings = dict(labels=self.labels(), decoupled=self.decoupled, temperature=self.rows.tau, backend=backend)
        return CALLS[self.name](a, b, q, **settings)


def draw(seed):
    rows = fuzz.draw(seed)
    choose = random.Random(-1 - seed)
    classes, extra = choose.choice([0, 1, 2, rows.B]), choose.choice([0, 1, choose.randint(2, 40)])
    name = choose.choice(list(CALLS))
    extra = {"sup_con": 0, "moco": max(1, extra)}.get(name, extra)
    return Draw(rows, name, classes, extra, choose.random() < 0.5, choose.random() < 0.3)


if __name__ == "__main__":
    sys.exit(fuzz.main(__doc__, draw))
