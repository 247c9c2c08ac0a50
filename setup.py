"""Builds the compiled kernels where it can: the package works without them, by its reference backend.

TCLR_KERNELS_REQUIRE_NATIVE=1: a build without the compiled kernels is an error. =0: they are not tried at all.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

REQUIRE = os.environ.get("TCLR_KERNELS_REQUIRE_NATIVE", "")
ROOT = Path(__file__).resolve().parent
# no -std: torch adds the one its headers need; no -m flags: each source names its own instruction set
FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno", "-Wall"]


def without_native(reason):
    """Goes on without the compiled kernels, or stops where they are required."""
    message = f"tclr_kernels is built WITHOUT its compiled kernels: {reason}"
    if REQUIRE == "1":
        raise SystemExit(f"error: {message} (TCLR_KERNELS_REQUIRE_NATIVE=1)")
    print(f"warning: {message}", file=sys.stderr)


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


setup(**native())
