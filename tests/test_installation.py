"""What an installation without kernels says, and what a build says that cannot compile them."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from benchmarks import importing
from tclr_kernels import info
from tclr_kernels.backends import native

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
    only = "import sys, tclr_kernels.selftest as s; s.CHECKS = {'one row': s.one_row}; sys.exit(s.main(sys.argv[1:]))"
    run = python(clone, "-c", only, "--device", "cpu")
    assert run.returncode == 1 and "missing: native on cpu: the CPU kernels are not built" in run.stdout
    assert python(clone, "-c", only, "--device", "cpu", "--allow-reference").returncode == 0
    assert python(ROOT, "-c", only, "--device", "cpu").returncode == 0


def test_kernels_that_are_older_than_the_package_are_named(monkeypatch):
    """As after `git pull` in a clone whose kernels are not built again: the reason says how to build them."""
    monkeypatch.setattr(native, "OPERATORS", (*native.OPERATORS, "of_tomorrow"))
    reason = native._load_cpu()
    assert "_cpu.so has no operator 'of_tomorrow'" in reason and "make setup" in reason


def test_every_operator_is_looked_for():
    schemas = (ROOT / "csrc" / "schemas.h").read_text()
    assert sorted(native.OPERATORS) == sorted(set(re.findall(r"^\s*\"(\w+)\(", schemas, re.MULTILINE)))


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


def test_a_build_beside_an_older_pytorch_names_its_version(tmp_path, monkeypatch):
    import setup

    monkeypatch.setattr(setup.sysconfig, "get_path", lambda name: str(tmp_path))
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.9.1+cpu'\n")
    with pytest.raises(SystemExit, match=r"error: tclr_kernels needs torch>=2.11, found torch 2.9.1\+cpu in"):
        setup.torch_folder()
    (tmp_path / "torch/version.py").write_text("__version__ = '2.15.0a0+git1234'\n")
    assert setup.torch_folder() == tmp_path / "torch"


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources, where a build may leave its files."""
    ignored = shutil.ignore_patterns(".*", "_*.so", "build", "dist", "*.egg-info")
    return shutil.copytree(ROOT, tmp_path / "sources", ignore=ignored)


@pytest.mark.skipif(sys.platform != "linux", reason="there are kernels for Linux alone")
def test_the_remedy_for_missing_kernels_builds_them_where_pip_has_cached_a_wheel_without(clone, sources, tmp_path):
    """That a build is tried is seen by its failure: the compiler that it is given does not exist."""
    without = dict(TCLR_KERNELS_REQUIRE_NATIVE="0", PIP_CACHE_DIR=str(tmp_path / "cache"))
    assert python(sources, "setup.py", "--quiet", "sdist", **without).returncode == 0
    options = ["--no-index", "--no-deps", "--no-build-isolation", f"--find-links={sources}/dist"]
    install = ["-m", "pip", "install", f"--target={tmp_path}/site", *options, "tclr-kernels"]
    reason = python(clone, "-c", "import tclr_kernels; print(tclr_kernels.available_backends('cpu')['native'])").stdout
    remedy = re.findall(r"--[a-z-]+", reason)
    assert python(tmp_path, *install, **without).returncode == 0
    again = python(tmp_path, *install, *remedy, **{**without, "TCLR_KERNELS_REQUIRE_NATIVE": "", "CXX": "/nowhere/c++"})
    assert again.returncode == 1 and "needs a C++ compiler, found no /nowhere/c++" in again.stderr + again.stdout


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="there are kernels for Linux alone")
def test_the_readmes_commands_in_their_order_install_kernels_that_pass_the_selftest(sources, tmp_path):
    section = re.search("## Install\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    commands = re.findall("^    (.*)", section, re.MULTILINE)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib"))  # PyTorch and setuptools are taken from here
    environment = {**os.environ, "PATH": f"{tmp_path}/env/bin:{os.environ['PATH']}", "PIP_NO_BUILD_ISOLATION": "0"}
    for name in "PYTHONPATH", "TCLR_KERNELS_REQUIRE_NATIVE", "TCLR_KERNELS_BACKEND", "TRITON_INTERPRET":
        environment.pop(name, None)
    run = subprocess.run(
        ["bash", "-e", "-c", "\n".join(commands)], cwd=sources, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search("native on cpu +usable", run.stdout) and "all good" in run.stdout


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


def test_the_import_takes_no_longer_than_it_may():
    """Of the processor, beside `import torch`; the rows of benchmarks/importing.py have the seconds on the clock."""
    assert min(importing.seconds()[1] for _ in range(2)) < 0.05  # the first may have to write the bytecode
