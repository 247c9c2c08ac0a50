"""What a run leaves behind: metrics.jsonl, the table, the plots and the gallery picture."""

import json

import matplotlib
import torch
from rich.table import Table

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

TERMS = dict(total="total", ic_global="IC", ll="LL", gl="GL")
RIGHT, WRONG = "#2a7f3f", "#b3261e"


class Metrics:
    """metrics.jsonl: one JSON object a line, in the order of the run, the same for the same seed."""

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
    """The rich table of R@1 and R@5, in %, one row a run, for each number of clips in `counts`."""
    result = Table(title=title)
    result.add_column("features")
    for clips in counts:
        for k in 1, 5:
            result.add_column(f"R@{k}, {clips} clip{'s' * (clips > 1)}", justify="right")
    for run in runs:
        rows = [metrics.of("retrieval", run=run, clips=clips)[0] for clips in counts]
        result.add_row(run, *(f"{100 * row[name]:.1f}" for row in rows for name in ("r1", "r5")))
    return result


def plot_losses(metrics, runs, path):
    """One panel a run: each term the run was trained with, against the step."""
    figure, axes = plt.subplots(1, len(runs), figsize=(5 * len(runs), 3.6), squeeze=False, layout="constrained")
    for axis, run in zip(axes[0], runs, strict=True):
        rows = metrics.of("step", run=run)
        terms = [name for name in TERMS if name != "total" and any(row[name] for row in rows)]
        for name in terms:
            axis.plot([row["step"] for row in rows], [row[name] for row in rows], label=TERMS[name], linewidth=1.2)
        axis.set(title=run, xlabel="step", ylabel="loss (nats)", ylim=(0, None))
        axis.legend(frameon=False)
    _save(figure, path)


def plot_clips(metrics, runs, chance, path):
    """R@1 against the number of clips a video."""
    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for run in runs:
        rows = metrics.of("retrieval", run=run)
        axis.plot(
            [row["clips"] for row in rows], [100 * row["r1"] for row in rows], marker="o", markersize=4, label=run
        )
    axis.axhline(100 * chance, color="gray", linestyle=":", label="chance")
    axis.set(xlabel="clips a video", ylabel="R@1 (%)", ylim=(0, None), title="Retrieval against clips a video")
    axis.set_xticks([row["clips"] for row in metrics.of("retrieval", run=runs[0])])
    figure.legend(frameon=False, loc="outside right upper")
    _save(figure, path)


def plot_gallery(queries, gallery, ranks, chosen, path, *, nearest=3, strip=6):
    """A row a query: its frames over time, then its nearest videos', named in green where the class is the query's."""
    figure, axes = plt.subplots(
        len(chosen), 1 + nearest, figsize=(3.4 * (1 + nearest), 0.85 * len(chosen) + 0.3), layout="constrained"
    )
    for row, query in zip(axes, chosen, strict=True):
        _strip(row[0], queries, query, strip, "query: ", "black")
        for axis, found in zip(row[1:], ranks[query].tolist(), strict=False):
            same = gallery.labels[found] == queries.labels[query]
            _strip(axis, gallery, found, strip, "", RIGHT if same else WRONG)
    _save(figure, path)


def _strip(axis, videos, index, count, prefix, colour):
    """Evenly spaced frames side by side, a thin gap between them."""
    frames = videos.frames[index]
    frames = frames[torch.linspace(0, len(frames) - 1, count).long()]
    frames = torch.nn.functional.pad(frames, (0, 2), value=255).permute(2, 0, 3, 1).flatten(1, 2)
    axis.imshow(frames[:, :-2].numpy())
    axis.set_title(prefix + videos.names[index].split("/")[0], fontsize=9, color=colour, pad=3)
    axis.axis("off")


def _save(figure, path):
    figure.savefig(path, dpi=130)
    plt.close(figure)
