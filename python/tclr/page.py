"""`tclr report`: shows the contents of a run's folder in a single HTML file, which includes all pictures."""

import base64
import csv
import html
import io
import json
from pathlib import Path

import yaml
from matplotlib import pyplot as plt

from .checkpoint import whole
from .report import PLAIN, TERMS, shown

FIGURES = {  # figure in results.csv -> (its title, the factor for display, its unit)
    "r1": ("R@1", 100, "%"),
    "r5": ("R@5", 100, "%"),
    "r10": ("R@10", 100, "%"),
    "r20": ("R@20", 100, "%"),
    "accuracy": ("Accuracy", 100, "%"),
    "share": ("Labels used", 100, "%"),
    "epochs": ("Epochs", 1, ""),
    "batch": ("Batch", 1, ""),
    "lr": ("Learning rate", 1, ""),
    "seed": ("Seed", 1, ""),
}
SCORES = "r1", "accuracy"  # the figures that are shown at the top
EVALUATIONS = {
    "retrieval": "Retrieval",
    "linear": "Linear classifier",
    "finetune": "Finetuning",
    "classify": "Saved classifier",
}
PICTURES = {
    "gallery": (
        "Nearest neighbours",
        "Left: frames of a test video. Right: the most similar training videos; green names are of the same class.",
    ),
    "multiclip": ("Clips per video", "R@1 and linear accuracy against the number of clips that describe a video."),
    "confusion": ("Confusion", "Each row is a class, and shows which classes its test videos were taken for."),
}
POINTS = 500  # the largest number of points of a curve; neighbouring values are averaged if there are more
STYLE = """
:root { color-scheme: light dark; --text: #1f2328; --soft: #59636e; --page: #f6f8fa; --card: #fff; --line: #d1d9e0 }
@media (prefers-color-scheme: dark) {
  :root { --text: #e6edf3; --soft: #9198a1; --page: #0d1117; --card: #161b22; --line: #3d444d }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1rem 3rem }
h1 { margin: 0; overflow-wrap: anywhere } h2 { margin: 0 0 .6rem; font-size: 1.15rem }
p { margin: .2rem 0 .8rem; color: var(--soft) }
section { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.2rem;
  margin-top: 1rem; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .9rem .3rem 0; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left } thead th { color: var(--soft); font-weight: 500 }
.tiles { display: flex; flex-wrap: wrap; gap: 1rem; margin-top: 1rem } .tiles section { margin: 0; flex: 1 1 9rem }
.tiles b { display: block; font-size: 1.7rem } .tiles span { color: var(--soft) }
img { display: block; max-width: 100%; background: #fff; border-radius: .3rem }
pre { margin: .5rem 0 0; white-space: pre-wrap } summary { cursor: pointer; font-weight: 600 }
"""


def write(run):
    """Writes report.html: results, curves, pictures, environment and settings of a run. Returns its path."""
    run = Path(run)
    settings = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").exists() else {}
    results, title = read_results(run), html.escape(shown(run.resolve().name))
    parts = [tiles(results), table_of(results), curves(run, settings), pictures(run), unreadable(run)]
    if not any(parts) and not settings:
        raise SystemExit(f"run: found no results, pictures or configuration in {run}, wanted a run's folder")
    parts += [environment(run, settings), configuration(run)]
    head = '<!doctype html><html lang="en"><meta charset="utf-8">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{title}</title><style>{STYLE}</style><main><h1>{title}</h1><p>{summary(settings)}</p>"
    with whole(run / "report.html") as file:
        file.write((head + "\n".join(filter(None, parts)) + "</main></html>\n").encode(errors="backslashreplace"))
    return run / "report.html"


def read_results(run):
    """{(evaluation, hash of its settings): {figure: value}}. Of repeated evaluations, it has the last one."""
    found = {}
    if (run / "results.csv").exists():
        for row in csv.DictReader((run / "results.csv").open(newline="")):
            found.setdefault((row["evaluation"], row["hash"]), {})[row["figure"]] = float(row["value"])
    return found


def summary(settings):
    """The network and the data set of a run, in one line."""
    data, net, recipe = (settings.get(name) or {} for name in ("data", "net", "recipe"))
    parts = [f"Network {net['backbone']}, width {net['width']}"] if net else []
    parts += [f"{data['dataset']}, split {data['split']}"] if data else []
    if recipe:
        length = f"{recipe['steps']} steps" if recipe["steps"] else f"{recipe['epochs']} epochs"
        parts += [f"{length} of {recipe['batch']} videos", f"{recipe['form']} form of TCLR", f"seed {recipe['seed']}"]
    parts += [f"weights from {settings['weights']}"] if "weights" in settings else []
    return html.escape(" · ".join(parts))


def name_of(evaluation):
    """The title of an evaluation. "linear-0.1" has that of "linear", since the share of labels has its own column."""
    kind, _, rest = evaluation.partition("-")
    name = EVALUATIONS.get(kind, kind)
    return f"{name}: {rest}" if kind == "classify" else name


