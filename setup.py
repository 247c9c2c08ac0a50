"""Builds the compiled kernels where it can: the package works without them, by its reference backend.

TCLR_KERNELS_REQUIRE_NATIVE=1: a build without the compiled kernels is an error. =0: they are not tried at all.
TCLR_KERNELS_CUDA=1: a build without the CUDA kernels is an error. =0: they are not tried. Else they are built where
nvcc is and PyTorch has CUDA, for TCLR_KERNELS_CUDA_ARCHS, such as "8.0 9.0a 10.0+PTX".
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

REQUIRE = os.environ.get("TCLR_KERNELS_REQUIRE_NATIVE", "")
ROOT = Path(__file__).resolve().parent
# no -std: torch adds the one its headers need; no -m flags: each source names its own instruction set
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]

CUDA = os.environ.get("TCLR_KERNELS_CUDA", "")
TARGETS = os.environ.get("TCLR_KERNELS_CUDA_ARCHS") or "8.0 9.0a 10.0+PTX"
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# by the stable ABI: what 2.11 has serves every later PyTorch, and compiles and loads beside one without CUDA
BINDING_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]


def without_native(reason):
    """Goes on without the compiled kernels, or stops where they are required."""
    message = f"tclr_kernels is built WITHOUT its compiled kernels: {reason}"
    if REQUIRE == "1":
        raise SystemExit(f"error: {message} (TCLR_KERNELS_REQUIRE_NATIVE=1)")
    print(f"warning: {message}", file=sys.stderr)


def nvcc():
    """The compiler's path, or None."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def supported_targets():
    """Those of TARGETS that this nvcc compiles for; prints the others, which an older one does not know."""
    listed = subprocess.run([nvcc(), "--list-gpu-arch"], check=True, capture_output=True, text=True).stdout.split()
    wanted = TARGETS.replace(",", " ").replace(";", " ").split()
    known = [target for target in wanted if f"compute_{re.sub('[^0-9]', '', target)}" in listed]
    if left_out := [target for target in wanted if target not in known]:
        print(f"warning: {nvcc()} cannot compile for {' '.join(left_out)}: left out", file=sys.stderr)
    if not known:
        raise OSError(f"{nvcc()} compiles for none of {TARGETS} (TCLR_KERNELS_CUDA_ARCHS)")
    return known


def gencode(targets):
    """Targets such as "9.0a" as nvcc's flags."""
    flags = []
    for target in targets:
        number = target.removesuffix("+PTX").replace(".", "")
        codes = f"[sm_{number},compute_{number}]" if target.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return flags


def cuda(folder, objects):
    """Builds the CUDA kernels, `_cuda.so` in the folder, without PyTorch's headers but for the binding's; or says why
    not. They are a library of their own: whatever becomes of them, the CPU's are there."""
    import torch

    if CUDA == "0" or (CUDA != "1" and (nvcc() is None or torch.version.cuda is None)):
        return
    try:
        if nvcc() is None:
            raise FileNotFoundError("nvcc is neither in CUDA_HOME/bin nor in PATH")
        source, torch_folder = ROOT / "csrc/cuda", Path(torch.__file__).parent
        for path in folder, objects:
            path.mkdir(parents=True, exist_ok=True)
        kernels, binding = objects / "kernels.o", objects / "bind.o"
        targets = supported_targets()
        named = " ".join(targets)
        run([nvcc(), *NVCC_FLAGS, *gencode(targets), "-c", source / "kernels.cu", "-o", kernels])
        flags = [*BINDING_FLAGS, f'-DTCLR_CUDA_TARGETS="{named}"', f"-I{torch_folder}/include"]
        run([os.environ.get("CXX", "c++"), *flags, "-c", source / "bind.cpp", "-o", binding])
        # nvcc links its own runtime in, statically
        link = [kernels, binding, f"-L{torch_folder}/lib", "-ltorch_cpu", "-lc10", "-o", folder / "_cuda.so"]
        run([nvcc(), "-shared", *link])
    except (OSError, subprocess.CalledProcessError) as error:
        message = f"tclr_kernels is built WITHOUT its CUDA kernels: {error}"
        if CUDA == "1":
            raise SystemExit(f"error: {message} (TCLR_KERNELS_CUDA=1)") from None
        print(f"warning: {message}", file=sys.stderr)


def run(command):
    print(" ".join(map(str, command)))
    subprocess.run(command, check=True)


def native():
    """The extension and the command that builds it, as arguments of `setup`; none where it cannot be built."""
    if REQUIRE == "0":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError as error:
        without_native(f"{error} (install torch first, then this package with pip install --no-build-isolation)")
        return {}

    class Build(BuildExtension):
        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:  # whatever compilers and their drivers raise
                without_native(f"{type(error).__name__}: {error}")
                self.extensions = []

        def run(self):
            root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
            super().run()
            if self.extensions:
                cuda(root / "tclr_kernels", Path(self.build_temp) / "cuda")

    sources = [path for pattern in ("*.cpp", "cpu/*.cpp") for path in sorted((ROOT / "csrc").glob(pattern))]
    headers = [path for suffix in ("h", "inl") for path in (ROOT / "csrc").rglob(f"*.{suffix}")]
    extension = CppExtension(
        "tclr_kernels._C",
        [str(path.relative_to(ROOT)) for path in sources],
        depends=[str(path.relative_to(ROOT)) for path in headers],
        include_dirs=[str(ROOT / "csrc")],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
    )
    return dict(ext_modules=[extension], cmdclass=dict(build_ext=Build))


if __name__ == "__main__":
    setup(**native())
