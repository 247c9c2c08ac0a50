"""The portable CPU kernels on AArch64: cross-compiled, run in an emulator, compared with the reference."""

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch

import setup

from . import kernels

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
missing = [name for name in (COMPILER, EMULATOR) if shutil.which(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"no {' and no '.join(missing)}")


class Emulated(kernels.Kernels):
    """A kernel backend whose calls another process runs."""

    def __init__(self, program):
        self.process = subprocess.Popen([EMULATOR, program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.keep = False

    def local_local(self, pos, scale):
        V, _, N = pos.shape
        self._send(struct.pack("<11q1d5q", -1, V, N, *[0] * 8, scale, *[0] * 5), pos)
        return self._receive(torch.empty(V, N, dtype=pos.dtype)), self._receive(torch.empty_like(pos))

    def _call(self, sets, tau, normalize, cross, backward, blocks, dz, zdz):
        G, N, D = sets[0].shape
        flags = kernels.DTYPES.index(sets[0].dtype), normalize, cross, self.keep, backward
        given = [backward and x is not None for x in blocks] + [False] * (5 - len(blocks))
        header = struct.pack("<11q1d5q", G, len(sets), N, D, 1, -1, *flags, float(tau), *given)
        self._send(header, *sets, *(x for x, present in zip(blocks, given, strict=False) if present))
        for x in [*dz, zdz] if backward else blocks:
            self._receive(x)

    def _send(self, header, *tensors):
        data = (x.contiguous().flatten().view(torch.uint8).numpy().tobytes() for x in tensors)
        self.process.stdin.write(b"".join([header, *data]))
        self.process.stdin.flush()

    def _receive(self, x):
        data = self.process.stdout.read(x.nbytes)
        assert len(data) == x.nbytes, f"the emulated program ended: {self.process.poll()}"
        return x.copy_(torch.frombuffer(bytearray(data), dtype=x.dtype).view(x.shape))


def test_the_portable_kernels_agree_with_the_reference_on_aarch64(tmp_path, request):
    sources = [kernels.CSRC.parent / "tests" / name for name in ("emulated.cpp", "kernels.cpp")]
    sources.append(kernels.CSRC / "cpu/portable.cpp")
    command = [COMPILER, "-std=c++17", "-O2", "-static", "-pthread", f"-I{kernels.CSRC}", *sources]
    subprocess.run([*command, "-o", tmp_path / "kernels"], check=True)
    dtypes = kernels.DTYPES if request.config.getoption("full") else [torch.float32]
    emulated = Emulated(tmp_path / "kernels")
    assert not list(kernels.deviations(emulated, dtypes))
    emulated.process.communicate()
    assert emulated.process.returncode == 0


@pytest.mark.parametrize("source", [*kernels.CSRC.glob("*.cpp"), *kernels.CSRC.glob("cpu/*.cpp")], ids=lambda p: p.name)
def test_every_source_compiles_for_aarch64_without_a_warning(source, tmp_path):
    command = [COMPILER, *setup.FLAGS, "-Wextra", "-Werror", "-isystem", Path(torch.__file__).parent / "include", "-c"]
    subprocess.run([*command, source, "-o", tmp_path / "object.o"], check=True)
