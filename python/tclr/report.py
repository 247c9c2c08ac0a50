"""The output of a run: metrics.jsonl, the table of the demo, and pictures."""

import json
import unicodedata
from pathlib import Path

import matplotlib
import torch
from rich.table import Table

from .checkpoint import whole

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TERMS = dict(total="total", ic_global="IC", ic_local="IC, local clips", ll="LL", gl="GL")
RIGHT, WRONG = "#2a7f3f", "#b3261e"
LONGEST = 40  # characters of a name in a picture
TURNING = set("\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")  # they change the text's direction
PLAIN = {"text.parse_math": False, "text.usetex": False}  # so that `$`, `_` and `\` in names are drawn as they are


def shown(name, longest=None):
    r"""A name for display: bytes that are not UTF-8 and control characters become \xff, a long name is shortened."""
    text = "".join(map(_visible, name))
    if longest and len(text) > longest:
        text = text[: longest // 2] + "…" + text[-(longest - longest // 2 - 1) :]
    return text


def _visible(character):
    if "\udc80" <= character <= "\udcff":  # Python's representation of a byte that is not UTF-8 in a file name
        return f"\\x{ord(character) - 0xDC00:02x}"
    if unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp") or character in TURNING:
        return character.encode("unicode_escape").decode()
    return character


class Metrics:
    """Writes metrics.jsonl: a JSON object in each line, in the order of the run."""

    def __init__(self, path):
        self.file, self.rows = path.open("w"), []

    def add(self, kind, **values):
        self.rows.append(dict(kind=kind, **values))
        self.file.write(json.dumps(self.rows[-1]) + "\n")
        self.file.flush()

    def of(self, kind, **match):
        return [row for row in self.rows if row["kind"] == kind and match.items() <= row.items()]

    def close(self):
        self.file.close()


def table(metrics, runs, counts, title):
    """A rich table of R@1 and R@5 in %: a row for each run, and two columns for each number of clips in `counts`."""
    result = Table(title=title)
    result.add_column("features")
    for clips in counts:
        for k in 1, 5:
            result.add_column(f"R@{k}, {clips} clip{'s' * (clips > 1)}", justify="right")
    for run in runs:
        rows = [metrics.of("retrieval", run=run, clips=clips)[0] for clips in counts]
        result.add_row(run, *(f"{100 * row[name]:.1f}" for row in rows for name in ("r1", "r5")))
    return result


@matplotlib.rc_context(PLAIN)
def plot_losses(metrics, runs, path):
    """Draws a panel for each run: all terms of its loss against the step."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        rows = metrics.of("step", run=run)
        terms = [name for name in TERMS if name != "total" and any(row[name] for row in rows)]
        for name in terms:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=TERMS[name], linewidth=1.2)
        axis.set(title=run, xlabel="step", ylabel="loss (nats)", ylim=(0, None))
        axis.legend(frameon=False)
    _save(figure, path)


@matplotlib.rc_context(PLAIN)
def plot_clips(metrics, runs, chance, path):
    """Draws R@1 against the number of clips per video."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run in runs:
        rows = metrics.of("retrieval", run=run)
        axis.plot(
            [row["clips"] for row in rows], [100 * row["r1"] for row in rows], marker="o", markersize=4, label=run
        )
    axis.axhline(100 * chance, color="gray", linestyle=":", label="chance")
    axis.set(xlabel="clips per video", ylabel="R@1 (%)", ylim=(0, None), title="Retrieval against clips per video")
    axis.set_xticks([row["clips"] for row in metrics.of("retrieval", run=runs[0])])
    figure.legend(frameon=False, loc="outside right upper")
    _save(figure, path)


@matplotlib.rc_context(PLAIN)
def plot_gallery(queries, gallery, ranks, chosen, path):
    """Draws a row for each query: its frames over time, and its three nearest videos, green if of its class."""
    size = 3.4 * 4, 0.85 * len(chosen) + 0.3
    figure, axes = plt.subplots(len(chosen), 4, figsize=size, layout="constrained", squeeze=False)
    for row, query in zip(axes, chosen, strict=True):
        _strip(row[0], queries, query, "query: ", "black")
        for axis, found in zip(row[1:], ranks[query].tolist(), strict=False):
            same = gallery.labels[found] == queries.labels[query]
            _strip(axis, gallery, found, "", RIGHT if same else WRONG)
    _save(figure, path)


@matplotlib.rc_context(PLAIN)
def plot_curves(curve, path):
    """Draws R@1 and linear accuracy against the number of clips per video. curve: {clips: {r1, linear}}"""
    figure, axis = plt.subplots(figsize=(5, 3.6), layout="constrained")
    for name, label in dict(r1="R@1", linear="linear accuracy").items():
        axis.plot(list(curve), [100 * row[name] for row in curve.values()], marker="o", markersize=4, label=label)
    axis.set(xlabel="clips per video", ylabel="%", ylim=(0, None), xticks=list(curve))
    axis.legend(frameon=False)
    _save(figure, path)


@matplotlib.rc_context(PLAIN)
def plot_confusion(counts, names, path):
    """Draws a confusion matrix in % of a row: rows are true classes, columns predicted ones. counts: [C, C]"""
    shares = 100 * counts / counts.sum(1, keepdim=True).clamp_min(1)
    names, side = [shown(name, LONGEST) for name in names], 2 + 0.35 * len(names)
    figure, axis = plt.subplots(figsize=(side + 1, side), layout="constrained")
    figure.colorbar(
        axis.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100), label="% of the true class", shrink=0.8
    )
    axis.set(xlabel="predicted", ylabel="true")
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
    axis.set_yticks(range(len(names)), names, fontsize=7)
    _save(figure, path)


def _strip(axis, videos, index, prefix, colour):
    """Draws six evenly spaced frames of a video side by side."""
    frames = videos.read(index, torch.linspace(0, videos.length(index) - 1, 6).long())
    frames = torch.nn.functional.pad(frames, (0, 2), value=255).permute(2, 0, 3, 1).flatten(1, 2)
    axis.imshow(frames[:, :-2].numpy())
    axis.set_title(prefix + shown(_class_of(videos, index), LONGEST), fontsize=9, color=colour, pad=3)
    axis.axis("off")


def _class_of(videos, index):
    if videos.classes:
        return videos.classes[videos.labels[index]]
    return Path(videos.names[index]).parent.name


def _save(figure, path):
    """Writes a picture with at most 2^15 pixels a side, since matplotlib fails at 2^16."""
    try:
        with whole(path) as file:
            figure.savefig(file, dpi=min(130, 2**15 / max(figure.get_size_inches())), format="png")
    finally:
        plt.close(figure)
