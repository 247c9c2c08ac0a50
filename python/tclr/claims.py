"""Computes the ablation's tables, pictures and conclusions from its results, the CSV files of a folder.

python -m tclr.claims --folder benchmarks/results   # writes ablation.md and the pictures from the files in this folder
"""

import csv
import io
import math
import textwrap
from pathlib import Path
from statistics import mean, stdev

import matplotlib
import numpy as np
from jsonargparse import auto_cli

from . import motions
from .ablation import INVARIANT, ROWS, SCRATCH, SHARES, TCLR, Ablation
from .checkpoint import whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

# Student's t, two-sided 95 %, for 1, 2, ... degrees of freedom
T95 = 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131
FIGURES = dict(r1="R@1", linear="linear accuracy")
COMPARED = [  # pairs (a, b) of rows for the table of differences a - b
    *((TCLR, other) for other in (INVARIANT, "IC (same)", "IC + LL", "IC + GL", SCRATCH)),
    *((pair, ic) for pair in ("IC + LL", "IC + GL") for ic in (INVARIANT, "IC (same)")),
    ("IC (same)", INVARIANT),
]
KEY = "row", "seed", "steps"
MEASURED = "r1", "r5", "linear", "accuracy", "constancy"
LINES = {  # CSV file -> a function from the figures of a job to its lines in the file
    "ablation": lambda each: [dict(clips=clips, **values) for clips, values in each["by_clips"].items()],
    "ablation-labels": lambda each: [dict(share=share, linear=value) for share, value in each["by_share"].items()],
    "ablation-finetuned": lambda each: [
        dict(share=share, accuracy=value, commit=each["finetuned_commit"])
        for share, value in each.get("finetuned", {}).items()
    ],
    "ablation-sets": lambda each: [
        dict(clips=clips, r1=value, constancy=each["constancy"], commit=each["sets_commit"])
        for clips, value in each.get("sets", {}).items()
    ],
    "ablation-confusion": lambda each: [
        dict(true=name, **dict(zip(motions.ROUTINES, counts, strict=True)))
        for name, counts in zip(motions.ROUTINES, each["confusion"], strict=True)
    ],
}
FACTS = "seconds", "hash", "code", "commit", "torch", "python", "numpy", "machine", "threads"


class Found:
    """The available results for one number of steps, in %."""

    def __init__(self, figures, steps):
        self.steps = steps
        self.jobs = {(each["row"], each["seed"]): each for each in figures if each["steps"] == steps}
        self.clips = max((int(clips) for each in figures for clips in each["by_clips"]), default=1)

    def seeds(self, *rows):
        """The seeds for which there are results of all these rows."""
        return sorted(set.intersection(*({seed for row, seed in self.jobs if row == wanted} for wanted in rows)))

    def at(self, figure, clips=None):
        """A function (row, seed) -> the figure with `clips` clips per video, by default with all."""
        return lambda row, seed: 100 * self.jobs[row, seed]["by_clips"][str(clips or self.clips)][figure]

    def gain(self, figure):
        """A function (row, seed) -> the gain of the figure from one clip a video to all."""
        return lambda row, seed: self.at(figure)(row, seed) - self.at(figure, 1)(row, seed)

    def in_sets(self, clips):
        """A function (row, seed) -> R@1 of clip-by-clip retrieval."""
        return lambda row, seed: 100 * self.jobs[row, seed]["sets"][str(clips)]

    def gain_in_sets(self):
        return lambda row, seed: self.in_sets(self.clips)(row, seed) - self.in_sets(1)(row, seed)

    def by_share(self, row, kind):
        """The accuracies by the share of the labels, for each seed that has them."""
        return [self.jobs[row, seed][kind] for seed in self.seeds(row) if self.jobs[row, seed][kind]]

    def mean(self, row, measure, seeds=None):
        """(mean over seeds, half the width of its 95 % interval, number of seeds). seeds: by default all of the row."""
        return interval([measure(row, seed) for seed in (self.seeds(row) if seeds is None else seeds)])

    def difference(self, first, second, measure):
        """As `mean`, for the differences first - second of the seeds that both rows have."""
        return interval([measure(first, seed) - measure(second, seed) for seed in self.seeds(first, second)])


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t, number of values); no width for fewer than two."""
    count = len(values)
    if count < 2:
        return (values[0] if values else math.nan), math.nan, count
    t = T95[count - 2] if count - 2 < len(T95) else 1.96 + 2.5 / (count - 1)
    return mean(values), t * stdev(values) / math.sqrt(count), count


def shown(value, half, count):
    """A mean with half the width of its interval, such as "12.3 ± 1.2"."""
    return "" if not count else f"{value:.1f}" if math.isnan(half) else f"{value:.1f} ± {half:.1f}"


def told(value, half, count):
    """A difference with its interval, such as "+12.3 [+11.1, +13.5]"."""
    bounds = "" if math.isnan(half) else f" [{value - half:+.1f}, {value + half:+.1f}]"
    return f"{value:+.1f}{bounds}" if count else ""


def statement(found):
    """Sentences that say whether the results support the paper's claims."""
    if not (seeds := found.seeds(TCLR, INVARIANT)):
        return "No seed has both rows."
    sentences = []
    for name, measures in {
        f"with {found.clips} clips per video": found.at,
        f"as a gain from 1 to {found.clips} clips per video": found.gain,
    }.items():
        parts = []
        for figure, label in FIGURES.items():
            value, half, count = found.difference(TCLR, INVARIANT, measures(figure))
            verdict = "no clear difference"
            if not math.isnan(half) and abs(value) > half:
                verdict = "higher" if value > 0 else "lower"
            values = (found.mean(row, measures(figure), seeds)[0] for row in (TCLR, INVARIANT))
            parts.append(
                "{}: {:.1f} against {:.1f}, {} (difference {})".format(
                    label, *values, verdict, told(value, half, count)
                )
            )
        sentences.append(
            f"{TCLR} against {INVARIANT}, {name}, {count} seed{'s' * (count != 1)}: " + "; ".join(parts) + "."
        )
    return "\n".join(sentences)


