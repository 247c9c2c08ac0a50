"""What is installed and what would run: python -m tclr_kernels.info [--shape G V N D] [--device D] [--dtype T]"""

import argparse
import math
import platform

import torch

import tclr_kernels

from . import backends

REBUILD = "to see why: TCLR_KERNELS_REQUIRE_NATIVE=1 pip install -v --no-build-isolation tclr-kernels"


def versions():
    """Name -> version, of this package and of what it runs on; None where a package is not installed."""
    return {
        "tclr-kernels": tclr_kernels.__version__,
        "torch": torch.__version__,
        "triton": backends.triton.version(),
        "python": platform.python_version(),
    }


def build_facts():
    """How the compiled extension was built, and the instruction set it uses here; None without it."""
    try:
        from . import _C
    except ImportError:
        return None
    return _C.build_facts()


def cpu_model():
    """The processor's name, as /proc/cpuinfo has it where that exists."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def devices():
    """The devices worth asking about: the CPU, and every kind of accelerator that PyTorch sees."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu"] if accelerator is None else ["cpu", accelerator.type]


def serves(shape, device, dtype):
    """One line on who serves the operation for sets of a shape. shape: (G, V, N, D)"""
    G, V, N, D = shape
    torch.empty(0, device=device)  # raises where there is no such device
    name = backends.choose(None, torch.device(device), G * V * N, D, getattr(torch, dtype))
    wide = torch.float64 if dtype == "float64" else torch.float32
    gram = G * (V * N) ** 2 * wide.itemsize / 2**20
    return f"G={G} V={V} N={N} D={D} {dtype} on {device}: {name} (the Gram matrix itself would take {gram:,.1f} MiB)"


def lines(facts):
    """The report, as (name, value) pairs. facts: of `build_facts`"""
    yield from ((name, version or "not installed") for name, version in versions().items())
    yield "cpu", f"{cpu_model()}, {torch.get_num_threads()} threads"
    for device in devices():
        for name, reason in tclr_kernels.available_backends(device).items():
            yield f"{name} on {device}", reason or "usable"
    if facts is None:
        yield "compiled kernels", f"none; {REBUILD}"
        return
    yield "compiled by", f"{facts['compiler']}, against torch {facts['torch']}"
    if facts["torch"].split("+")[0] != torch.__version__.split("+")[0]:
        yield "", f"running torch {torch.__version__}: build the package again"
    yield "instruction sets", f"{', '.join(facts['isa_levels'])}; in use: {facts['isa']}"
    for device, dtypes, rows, features, order in backends.REGIMES:
        kinds = " ".join(str(dtype).removeprefix("torch.") for dtype in dtypes) or "any dtype"
        limit = f"{kinds}, up to {rows} rows of {features} features" if rows < math.inf else "beyond"
        yield f"on {device}", f"{limit}: {', '.join(order)}, the first that is usable"
    yield "CUDA targets", backends.native.cuda_targets() or "none compiled"


def main(arguments=None):
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
