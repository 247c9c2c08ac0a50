"""What is installed and what would run: python -m tclr_kernels.info [--shape G V N D] [--device D] [--dtype T]"""

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
    """Name -> version, of this package and of what it runs on; None where a package is not installed."""
    return {
        "tclr-kernels": tclr_kernels.__version__,
        "torch": torch.__version__,
        "triton": backends.triton.version(),
        "python": platform.python_version(),
    }


def cpu_model() -> str:
    """The processor's name, as /proc/cpuinfo has it where that exists."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices() -> list[str]:
    """The devices worth asking about: the CPU, and every kind of accelerator that PyTorch sees."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def serves(shape: Sequence[int], device: str, dtype: str) -> str:
    """One line on who serves the operation for sets of a shape. shape: (G, V, N, D)"""
    G, V, N, D = shape
    torch.empty(0, device=device)  # raises where there is no such device
    name = backends.choose(None, torch.device(device), G * V * N, D, getattr(torch, dtype))
    wide = torch.float64 if dtype == "float64" else torch.float32
    gram = G * (V * N) ** 2 * wide.itemsize / 2**20
    return f"G={G} V={V} N={N} D={D} {dtype} on {device}: {name} (the Gram matrix itself would take {gram:,.1f} MiB)"


def untested() -> str | None:
    """One line where this PyTorch is newer than those the package was tested with, else None."""
    version = tuple(map(int, torch.__version__.split("+")[0].split(".")[:2]))
    if version <= NEWEST_TESTED:
        return None
    newest = ".".join(map(str, NEWEST_TESTED))
    return f"torch {torch.__version__} is newer than the newest tested, {newest}; the self-test tells whether it works"


def lines(facts: dict[str, Any] | None) -> Iterator[tuple[str, str]]:
    """The report, as (name, value) pairs. facts: of `build_facts`"""
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
        kinds = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "any dtype"
        sizes = [f"{most} {of}" for most, of in ((rows, "rows"), (features, "features")) if most < math.inf]
        limit = f"{kinds}, up to {' of '.join(sizes)}" if sizes else "beyond"
        yield f"on {device}", f"{limit}: {', '.join(order)}, the first that is usable"
    yield "CUDA targets", backends.native.cuda_targets() or "none compiled"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tclr_kernels.info", description=__doc__.split(":")[0])
    parser.add_argument("--shape", type=int, nargs=4, metavar=("G", "V", "N", "D"), default=(1, 2, 512, 128))
    parser.add_argument("--device", default=str(torch.get_default_device()))
    parser.add_argument("--dtype", choices=["float64", "float32", "bfloat16", "float16"], default="float32")
    options = parser.parse_args(arguments)
    try:
        for name, value in lines(build_facts()):
            print(f"{name:<22}{value}")
        print(f"{'would serve':<22}{serves(options.shape, options.device, options.dtype)}")
    # no such device, or the environment names what is missing
    except (AssertionError, RuntimeError, ValueError) as error:
        parser.exit(1, f"error: {error}\n")


if __name__ == "__main__":
    main()