def table(head, lines):
    """A Markdown table with words in the first column and numbers in the others."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [head, rule, *lines])


def rows_table(found):
    columns = {
        f"{label}, {clips} clip{'s' * (clips > 1)}": found.at(figure, clips)
        for clips in (1, found.clips)
        for figure, label in FIGURES.items()
    }
    columns |= {f"gain in {label}": found.gain(figure) for figure, label in FIGURES.items()}
    lines = [
        [row, str(len(found.seeds(row))), *(shown(*found.mean(row, measure)) for measure in columns.values())]
        for row in ROWS
        if found.seeds(row)
    ]
    return table(["row", "seeds", *columns], lines)


def differences_table(found):
    columns = {f"{label}, {found.clips} clips": found.at(figure) for figure, label in FIGURES.items()}
    columns |= {f"gain in {label}": found.gain(figure) for figure, label in FIGURES.items()}
    lines = [
        [f"{a} − {b}", str(len(found.seeds(a, b))), *(told(*found.difference(a, b, each)) for each in columns.values())]
        for a, b in COMPARED
        if found.seeds(a, b)
    ]
    return table(["difference", "seeds", *columns], lines)


def steps_table(figures):
    """The difference between IC + LL + GL and IC (independent) for each number of steps."""
    lines = []
    for steps in sorted({each["steps"] for each in figures}):
        found = Found(figures, steps)
        if seeds := found.seeds(TCLR, INVARIANT):
            means = [
                shown(*found.mean(row, found.at(figure), seeds)) for figure in FIGURES for row in (INVARIANT, TCLR)
            ]
            measures = [measure(figure) for measure in (found.at, found.gain) for figure in FIGURES]
            differences = [told(*found.difference(TCLR, INVARIANT, measure)) for measure in measures]
            lines.append([str(steps), str(len(seeds)), *means, *differences])
    head = [f"{label}, {row}" for label in FIGURES.values() for row in (INVARIANT, TCLR)]
    head += [f"{what} {label}" for what in ("difference in", "difference of gains in") for label in FIGURES.values()]
    return table(["steps", "seeds", *head], lines)


def labels_table(found, kind):
    """Accuracy by the share of the labels, of a linear layer (kind "by_share") or after finetuning ("finetuned")."""
    rows = [row for row in (SCRATCH, INVARIANT, "IC (same)", TCLR) if any(found.by_share(row, kind))]
    shares = [part for part in SHARES if any(str(part) in each for row in rows for each in found.by_share(row, kind))]
    lines = []
    for row in rows:
        jobs = found.by_share(row, kind)
        lines.append(
            [row, str(len(jobs)), *(shown(*interval([100 * job[str(part)] for job in jobs])) for part in shares)]
        )
    return table(["row", "seeds", *(f"{100 * part:g} % of the labels" for part in shares)], lines)


def sets_table(found):
    """R@1 with the mean of the clips' features, R@1 of clip-by-clip retrieval, and the constancy of features."""
    measured = Found([each for each in found.jobs.values() if each["sets"]], found.steps)
    clips = sorted({1, 2, measured.clips}) if measured.jobs else []
    measures = {f"clip by clip, {n} clip{'s' * (n > 1)}": measured.in_sets(n) for n in clips}
    if clips:
        measures["gain, clip by clip"] = measured.gain_in_sets()
        measures["gain, mean feature"] = measured.gain("r1")
        measures["variance between videos (%)"] = lambda row, seed: 100 * measured.jobs[row, seed]["constancy"]
    rows = [row for row in ROWS if measured.seeds(row)]
    lines = [
        [row, str(len(measured.seeds(row))), *(shown(*measured.mean(row, each)) for each in measures.values())]
        for row in rows
    ]
    if TCLR in rows and INVARIANT in rows:
        differences = [told(*measured.difference(TCLR, INVARIANT, each)) for each in measures.values()]
        lines.append([f"{TCLR} − {INVARIANT}", str(len(measured.seeds(TCLR, INVARIANT))), *differences])
    return table(["row", "seeds", *measures], lines)


