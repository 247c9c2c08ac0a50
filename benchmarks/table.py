"""The README's tables, from the result rows alone."""

from pathlib import Path

from . import rows
from .baselines import PROVIDERS

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DENSE = "dense", "masked", "compile"
NT_XENT = "native", "dense", "masked", "compile", "products"


def markdown(paths):
    """The tables of all devices."""
    return "\n\n".join(device(path) for path in paths) or "Not measured yet."


def device(path):
    """The tables of one result file."""
    every = rows.read(path)
    by_size = {}
    for row in every:
        by_size.setdefault((row["case"], int(row["rows"])), {})[row["provider"]] = row
    sizes = [(rows_of, found) for (case, rows_of), found in sorted(by_size.items()) if case == "nt_xent"]
    objective = [(rows_of, found) for (case, rows_of), found in sorted(by_size.items()) if case == "tclr_release"]
    picture = path.with_suffix(".png")
    parts = [heading(every), nt_xent(sizes), *(tclr(found) for _, found in objective)]
    if picture.exists():
        parts.append(f"![Time and memory against rows](benchmarks/results/{picture.name})")
    return "\n\n".join(parts)


def heading(every):
    """Where the rows were taken, and with what."""
    said = {name: ", ".join(sorted({row[name] for row in every if row[name]})) for name in rows.COLUMNS}
    return (
        f"**{said['cpu']}, {said['threads']} threads, {said['isa']}** (torch {said['torch']}, Python {said['python']}, "
        f"tclr-kernels {said['tclr_kernels']} at {said['commit']}, {said['date']}; float32, forward + backward)"
    )


def nt_xent(sizes):
    """A line a size: times, the gain over the fastest dense form, and the memory beside it."""
    labels = [PROVIDERS[name].label for name in NT_XENT]
    head = ["NT-Xent, rows (D = 128)", *(f"{label}, ms" for label in labels), "gain", "MiB", "MiB, fastest form"]
    lines = []
    for M, found in sizes:
        cells = [time(found.get(name)) for name in NT_XENT]
        memory = [found.get(name, {}).get("peak_mb") or "-" for name in ("native", "dense")]
        lines.append([f"{M:,}", *cells, gain(found, DENSE), *memory])
    return grid(head, lines)


def tclr(found):
    """A line a provider of the whole objective."""
    head = ["TCLR objective, B = 40, T = 4, D = 128", "ms", "MiB", "time, of the release's structure"]
    lines = []
    for name, row in sorted(found.items(), key=lambda item: float(item[1]["p50_ms"] or "inf")):
        lines.append([PROVIDERS[name].label, time(row), row["peak_mb"] or "-", share(row, found.get("release"))])
    return grid(head, lines)


def time(row):
    """The median, or why there is none."""
    if row is None:
        return "-"
    return f"{float(row['p50_ms']):.3g}" if row["p50_ms"] else row["status"]


def gain(found, others):
    """How many times faster native is than the fastest of the others, where both were measured."""
    times = [float(found[name]["p50_ms"]) for name in others if found.get(name, {}).get("p50_ms")]
    if not times or not found.get("native", {}).get("p50_ms"):
        return "-"
    return f"{min(times) / float(found['native']['p50_ms']):.1f}x"


def share(row, whole):
    if whole is None or not row["p50_ms"] or not whole["p50_ms"]:
        return "-"
    return f"1/{float(whole['p50_ms']) / float(row['p50_ms']):.1f}" if row is not whole else "1"


def grid(head, lines):
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *lines))


def write(path, text):
    """Puts the tables between the marks of a file."""
    path = Path(path)
    before, _, rest = path.read_text().partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise SystemExit(f"{path}: found no {BEGIN} ... {END}")
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
