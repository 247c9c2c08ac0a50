"""Shows versions and usable backends: python -m tclr_kernels.info [--shape G V N D] [--device D] [--dtype T]"""

import argparse
import math
import platform
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import tclr_kernels

from . import backends
from .backends.native import build_facts

NEWEST_TESTED = 2, 15


def versions() -> dict[str, str | None]:
    """{name: version} of this package and of what it runs on; None if a package is not installed."""
    return {
        "tclr-kernels": tclr_kernels.__version__,
        "torch": torch.__version__,
        "triton": backends.triton.version(),
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The name of the CPU, from /proc/cpuinfo if that exists."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices() -> list[str]:
    """The devices to report on: the CPU, and the accelerator that PyTorch sees, if any."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def default_for(shape: Sequence[int], device: str, dtype: str) -> str:
    """A line that says which backend is the default for a shape (G, V, N, D)."""
    G, V, N, D = shape
    torch.empty(0, device=device)  # raises an error if there is no such device
    name = backends.choose(None, torch.device(device), G * V * N, D, getattr(torch, dtype))
    wide = torch.float64 if dtype == "float64" else torch.float32
    gram = G * (V * N) ** 2 * wide.itemsize / 2**20
    return f"{name}, for --shape {G} {V} {N} {D} in {dtype} on {device}, whose Gram matrix would take {gram:,.1f} MiB"


def untested() -> str | None:
    """A warning if this PyTorch is newer than those that the package was tested with, else None."""
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"torch {torch.__version__} is newer than {newest}, the newest tested; run the self-test to see if it works"


def lines(facts: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The lines of the report, as (name, value). facts: from `build_facts`, or None."""
    yield from ((name, version or "not installed") for name, version in versions().items())
    yield "cpu", f"{cpu_model()}, {torch.get_num_threads()} threads"
    for device in devices():
        for name, reason in tclr_kernels.available_backends(device).items():
            yield f"{name} on {device}", reason or "usable"
    if (beyond := untested()) is not None:
        yield "warning", beyond
    if facts is not None:
        yield "compiled by", f"{facts['compiler']}, with the headers of torch {facts['torch']}"
        yield "instruction sets", f"{', '.join(facts['isa_levels'])}; in use: {facts['isa']}"
    for device, dtypes, rows, features, order in backends.REGIMES:
        kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "any dtype"
        sizes = [f"{most} {of}" for most, of in ((rows, "rows"), (features, "features")) if most < math.inf]
        limit = f"{kinds}, up to {' of '.join(sizes)}" if sizes else "otherwise"
        if "cuda" in devices():
            yield f"default on {device}", f"{limit}: the first usable one of {', '.join(order)}"
    yield "CUDA targets", backends.native.cuda_targets() or "none: the CUDA kernels are not built"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tclr_kernels.info", description=__doc__.split(":")[0])
    parser.add_argument(
        "--shape",
        type=int,
        nargs=4,
        metavar=("G", "V", "N", "D"),
        default=(1, 2, 512, 128),
        help="show the default backend for G groups of V sets of N rows with D features",
    )
    parser.add_argument("--device", default=str(torch.get_default_device()), help="the device for --shape")
    dtypes = ["float64", "float32", "bfloat16", "float16"]
    parser.add_argument("--dtype", choices=dtypes, default="float32", help="the data type for --shape")
    options = parser.parse_args(arguments)
    try:
        for name, value in lines(build_facts()):
            print(f"{name:<22}{value}")
        print(f"{'default backend':<22}{default_for(options.shape, options.device, options.dtype)}")
    # such as an unknown device, or an environment variable that names a backend that cannot run
    except (AssertionError, RuntimeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