def confusions(found, row):
    """The number of videos by true and predicted class, over all seeds: [classes, classes]"""
    return sum(np.array(found.jobs[row, seed]["confusion"]) for seed in found.seeds(row))


def confusion_table(found):
    """For pairs of classes with the same frames: how many videos are taken for the right one, and for the other one."""
    names, rows = list(motions.ROUTINES), [row for row in (SCRATCH, INVARIANT, TCLR) if found.seeds(row)]
    lines = []
    for pair in motions.MIRRORED:
        i, j = (names.index(name) for name in pair)
        counts = [confusions(found, row) for row in rows]
        right = [(each[i, i] + each[j, j], each[i, j] + each[j, i]) for each in counts]
        lines.append([" / ".join(pair), *(f"{yes} : {no}" for yes, no in right)])
    return table(["pair", *(f"{row}, right : taken for the other" for row in rows)], lines)


def write(figures, scale, out):
    """Writes these figures as CSV files, and then the output of `tabulate`."""
    for name, lines in LINES.items():
        facts = FACTS if name == "ablation" else ("hash", "code")
        rows = [
            {key: each[key] for key in KEY} | line | {key: each[key] for key in facts}
            for each in figures
            for line in lines(each)
        ]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, rows[0] if rows else KEY, lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {key: f"{value:.4f}" if key in MEASURED else value for key, value in row.items()} for row in rows
        )
        with whole(out / f"{name}.csv") as file:
            file.write(text.getvalue().encode())
    tabulate(out, scale.steps)


def read(folder):
    """The figures in the CSV files of a folder."""
    figures = {}
    for name in LINES:
        with (folder / f"{name}.csv").open(newline="") as file:
            for line in csv.DictReader(file):
                key = line["row"], int(line["seed"]), int(line["steps"])
                empty = dict(by_clips={}, by_share={}, finetuned={}, sets={}, constancy=None, confusion=[])
                each = figures.setdefault(key, dict(zip(KEY, key, strict=True)) | empty)
                if name == "ablation":
                    each["by_clips"][line["clips"]] = {figure: float(line[figure]) for figure in ("r1", "r5", "linear")}
                elif name == "ablation-labels":
                    each["by_share"][line["share"]] = float(line["linear"])
                elif name == "ablation-finetuned":
                    each["finetuned"][line["share"]] = float(line["accuracy"])
                elif name == "ablation-sets":
                    each["sets"][line["clips"]], each["constancy"] = float(line["r1"]), float(line["constancy"])
                else:
                    each["confusion"].append([int(line[name]) for name in motions.ROUTINES])
    return list(figures.values())


