"""The README's table and the results page, from the result rows alone."""

from pathlib import Path

from . import accuracy, gpu_table, rows
from .providers import PROVIDERS

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
SHOWN = "native", "dense", "compile", "written", "lightly", "products", "floor"  # on the page
IN_README = "native", "dense", "compile", "lightly"
LIMITS = "products", "floor"  # lower limits to compare with, not losses
OURS = "native", "reference"
ROWS = "Time and memory against rows"
ACCURACY = "Gradient error against temperature", accuracy.path().with_suffix(".png")  # the same on every device
NAMES = {
    "nt_xent": "NT-Xent",
    "views": "instance contrast of V views",
    "local_local": "local-local",
    "global_local": "global-local",
    "clip": "CLIP",
    "rectangle": "log-sum-exp of a rectangle",
    "queue": "log-sum-exp of a rectangle, columns without gradient",
    "sup_con": "supervised contrast, 100 classes",
    "dcl": "NT-Xent, decoupled",
    "moco": "MoCo, a queue",
    "tclr_release": 'TCLR objective, form="release"',
}
PREFACE = """# Benchmarks

`make bench` measures. `python -m benchmarks page` writes this page from the rows under `benchmarks/results/`.

- Each result is compared with float64 before it is timed. A wrong result gets no time.
- The implementations of a case take turns in one process. A time is the median. The tables under "every row"
  also give the 20th and the 80th percentile.
- Memory (MiB) is the peak beyond the inputs, in a process of its own.
- "PyTorch, fastest form" normalises the rows, multiplies once, masks the diagonal in place and calls the fused
  cross-entropy. "Gain" is the time of the fastest other implementation divided by ours.
- "Its three matrix products alone" and "the arithmetic alone" are not losses but limits to compare with: the products
  of the usual form alone, and the multiply-adds and exponentials that this library needs, without memory.
- Errors are those of the loss, divided by max(1, loss), and of the gradient, divided by its largest entry.
- A + after a commit: there were changes that were not committed."""


def markdown(paths):
    """The README's tables: NT-Xent on the CPU that was measured last, and on GPUs."""
    if not paths:
        return "Not measured yet."
    every = rows.read(rows.newest(paths))
    where = "{cpu}, {threads} threads, {isa}, torch {torch}".format_map(every[0])
    on_cpu = f"{nt_xent(scaling_of(every), IN_README)}\n\n{where}; float32, forward and backward."
    return "\n\n".join([on_cpu, *gpu_table.summary(grid)])


def summary(every):
    """The times of each loss beside the fastest of the others, from the rows of one file."""
    scaling = scaling_of(every)
    others = {size: found for size, found in by_case(every).items() if size not in scaling}
    return [nt_xent(scaling, SHOWN), other_losses(others)]


def scaling_of(every):
    """The cases of NT-Xent that differ in their number of rows alone."""
    return {size: found for size, found in by_case(every).items() if rows.is_scaling(next(iter(found.values())))}


def picture(title, path):
    """The line that shows a picture on the page, in a list; an empty list if it was not drawn."""
    return [f"![{title}](../benchmarks/results/{path.name})"] if path.exists() else []


def by_case(every):
    """The rows of each case, by provider, in the order of the file."""
    cases = {}
    for row in every:
        cases.setdefault((row["case"], row["shape"], row["dtype"], row["mode"]), {})[row["provider"]] = row
    return cases


def heading(every, more=""):
    """Where the rows were taken, and with what."""
    said = {name: ", ".join(sorted({row[name] for row in every if row[name]})) for name in rows.COLUMNS}
    return (
        f"## {said['cpu']}, {said['threads']} threads, {said['isa']}{more}\n\n"
        f"torch {said['torch']}, Python {said['python']}, tclr-kernels {said['tclr_kernels']}, "
        f"commits {said['commit']}, {said['date']}. float32, forward and backward, unless a table says otherwise."
    )


def nt_xent(scaling, names):
    """A line for each size: times, the gain over the fastest other, and the memory beside the fastest form's."""
    labels = [PROVIDERS[name].label for name in names]
    head = ["NT-Xent, rows (D = 128)", *(f"{label}, ms" for label in labels), "gain", "MiB", "MiB, fastest form"]
    lines = []
    for found in scaling.values():
        memory = [found.get(name, {}).get("peak_mb") or "-" for name in ("native", "dense")]
        rows_of = int(next(iter(found.values()))["rows"])
        lines.append([f"{rows_of:,}", *(time(found.get(name)) for name in names), gain(found), *memory])
    return grid(head, lines)


def other_losses(cases):
    """A line for each case: ours, and the fastest of the others that are right."""
    head = ["loss", "inputs", "tclr-kernels, ms", "fastest other, ms", "which", "gain", "MiB", "MiB, other"]
    lines = []
    for (case, shape, dtype, mode), found in cases.items():
        kind = "".join(f", {x}" for x in (dtype, mode) if x not in ("float32", "forward+backward"))
        name = fastest_other(found)
        other = found.get(name, {})
        label = PROVIDERS[name].label if name else "-"
        cells = [time(found.get("native")), time(other) if name else "-", label, gain(found)]
        lines.append([NAMES[case] + kind, shape, *cells, found["native"]["peak_mb"], other.get("peak_mb") or "-"])
    return grid(head, lines)


def page(paths):
    """Every row of every device, as one page of Markdown."""
    parts = [PREFACE, *picture(*ACCURACY), *gpu_table.sections(grid)]
    for path in paths:
        every = rows.read(path)
        parts += [heading(every), *picture(ROWS, path.with_suffix(".png")), *summary(every)]
    for path in paths:
        every = rows.read(path)
        parts += [heading(every, ": every row"), *(case_table(key, found) for key, found in by_case(every).items())]
    return "\n\n".join(parts) + "\n"


def case_table(key, found):
    """A line for each provider, the fastest first."""
    case, shape, dtype, mode = key
    head = ["provider", "ms", "20 %", "80 %", "of native's time", "MiB", "loss error", "gradient error"]
    lines = []
    for name, row in sorted(found.items(), key=lambda item: float(item[1]["p50_ms"] or "inf")):
        numbers = [time(row), row["p20_ms"], row["p80_ms"], ratio(row, found.get("native")), row["peak_mb"]]
        lines.append([PROVIDERS[name].label, *numbers, row["loss_error"], row["grad_error"]])
    return f"### {NAMES[case]}: {shape}, {dtype}, {mode}\n\n{grid(head, lines)}"


def time(row):
    """The median, or why there is none."""
    if row is None:
        return "-"
    return f"{float(row['p50_ms']):.3g}" if row["p50_ms"] else row["status"].replace("|", "/")


def fastest_other(found):
    """The name of the fastest provider that is neither ours nor a limit; None where none was timed."""
    times = {n: float(r["p50_ms"]) for n, r in found.items() if r["p50_ms"] and n not in (*OURS, *LIMITS)}
    return min(times, key=times.get) if times else None


def gain(found):
    """How many times faster native is than the fastest of the others, where both were measured."""
    name = fastest_other(found)
    return ratio(found[name], found.get("native")) if name else "-"


def ratio(row, native):
    if native is None or not row["p50_ms"] or not native["p50_ms"]:
        return "-"
    return f"{float(row['p50_ms']) / float(native['p50_ms']):.3g}x"


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
