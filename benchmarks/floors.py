"""Lower limits to compare with: the matrix products alone, and the arithmetic that every kernel must do."""

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch


def products(inputs):
    """The three dense matrix products of NT-Xent's forward and backward, into memory allocated before."""
    z = torch.cat([x.detach() for x in inputs])
    S, dz = z.new_empty(len(z), len(z)), torch.empty_like(z)

    def step():
        torch.mm(z, z.T, out=S)
        torch.mm(S, z, out=dz)
        torch.mm(S.T, z, out=dz)

    return step


def arithmetic(inputs):
    """4 D M^2 flop and M^2 exponentials, in registers: what NT-Xent costs if the symmetry of the matrix is used."""
    M, D = 2 * len(inputs[0]), inputs[0].shape[1]
    return in_registers(2 * D * M * M, M * M)


def in_registers(multiply_adds, exponentials):
    """A step of so much arithmetic, by PyTorch's number of threads, without any memory."""
    run, threads = _library().arithmetic, torch.get_num_threads()
    return lambda: run(ctypes.c_double(multiply_adds), ctypes.c_double(exponentials), threads)


@functools.cache
def _library():
    """`floor.c`, compiled for this machine."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("no C compiler")
    folder = tempfile.mkdtemp()
    path = Path(folder) / "floor.so"
    source = Path(__file__).with_name("floor.c")
    flags = ["-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, str(source), "-o", str(path)], check=True, capture_output=True)
    return ctypes.CDLL(str(path))
