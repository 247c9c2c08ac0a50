"""The ablation's tables, pictures and statements, all computed from the figures of its jobs."""

import csv
import math
from collections import defaultdict
from statistics import mean, stdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402

from . import motions  # noqa: E402
from .ablation import INVARIANT, ROWS, SCRATCH, SHARES, TCLR, oracle  # noqa: E402
from .checkpoint import whole  # noqa: E402

# Student's t, two-sided 95 %, by degrees of freedom
T95 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131]
LABEL = dict(r1="R@1", r5="R@5", linear="linear accuracy")
COLUMNS = ["row", "seed", "steps", "clips", "r1", "r5", "linear", "seconds", "hash"]
FACTS = ["commit", "code", "torch", "python", "numpy", "machine", "threads"]


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t); NaN for fewer than two values."""
    values = list(values)
    if len(values) < 2:
        return mean(values), math.nan
    t = T95[len(values) - 2] if len(values) - 2 < len(T95) else 1.96 + 2.4 / (len(values) - 1)
    return mean(values), t * stdev(values) / len(values) ** 0.5


class Found:
    """The figures there are. value(row, seed, steps, clips, figure) in %."""

    def __init__(self, figures, scale):
        self.figures, self.scale = figures, scale
        self.jobs = {(each["row"], each["seed"], each["steps"]): each for each in figures}

    def seeds(self, *rows, steps=None):
        """The seeds of which all these rows are there."""
        steps = steps or self.scale.steps
        seeds = [{seed for row, seed, of in self.jobs if (row, of) == (wanted, steps)} for wanted in rows]
        return sorted(set.intersection(*seeds))

    def value(self, row, seed, clips, figure, steps=None):
        return 100 * self.jobs[row, seed, steps or self.scale.steps]["by_clips"][str(clips)][figure]

    def values(self, row, clips, figure, steps=None):
        return [self.value(row, seed, clips, figure, steps) for seed in self.seeds(row, steps=steps)]

    def gain(self, row, seed, figure, steps=None):
        """What all clips add to one."""
        every = self.scale.eval_clips
        return self.value(row, seed, every, figure, steps) - self.value(row, seed, 1, figure, steps)