def value_of(figure, value):
    _, factor, unit = FIGURES[figure]
    return f"{factor * value:.1f} {unit}" if unit else f"{value:g}"


def tiles(results):
    """The most important scores, in large digits."""
    found = [
        section("", f"<b>{value_of(figure, values[figure])}</b><span>{FIGURES[figure][0]}<br>{labelled(*key)}</span>")
        for key, values in results.items()
        for figure in SCORES
        if figure in values
    ]
    return f'<div class="tiles">{"".join(found)}</div>' if found else ""


def labelled(evaluation, _):
    share = evaluation.partition("-")[2]
    of = f", {float(share):.0%} of the labels" if share.replace(".", "").isdigit() else ""
    return html.escape(name_of(evaluation) + of)


def table_of(results):
    """A table of all evaluations."""
    columns = [figure for figure in FIGURES if any(figure in values for values in results.values())]
    if not columns:
        return ""
    head = ["Evaluation", *(FIGURES[figure][0] for figure in columns), "Settings"]
    lines = [
        [name_of(evaluation), *(value_of(f, values[f]) if f in values else "" for f in columns), digest]
        for (evaluation, digest), values in results.items()
    ]
    note = "<p>Rows of one evaluation with different hashes in the last column had other settings, weights or data.</p>"
    return section("Results", note + table(head, lines))


def curves(run, settings):
    """Curves of all terms of the loss, the learning rate and the temperature against the step."""
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.open()] if path.exists() else []
    rows = [row for row in rows if "total" in row]
    if not rows:
        return ""
    terms = [name for name in TERMS if any(row.get(name) for row in rows)]
    panels = [("Loss (nats)", {TERMS[name]: [row[name] for row in rows] for name in terms})]
    if "lr" in rows[0]:
        panels.append(("Learning rate", {"": [row["lr"] for row in rows]}))
    fixed = (settings.get("recipe") or {}).get("temperature")
    if (fixed := rows[0].get("temperature", fixed)) is not None:
        panels.append(("Temperature", {"": [row.get("temperature", fixed) for row in rows]}))
    return section("Training", image(drawn(panels, [row["step"] for row in rows]), "curves of the training"))


@plt.rc_context(PLAIN)
def drawn(panels, steps):
    """A PNG with the panels side by side, the first one wider."""
    figure, axes = plt.subplots(
        1, len(panels), figsize=(11, 3.4), width_ratios=[2, 1, 1][: len(panels)], layout="constrained", squeeze=False
    )
    for axis, (title, lines) in zip(axes[0], panels, strict=True):
        for name, values in lines.items():
            axis.plot(thinned(steps), thinned(values), label=name, linewidth=1.4)
        axis.set(title=title, xlabel="step", ylim=(0, None))
        axis.grid(alpha=0.3, linewidth=0.5)
        if len(lines) > 1:
            axis.legend(framealpha=0.8)
    file = io.BytesIO()
    figure.savefig(file, dpi=130)
    plt.close(figure)
    return file.getvalue()


def thinned(values):
    """At most POINTS values, each the mean of neighbouring values."""
    each = -(-len(values) // POINTS)
    return [sum(some) / len(some) for some in (values[i : i + each] for i in range(0, len(values), each))]


def pictures(run):
    """The pictures that evaluations have written."""
    known = sorted(run.glob("*.png"), key=lambda path: [*PICTURES, path.stem].index(path.stem))
    parts = []
    for path in known:
        title, note = PICTURES.get(path.stem, (shown(path.stem), ""))
        parts.append(section(html.escape(title), f"<p>{note}</p>" + image(path.read_bytes(), title)))
    return "\n".join(parts)


def unreadable(run):
    path = run / "bad_videos.csv"
    bad = list(csv.reader(path.open(newline="")))[1:] if path.exists() else []
    if not bad:
        return ""
    return section("Videos that could not be read", f"<p>{len(bad)}, listed in bad_videos.csv.</p>")


def environment(run, settings):
    """A table of the machine and the versions with which the pretraining ran."""
    path = run / "environment.json"
    facts = json.loads(path.read_text()) if path.exists() else {}
    facts |= {name: settings[name] for name in ("device", "processes") if name in settings}
    if not facts:
        return section("Environment", "<p>Not recorded: this run was made by an earlier version.</p>")
    return section("Environment", table([], [[name, str(value)] for name, value in facts.items()]))


def configuration(run):
    path = run / "config.yaml"
    if not path.exists():
        return ""
    return section("", f"<details><summary>Settings</summary><pre>{html.escape(path.read_text())}</pre></details>")


def section(title, content):
    return f"<section>{f'<h2>{title}</h2>' if title else ''}{content}</section>"


def table(head, lines):
    cells = lambda tag, row: "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)  # noqa: E731
    first = f"<thead><tr>{cells('th', head)}</tr></thead>" if head else ""
    rest = "".join(f"<tr>{cells('td', line)}</tr>" for line in lines)
    return f"<table>{first}{rest}</table>"


def image(png, title):
    return f'<img alt="{html.escape(title)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
