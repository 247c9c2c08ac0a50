"""Plots time and memory against the number of rows, and errors against the temperature, from the result rows."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from . import accuracy, rows  # noqa: E402
from .providers import PROVIDERS  # noqa: E402

STYLE = {  # colour-blind safe; ours is the thick one
    "native": dict(color="#D55E00", linewidth=2.5, marker="o"),
    "dense": dict(color="#0072B2", marker="s"),
    "compile": dict(color="#009E73", marker="^"),
    "written": dict(color="#56B4E9", marker="D"),
    "solo": dict(color="#CC79A7", marker="v"),
    "lightly": dict(color="#E69F00", marker="P"),
    "pml": dict(color="#F0E442", marker="X"),
    "products": dict(color="#666666", linestyle="--", marker=None),
    "floor": dict(color="#000000", linestyle=":", marker=None),
}


def draw(path):
    """Writes <path>.png beside the CSV: NT-Xent at D = 128 in float32."""
    found = [row for row in rows.read(path) if rows.is_scaling(row) and row["p50_ms"]]
    figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for name, style in STYLE.items():
        mine = sorted((row for row in found if row["provider"] == name), key=lambda row: int(row["rows"]))
        line(time, mine, "p50_ms", PROVIDERS[name].label, style)
        spread(time, mine, style)
        if name not in ("products", "floor"):
            line(memory, mine, "peak_mb", PROVIDERS[name].label, style)
    finish(time, "milliseconds, forward + backward (20th to 80th percentile)")
    finish(memory, "MiB beyond the inputs, peak")
    time.legend(fontsize=8)
    cpu, threads = found[0]["cpu"], found[0]["threads"]
    figure.suptitle(f"NT-Xent, D = 128, float32: {cpu}, {threads} threads", fontsize=10)
    return save(figure, path.with_suffix(".png"))


def draw_headline(path):
    """Writes headline.png, the README's picture: NT-Xent's times from a result file, and its gradient's errors."""
    found = [row for row in rows.read(path) if rows.is_scaling(row) and row["p50_ms"]]
    errors = [row for row in rows.read(accuracy.path()) if row["dtype"] == "float32"]
    figure, (time, error) = plt.subplots(1, 2, figsize=(10, 3.9), layout="constrained")
    for name in ("written", "lightly", "dense", "compile", "native"):
        mine = sorted((row for row in found if row["provider"] == name), key=lambda row: int(row["rows"]))
        line(time, mine, "p50_ms", PROVIDERS[name].label, STYLE[name])
    for name in ("pml", "written", "lightly", "dense", "native"):
        mine = [row for row in errors if row["provider"] == name]
        points = [(float(row["tau"]), 100 * float(row["grad_error"])) for row in mine]
        error.plot(*zip(*points, strict=True), label=PROVIDERS[name].label, markersize=5, **STYLE[name])
    finish(time, "milliseconds, forward + backward")
    cpu, threads, isa = (found[0][column] for column in ("cpu", "threads", "isa"))
    time.set(title=f"Speed ({cpu}, {threads} threads, {isa})", xlabel="rows")
    error.axhline(100, color="#666666", linewidth=1, linestyle="--")
    error.annotate("100 %: nothing is right", (1, 100), (0, 4), textcoords="offset points", ha="right", fontsize=9)
    error.set(xscale="log", yscale="log", ylim=(2e-5, 500), xlabel="temperature")
    error.set(title="Error of the gradient in float32", ylabel="% of the gradient's largest entry")
    error.grid(alpha=0.3, which="both", linewidth=0.5)
    time.legend(fontsize=8)
    error.legend(fontsize=8, loc="center right")
    return save(figure, rows.RESULTS / "headline.png")


def draw_accuracy():
    """Writes accuracy.png, with a panel for each dtype."""
    found = rows.read(accuracy.path())
    dtypes = list(dict.fromkeys(row["dtype"] for row in found))
    figure, panels = plt.subplots(1, len(dtypes), figsize=(11, 4.2), layout="constrained", sharey=True)
    for dtype, axes in zip(dtypes, panels, strict=True):
        for name in accuracy.NAMES:
            mine = [row for row in found if row["dtype"] == dtype and row["provider"] == name]
            points = [(float(row["tau"]), float(row["grad_error"] or "nan")) for row in mine]
            axes.plot(*zip(*points, strict=True), label=PROVIDERS[name].label, markersize=5, **STYLE[name])
        axes.set(xscale="log", yscale="log", xlabel="temperature", title=dtype)
        axes.grid(alpha=0.3, which="both", linewidth=0.5)
    panels[0].set_ylabel("gradient: largest error / largest entry")
    panels[-1].legend(fontsize=8)
    figure.suptitle(
        f"Error of NT-Xent's gradient, {2 * accuracy.N} rows, views of cosine about {accuracy.COSINE}", fontsize=10
    )
    return save(figure, accuracy.path().with_suffix(".png"))


def save(figure, path):
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


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
