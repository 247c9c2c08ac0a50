"""What an installation without kernels says, and what a build says that cannot make them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tclr_kernels import info

ROOT = Path(__file__).parents[1]
CALL = "import torch, tclr_kernels as tk; x = torch.ones(2, 3); "


@pytest.fixture
def clone(tmp_path):
    """A copy of the package, as a fresh clone has it: without kernels."""
    shutil.copytree(ROOT / "tclr_kernels", tmp_path / "clone/tclr_kernels", ignore=shutil.ignore_patterns("_*.so"))
    return tmp_path / "clone"


def python(folder, *arguments, **environment):
    environment = {**os.environ, "PYTHONPATH": "", **environment}
    for name in "TCLR_KERNELS_BACKEND", "TRITON_INTERPRET":
        environment.pop(name, None)
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(sys.platform != "linux", reason="there are kernels for Linux alone")
@pytest.mark.parametrize(
    "call", ["tk.nt_xent(x, x)", "torch.compile(tk.nt_xent, fullgraph=True, backend='eager')(x, x)"]
)
def test_the_reference_as_default_warns_once_where_kernels_belong(call, clone):
    run = python(clone, "-c", f"{CALL} {call}; {call}; tk.nt_xent(x[:1], x[:1])")
    assert (
        run.returncode == 0
        and run.stderr.count("computes on cpu without kernels: native: the CPU kernels are not") == 1
    )
    named = python(clone, "-c", f"{CALL} tk.nt_xent(x, x, backend='reference')")
    assert named.returncode == 0 and "without kernels" not in named.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="there are kernels for Linux alone")
def test_a_clone_without_kernels_names_the_installation_that_it_hides(clone, tmp_path):
    site = tmp_path / "site"
    (site / "tclr_kernels").mkdir(parents=True)
    (site / "tclr_kernels/_cpu.so").touch()
    (site / "tclr_kernels-0.1.0.dist-info").mkdir()
    (site / "tclr_kernels-0.1.0.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: tclr-kernels\nVersion: 0.1\n"
    )
    run = python(clone, "-c", "import tclr_kernels", PYTHONPATH=str(site))
    assert run.returncode == 0 and f"which hides the installed package {site}/tclr_kernels" in run.stderr


@pytest.mark.skipif(not (ROOT / "tclr_kernels/_cpu.so").exists(), reason="the kernels are not built")
def test_the_selftest_fails_without_kernels_unless_that_is_allowed(clone):
    only = (
        "import sys, tclr_kernels.selftest as s; s.CHECKS = {'one row': s.d7_one_row}; sys.exit(s.main(sys.argv[1:]))"
    )
    run = python(clone, "-c", only, "--device", "cpu")
    assert run.returncode == 1 and "missing: native on cpu: the CPU kernels are not built" in run.stdout
    assert python(clone, "-c", only, "--device", "cpu", "--allow-reference").returncode == 0
    assert python(ROOT, "-c", only, "--device", "cpu").returncode == 0


@pytest.mark.parametrize(
    "environment, message",
    [
        (
            dict(CXX="/nowhere/c++"),
            r"needs a C\+\+ compiler, found no /nowhere/c\+\+; TCLR_KERNELS_REQUIRE_NATIVE=0 installs",
        ),
        (dict(CXX="false"), "kernels do not compile: false .*; TCLR_KERNELS_REQUIRE_NATIVE=0 installs without"),
    ],
)
def test_a_build_that_cannot_compile_stops_in_one_sentence(environment, message, tmp_path):
    command = [str(ROOT / "setup.py"), "--quiet", "build_ext", f"--build-temp={tmp_path}", f"--build-lib={tmp_path}"]
    run = python(ROOT, *command, TCLR_KERNELS_REQUIRE_NATIVE="", **environment)
    assert run.returncode == 1
    assert re.fullmatch(f"error: tclr_kernels.*{message}.*", run.stderr.strip())


def test_the_trainer_without_its_extra_names_it(tmp_path):
    """With the interpreter's own packages and PyTorch's alone: those of the extra are hidden by empty entries."""
    code = "import sys; sys.modules.update(rich=None, av=None); import tclr"
    run = python(tmp_path, "-c", code, PYTHONPATH=str(ROOT / "python"))
    assert run.returncode == 1
    assert run.stderr.strip().endswith("the trainer needs av, rich: pip install 'tclr-kernels[train]'")


def test_the_index_page_has_absolute_addresses_alone():
    import setup

    links = re.findall(r"\]\(([^)]*)\)", setup.readme())
    assert len(links) > 10 and all(link.startswith(("https://", "#")) for link in links)
    assert any(link.endswith(".png") and "/raw/" in link for link in links)


@pytest.mark.parametrize(
    "version, warned", [("2.11.0", False), ("2.15.3+cu130", False), ("2.16.0a0", True), ("3.0", True)]
)
def test_info_warns_of_a_pytorch_newer_than_those_tested(version, warned, monkeypatch):
    monkeypatch.setattr(torch, "__version__", version)
    assert (info.untested() is not None) == warned
