"""Builds the compiled kernels: `tclr_kernels/_cpu.so` and, if nvcc is found, `tclr_kernels/_cuda.so`.

Both are shared libraries, not Python modules, and use only the stable ABI of PyTorch 2.11. So one build works with
every later PyTorch and with every Python. Compiling needs a C++ compiler and an installed PyTorch with its headers.

TCLR_KERNELS_REQUIRE_NATIVE=0 installs without the kernels, so that only the reference backend works, as on macOS. With
=1, an installation without kernels is an error on macOS and Windows, too.
TCLR_KERNELS_CUDA=1 makes a build without the CUDA kernels an error, and =0 leaves them out. By default they are built
if nvcc is found and PyTorch is a CUDA build. TCLR_KERNELS_CUDA_ARCHS lists their targets, such as "8.0 9.0a 10.0+PTX".
CXX, CXXFLAGS and LDFLAGS are used as usual.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

REQUIRE = os.environ.get("TCLR_KERNELS_REQUIRE_NATIVE", "")
ROOT = Path(__file__).resolve().parent
SOURCE = ROOT / "csrc"
# TORCH_TARGET_VERSION is the oldest supported PyTorch, 2.11. There is no -m option, since each source sets its own
# instruction set by a pragma.
BINDING_FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL"]
FLAGS = [*BINDING_FLAGS, "-O3", "-g0", "-ffp-contract=fast", "-fno-math-errno", "-Wall", f"-I{SOURCE}"]

CUDA = os.environ.get("TCLR_KERNELS_CUDA", "")
TARGETS = os.environ.get("TCLR_KERNELS_CUDA_ARCHS") or "8.0 9.0a 10.0+PTX"
CUDA_SOURCES = SOURCE / "cuda/kernels.cu", SOURCE / "cuda/rectangle.cu"
NVCC_FLAGS = ["-std=c++17", "-O3", "--threads=0", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]

WITHOUT = "TCLR_KERNELS_REQUIRE_NATIVE=0 installs without the compiled kernels"


def compiler():
    """The C++ compiler's command."""
    command = shlex.split(os.environ.get("CXX") or "c++")
    if shutil.which(command[0]) is None:
        raise SystemExit(f"error: tclr_kernels needs a C++ compiler, found no {command[0]}; {WITHOUT}")
    return command


def torch_folder():
    """Where PyTorch is installed: found as files, since an isolated build cannot import it."""
    for place in sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path:
        folder = Path(place) / "torch"
        if not (folder / "version.py").exists():
            continue
        version = re.search("__version__ = '(.*)'", (folder / "version.py").read_text())[1]
        if tuple(map(int, version.split(".")[:2])) >= (2, 11):
            return folder
        raise SystemExit(f"error: tclr_kernels needs torch>=2.11, found torch {version} in {folder}; {WITHOUT}")
    raise SystemExit(
        "error: tclr_kernels compiles with PyTorch's headers: install torch>=2.11 first, and add --no-build-isolation "
        f"if this build does not find it; {WITHOUT}"
    )


def has_cuda(torch):
    return re.search(r"^cuda\b.*= '", (torch / "version.py").read_text(), re.MULTILINE) is not None


def cpu(folder, objects):
    """Builds `_cpu.so`, the CPU kernels, in the folder. Only sources that are newer than their objects are compiled."""
    torch = torch_folder()
    flags = [*compiler(), *FLAGS, *shlex.split(os.environ.get("CXXFLAGS", "")), "-isystem", torch / "include"]
    headers = max(path.stat().st_mtime for path in (*SOURCE.rglob("*.h"), *SOURCE.rglob("*.inl"), Path(__file__)))

    def compiled(source):
        made = objects / source.relative_to(SOURCE).with_suffix(".o")
        made.parent.mkdir(parents=True, exist_ok=True)
        if not made.exists() or made.stat().st_mtime < max(headers, source.stat().st_mtime):
            run([*flags, "-c", source, "-o", made])
        return made

    folder.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the slow ones first
        made = list(pool.map(compiled, [*sorted(SOURCE.glob("cpu/*.cpp")), *sorted(SOURCE.glob("*.cpp"))]))
    link(compiler(), made, torch, folder / "_cpu.so")


