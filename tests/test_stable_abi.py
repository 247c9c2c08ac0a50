"""The compiled libraries use only what the oldest and the newest supported PyTorch offer."""

import re
import subprocess

import pytest

import setup

from . import kernels
from .torch_headers import Release, Unreachable

pytestmark = pytest.mark.skipif(kernels.compiler() is None, reason="no C++ compiler")

WARNINGS = ["-Wall", "-Wextra", "-Werror"]
SOURCES = {  # (file that is compiled with PyTorch's headers, definitions it needs in addition to those of setup.py)
    "cpu": ("ops.cpp", []),
    "cpu, objective": ("objective.cpp", []),
    "cpu, facts": ("facts.cpp", []),
    "cuda": ("cuda/bind.cpp", ['-DTCLR_CUDA_TARGETS="8.0"']),
    "cuda on the host": ("cuda/bind.cpp", ["-DTCLR_HOST_EXECUTOR"]),
}


@pytest.fixture(scope="module", params=["oldest", "newest", "installed"])
def release(request):
    if request.param == "installed":
        return Release.installed()
    try:
        return Release.cached(request.param, request.config.getoption("full"))
    except Unreachable as reason:
        pytest.skip(f"the {request.param} PyTorch: {reason}")


@pytest.mark.parametrize("source", SOURCES)
def test_the_binding_compiles_without_a_warning_and_uses_only_exported_symbols(source, release, tmp_path):
    file, definitions = SOURCES[source]
    made = tmp_path / "binding.o"
    command = [
        kernels.compiler(),
        *setup.BINDING_FLAGS,
        *WARNINGS,
        *definitions,
        f"-I{kernels.CSRC}",
        "-isystem",
        str(release.include),
    ]
    run = subprocess.run([*command, "-c", kernels.CSRC / file, "-o", made], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    undefined = subprocess.run(["nm", "-u", made], check=True, capture_output=True, text=True).stdout.split()
    needed = {name for name in undefined if re.match("(aoti_)?torch_", name)}
    assert (needed or file == "facts.cpp") and not needed - release.symbols
    # no C++ symbols of PyTorch, since they change with every release
    assert not [name for name in undefined if re.match(r"_ZNK?(2at|3c10|5torch)", name)]


@pytest.mark.parametrize("source", sorted({file for file, _ in SOURCES.values()}))
def test_functions_looked_up_by_dlsym_are_declared_in_the_headers(source, release):
    names = re.findall(r'dlsym\(\w+, "(\w+)"\)', (kernels.CSRC / source).read_text())
    declared = "".join(path.read_text() for path in (release.include / "torch/csrc/inductor").rglob("shim*.h"))
    assert all(f"{name}(" in declared for name in names)
