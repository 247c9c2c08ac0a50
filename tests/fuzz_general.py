"""The general operation on random inputs: python -m tests.fuzz_general --count 3000 --backend native

NT-Xent of 2 to 16 rows of two views, divided into a random number of ranges as over ranks, with labels or without, and
with 0 to 40 extra columns as negatives. Half of the losses also add each row's spread over its class. Widths, dtypes,
temperatures, scales and tolerances are those of `fuzz.py`.
"""

import random
import sys
from typing import NamedTuple

import torch

from tclr_kernels import general

from . import fuzz, oracle


class Draw(NamedTuple):
    rows: fuzz.Draw
    shares: tuple
    classes: int
    extra: int
    spread: bool

    def inputs(self):
        """a, b: [B, D], the two views, and the extra columns [K, D]"""
        a, b = self.rows.inputs()
        columns = oracle.correlated([(self.extra, self.rows.D)], 0, self.rows.seed + 1) if self.extra else []
        return [a, b, *((x * self.rows.scale).to(a.dtype) for x in columns)]

    def keys(self):
        generator = torch.Generator().manual_seed(self.rows.seed)
        keys = torch.randint(-1, self.classes, (1, self.rows.B), generator=generator)
        return keys if self.classes else None

    def loss(self, a, b, *columns, backend):
        """The mean term plus the mean spread, if the case has one, in float64."""
        sets, keys, tau = [a[None], b[None]], self.keys(), self.rows.tau
        parts, o = [], 0
        for n in self.shares:
            settings = general.Settings(backend, True, False, o)
            rows = [z[:, o : o + n] for z in sets]
            of_rows = keys if keys is None else keys[:, o : o + n]
            neg, pos, *labelled = general.rectangle(settings, tau, (of_rows, keys), rows, sets)
            for z in columns:
                others = [
                    general.rectangle(general.Settings(backend, True), tau, general.NO_KEYS, [row], [z[None]])[0]
                    for row in rows
                ]
                neg = general.log_add(neg, torch.cat(others, 1).expand_as(neg))
            parts.append((general.terms(neg, pos, False), *(labelled[1:2] if self.spread else ())))
            o += n
        return sum(torch.cat(x, -1).sum() for x in zip(*parts, strict=True)) / (2 * self.rows.B)


def draw(seed):
    rows = fuzz.draw(seed)
    choose = random.Random(-1 - seed)
    cuts = sorted(choose.choices(range(rows.B + 1), k=choose.randint(0, 3)))
    shares = tuple(end - begin for begin, end in zip([0, *cuts], [*cuts, rows.B], strict=True))
    classes = choose.choice([0, 1, 2, rows.B])
    extra = choose.choice([0, 1, choose.randint(2, 40)])
    return Draw(rows, shares, classes, extra, choose.random() < 0.5)


if __name__ == "__main__":
    sys.exit(fuzz.main(__doc__, draw))