def link(command, objects, torch, library):
    """Links a library with PyTorch. It replaces the old file atomically, since a process may have loaded it."""
    flags = ["-shared", *shlex.split(os.environ.get("LDFLAGS", "")), f"-L{torch}/lib", "-ltorch_cpu", "-lc10"]
    new = library.with_suffix(".new")
    run([*command, *objects, *flags, "-o", new])
    new.replace(library)


def run(command):
    print(shlex.join(map(str, command)))
    subprocess.run(command, check=True)


def nvcc():
    """The path of nvcc, or None if it is not found."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (home and shutil.which("nvcc", path=f"{home}/bin")) or shutil.which("nvcc")


def supported_targets():
    """Those of TARGETS that this nvcc supports. Prints a warning for the others, which are too new for it."""
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
    """Builds `_cuda.so`, the CUDA kernels, in the folder, or says why not. Without them, the CPU kernels still work."""
    torch = torch_folder()
    if CUDA == "0" or (CUDA != "1" and (nvcc() is None or not has_cuda(torch))):
        return
    try:
        if nvcc() is None:
            raise FileNotFoundError("nvcc is neither in CUDA_HOME/bin nor in PATH")
        for path in folder, objects:
            path.mkdir(parents=True, exist_ok=True)
        made = [objects / f"{source.stem}.o" for source in CUDA_SOURCES]
        binding = objects / "bind.o"
        targets = supported_targets()
        named = " ".join(targets)
        hopper = ["-DTCLR_HOPPER"] if "9.0a" in named else []  # kernels with instructions that only 9.0a has
        for source, kernels in zip(CUDA_SOURCES, made, strict=True):
            run([nvcc(), *NVCC_FLAGS, *hopper, *gencode(targets), "-c", source, "-o", kernels])
        flags = [*BINDING_FLAGS, f'-DTCLR_CUDA_TARGETS="{named}"', f"-I{torch}/include"]
        run([*compiler(), *flags, "-c", SOURCE / "cuda/bind.cpp", "-o", binding])
        link([nvcc()], [*made, binding], torch, folder / "_cuda.so")  # nvcc links its runtime statically
    except (OSError, subprocess.CalledProcessError) as error:
        message = f"tclr_kernels is built WITHOUT its CUDA kernels: {error}"
        if CUDA == "1":
            raise SystemExit(f"error: {message} (TCLR_KERNELS_CUDA=1)") from None
        print(f"warning: {message}", file=sys.stderr)


class Build(build_ext):
    """Builds the libraries where setuptools would build a Python extension."""

    def run(self):
        root = ROOT if self.inplace or self.editable_mode else Path(self.build_lib)
        try:
            cpu(root / "tclr_kernels", Path(self.build_temp))
        except subprocess.CalledProcessError as error:
            command = shlex.join(map(str, error.cmd))
            raise SystemExit(f"error: tclr_kernels' kernels do not compile: {command}; {WITHOUT}") from None
        cuda(root / "tclr_kernels", Path(self.build_temp) / "cuda")

    def get_outputs(self):
        return [str(path) for path in Path(self.build_lib).glob("tclr_kernels/_*.so")]


class Wheel(bdist_wheel):
    """A wheel for any Python 3 on this platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


def native():
    """The arguments with which `setup` builds the kernels; empty if they are not wanted or not supported."""
    if REQUIRE == "0":
        return {}
    if sys.platform != "linux":
        if REQUIRE == "1":
            raise SystemExit(f"error: tclr_kernels has compiled kernels for Linux, not for {sys.platform}; {WITHOUT}")
        print(f"tclr_kernels has no compiled kernels for {sys.platform}: only `reference` works", file=sys.stderr)
        return {}
    return dict(ext_modules=[Extension("tclr_kernels._cpu", [])], cmdclass=dict(build_ext=Build, bdist_wheel=Wheel))


def readme():
    """The README for a package index, with absolute links, since relative ones do not work there."""
    (address,) = re.findall(r'^Source = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)

    def absolute(match):
        picture, text, path = match.groups()
        return f"{picture}[{text}]({address}/{'raw' if picture else 'blob'}/main/{path})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?:|#)([^)]*)\)", absolute, (ROOT / "README.md").read_text())


if __name__ == "__main__":
    setup(**native(), long_description=readme(), long_description_content_type="text/markdown")
