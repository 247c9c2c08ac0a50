"""The tables of GPU times, from the rows that `python -m benchmarks.gpu` has measured."""

from . import rows

FLOPS = 790e12  # per second: cuBLAS on an H100, large products of bfloat16 with random numbers
PREFACE = f"""Times are device times of loss and gradient together, in microseconds: the median of several replays of a
CUDA graph. "Three products" is the time of the matrix products that the usual form needs, by cuBLAS, and nothing else.
The floor is the time of our own products (for M x D rows, 5 M^2 D operations in NT-Xent and half of that in CLIP) at
{FLOPS / 1e12:.0f} TFLOP/s, the rate of cuBLAS on this GPU. "Eager" is the time from the call of the loss until its
gradient is there, by the host's clock. MiB is the peak memory beyond the inputs: of the faster backend, and of
PyTorch's form."""


def read(kind):
    """The rows of each device: a list of (device, rows)."""
    found = []
    for path in sorted(rows.RESULTS.glob(f"{kind}-*.csv")):
        every = rows.read(path)
        found.append((every[0]["device"], every))
    return found


def problems(every):
    """The rows of each problem, by backend, in the order of the file."""
    found = {}
    for row in every:
        key = row["loss"], int(row["M"]), int(row.get("K") or 0), int(row["D"]), row["dtype"]
        found.setdefault(key, {})[row["backend"]] = row
    return found


def microseconds(row, column):
    return float(row[column]) if row and row.get(column) else None


def shown(value, digits=3):
    return "-" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.{digits}g}"


def floor(loss, M, D, dtype):
    """Microseconds of the products at the rate FLOPS; None for losses and dtypes with other products."""
    if loss not in ("nt_xent", "clip_loss") or dtype not in ("bfloat16", "float16"):
        return None
    return 5 * M * M * D / (1 if loss == "nt_xent" else 2) / FLOPS * 1e6


def line(key, by_backend):
    loss, M, K, D, dtype = key
    both = {name: microseconds(by_backend.get(name), "both_us") for name in ("native", "triton")}
    eager = {name: microseconds(by_backend.get(name), "eager_us") for name in ("native", "triton")}
    one = by_backend.get("triton") or by_backend["native"]
    plain, compiled = microseconds(one, "pytorch_us"), microseconds(one, "compile_us")
    fastest = min((name for name in both if both[name]), key=both.get, default="triton")
    best = both[fastest]
    others = [time for time in (plain, compiled) if time]
    gain = f"{min(others) / best:.2g}x" if best and others else "-"
    least = floor(loss, M, D, dtype)
    share = f"{100 * least / best:.0f} %" if least and best and M >= 8192 else "-"
    memory = [shown(microseconds(by_backend.get(fastest), "extra_MiB")), shown(microseconds(one, "pytorch_MiB"))]
    sizes = f"{M:,} x {D}" + (f", {K:,} negatives" if K else "")
    eagers = [shown(eager["native"]), shown(eager["triton"]), shown(microseconds(one, "pytorch_eager_us"))]
    times = [shown(both["native"]), shown(both["triton"]), shown(plain), shown(compiled)]
    return [loss, sizes, dtype, *times, shown(microseconds(one, "three_products_us")), gain, share, *eagers, *memory]


HEAD = ["loss", "rows", "dtype", "native", "Triton", "PyTorch, fastest form", "torch.compile", "three products", "gain"]
HEAD += ["floor / our time", "eager: native", "eager: Triton", "eager: PyTorch", "MiB", "MiB, PyTorch"]
OBJECTIVE = ["videos", "in a CUDA graph", "eager", "kernels", "the official code's structure, eager"]


def sections(grid):
    """Headings and tables of all devices, as parts of a page. grid: makes a table from its head and its lines"""
    parts, objectives = [], dict(read("objective"))
    for device, every in read("operation"):
        said = every[0]
        parts += [
            f"## {device}",
            f"torch {said['torch']}, Triton {said['triton']}, {said['commit']}, {said['date']}. {PREFACE}",
        ]
        parts.append(grid(HEAD, [line(*problem) for problem in problems(every).items()]))
        lines = [
            [row["B"], *(shown(microseconds(row, column)) for column in ("graph_us", "eager_us")), row["launches"]]
            + [shown(microseconds(row, "release_us"))]
            for row in objectives.get(device, [])
        ]
        if lines:
            parts += ["The whole TCLR objective in float32 (4 local clips, D = 128):", grid(OBJECTIVE, lines)]
    return parts


def summary(grid, M=(512, 8192, 32768, 131072), D=128):
    """NT-Xent in bfloat16 for the README: parts of a page, none where no GPU was measured."""
    parts = []
    for device, every in read("operation"):
        lines = []
        for key, found in problems(every).items():
            loss, rows_of, K, features, dtype = key
            if (loss, K, features, dtype) != ("nt_xent", 0, D, "bfloat16") or rows_of not in M:
                continue
            best = min(float(row["both_us"]) for row in found.values() if row["both_us"])
            cells = line(key, found)
            lines.append([f"{rows_of:,}", shown(best), *cells[5:7], cells[8], *cells[13:]])
        head = ["NT-Xent, rows (D = 128)", "tclr-kernels, us", *(f"{name}, us" for name in HEAD[5:7]), HEAD[8]]
        parts += [grid([*head, *HEAD[13:]], lines), f"{device}, torch {every[0]['torch']}; bfloat16, in a CUDA graph."]
    return parts