def tabulate(folder: Path, steps: int = Ablation.steps):
    """Writes ablation.md and the pictures from the CSV files of a folder.

    steps: the number of steps in all tables except the one that compares numbers of steps.
    """
    figures = read(folder)
    found = Found(figures, steps)
    parts = {
        "": statement(found).replace("\n", "\n\n") + "\n",
        "Rows": rows_table(found),
        "Differences": differences_table(found),
        "Steps": steps_table(figures),
        "Labels, linear": labels_table(found, "by_share"),
        "Labels, finetuned": labels_table(found, "finetuned"),
        "Confusion": confusion_table(found),
        "Retrieval clip by clip": sets_table(found),
    }
    text = "\n".join(f"## {name}\n\n{part}" if name else part for name, part in parts.items())
    with whole(folder / "ablation.md") as file:
        file.write(text.encode())
    pictures = {"ablation": draw_curves, "ablation-labels": draw_labels, "ablation-confusion": draw_confusions}
    for name, draw in pictures.items():
        if found.seeds(TCLR, INVARIANT, SCRATCH):
            figure = draw(found)
            with whole(folder / f"{name}.png") as file:
                figure.savefig(file, dpi=130, format="png")
            plt.close(figure)
    print(statement(found), flush=True)


def draw_curves(found):
    """Draws R@1 and linear accuracy against the number of clips per video, with 95 % intervals, as in the slides."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    clips = range(1, found.clips + 1)
    for axis, (name, label) in zip(axes, FIGURES.items(), strict=True):
        for colour, row in dict(C7=SCRATCH, C0=INVARIANT, C3=TCLR).items():
            means, halves, _ = zip(*(found.mean(row, found.at(name, n)) for n in clips), strict=True)
            axis.errorbar(clips, means, halves, color=colour, marker="o", markersize=4, capsize=3, label=row)
        axis.axhline(100 / len(motions.ROUTINES), color="gray", linestyle=":", label="chance")
        axis.set(xlabel="clips per video", ylabel=f"{label} (%)", ylim=(0, None), xticks=list(clips))
    axes[0].legend(frameon=False)
    lines = [textwrap.fill(sentence, 150) for sentence in statement(found).splitlines()]
    figure.supxlabel("\n".join(lines), fontsize=8)
    return figure


def draw_confusions(found):
    """Draws confusion matrices of scratch, IC and TCLR. Squares mark pairs of classes that have the same frames."""
    rows = SCRATCH, INVARIANT, TCLR
    figure, axes = plt.subplots(1, 3, figsize=(14, 7), layout="constrained")
    names = list(motions.ROUTINES)
    order = [names.index(name) for pair in motions.MIRRORED for name in pair]
    labels = [names[i].replace("And", " ") for i in order]
    for axis, row in zip(axes, rows, strict=True):
        counts = confusions(found, row)[order][:, order]
        shares = 100 * counts / counts.sum(1, keepdims=True)
        image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=60)
        for (i, j), value in np.ndenumerate(shares):
            axis.text(
                j, i, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value > 35 else "black"
            )
        for start in range(0, len(order), 2):
            axis.add_patch(plt.Rectangle((start - 0.5, start - 0.5), 2, 2, fill=False, edgecolor="C3", linewidth=1.5))
        axis.set(title=row, xlabel="predicted")
        axis.set_xticks(range(len(order)), labels, rotation=90, fontsize=7)
        axis.set_yticks(range(len(order)), labels if axis is axes[0] else [], fontsize=7)
    axes[0].set_ylabel("true")
    figure.colorbar(image, ax=axes, label="% of the true class", shrink=0.6)
    return figure


def draw_labels(found):
    """Draws accuracy against the share of the labels, with 95 % intervals, of a linear layer and after finetuning."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axis, (kind, title) in zip(axes, dict(by_share="linear", finetuned="finetuned").items(), strict=True):
        for colour, row in dict(C7=SCRATCH, C0=INVARIANT, C3=TCLR).items():
            jobs = found.by_share(row, kind)
            shares = [part for part in SHARES if jobs and str(part) in jobs[0]]
            points = [interval([100 * job[str(part)] for job in jobs])[:2] for part in shares]
            if points:
                means, halves = zip(*points, strict=True)
                percent = [100 * part for part in shares]
                axis.errorbar(percent, means, halves, color=colour, marker="o", markersize=4, capsize=3, label=row)
        axis.axhline(100 / len(motions.ROUTINES), color="gray", linestyle=":", label="chance")
        axis.set(xlabel="share of the labels (%)", title=title, xscale="log", ylim=(0, None))
        axis.set_xticks([100 * part for part in SHARES], [f"{100 * part:g}" for part in SHARES])
    axes[0].set_ylabel("accuracy (%)")
    axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    auto_cli(tabulate, as_positional=False)
