"""Time and memory against the number of rows, from the result rows alone."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from . import rows  # noqa: E402
from .baselines import PROVIDERS  # noqa: E402

STYLE = {  # colour-blind safe; ours is the thick one
    "native": dict(color="#D55E00", linewidth=2.5, marker="o"),
    "reference": dict(color="#E69F00", marker="v"),
    "dense": dict(color="#0072B2", marker="s"),
    "masked": dict(color="#56B4E9", marker="D"),
    "compile": dict(color="#009E73", marker="^"),
    "products": dict(color="#666666", linestyle="--", marker=None),
}


def draw(path):
    """Writes <path>.png beside the CSV."""
    found = [row for row in rows.read(path) if row["case"] == "nt_xent" and row["p50_ms"]]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name, style in STYLE.items():
        mine = sorted((row for row in found if row["provider"] == name), key=lambda row: int(row["rows"]))
        line(time, mine, "p50_ms", PROVIDERS[name].label, style)
        spread(time, mine, style)
        line(memory, mine, "peak_mb", PROVIDERS[name].label, style)
    finish(time, "milliseconds, forward + backward (20th to 80th percentile)")
    finish(memory, "MiB beyond the inputs, peak")
    time.legend(fontsize=8)
    cpu, threads = found[0]["cpu"], found[0]["threads"]
    figure.suptitle(f"NT-Xent, D = {found[0]['shape'].split('x')[-1]}, float32: {cpu}, {threads} threads", fontsize=10)
    figure.savefig(path.with_suffix(".png"), dpi=130)
    return path.with_suffix(".png")


def line(axes, mine, column, label, style):
    points = [(int(row["rows"]), float(row[column])) for row in mine if row[column]]
    if points:
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, **style)


def spread(axes, mine, style):
    edges = [(int(row["rows"]), float(row["p20_ms"]), float(row["p80_ms"])) for row in mine]
    if edges:
        axes.fill_between(*zip(*edges, strict=True), color=style["color"], alpha=0.2)


def finish(axes, label):
    axes.set(xscale="log", yscale="log", xlabel="rows of the Gram matrix", ylabel=label)
    axes.grid(alpha=0.3, which="both", linewidth=0.5)
