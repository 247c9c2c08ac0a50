"""The documentation: its code runs, its commands exist, its links work, and its drawings are up to date."""

import functools
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/README.md")]
PAGES += sorted(path for path in (ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"```(python|diff)\n(.*?)```(?:\n+((?: {4}[^\n]*\n)+))?", re.DOTALL)
OF_PROCESSES = ROOT / "docs" / "processes.md"  # whose loops run in test_distributed_training.py
STARTS = "make", "tclr", "python", ".venv/bin/python", "pip", "pytest", "torchrun", "accelerate", "bash", "cd"
COMMAND = re.compile(rf"^ {{4}}((?:[A-Z_]+=\S+ )*(?:{'|'.join(map(re.escape, STARTS))}) .*)$", re.MULTILINE)


def name(path):
    return path.relative_to(ROOT).as_posix()


def blocks(page):
    """(code, indented text after it) for every block. For a diff, the code is the added lines."""
    for kind, code, output in BLOCK.findall(page.read_text()):
        yield "".join(re.findall(r"^\+(.*\n)", code, re.MULTILINE)) if kind == "diff" else code, output


@pytest.mark.parametrize("page", [page for page in PAGES if any(blocks(page)) and page != OF_PROCESSES], ids=name)
def test_the_code_of_a_page_runs_as_pasted(page, capsys):
    """All blocks run in one session. Indented text after a block that prints must be its output."""
    names = {"__name__": "pasted"}
    with torch.random.fork_rng():
        for code, output in blocks(page):
            exec(compile(code, name(page), "exec"), names)
            printed = capsys.readouterr().out
            if printed and output:
                assert [line.strip() for line in output.splitlines()] == printed.splitlines()


def commands(page):
    """(command without its comment, its words), of every line of a page that is a command."""
    for line in COMMAND.findall(re.sub(r"\\\n +", "", page.read_text())):
        for command in re.sub(r"\s+#.*", "", line).split(" && "):
            words = shlex.split(command)
            while "=" in words[0]:
                words.pop(0)
            yield command, words


EVERY = sorted({command: words for page in PAGES for command, words in commands(page)}.items())


@pytest.mark.parametrize("command, words", EVERY, ids=[command for command, _ in EVERY])
def test_a_command_of_a_page_exists_and_takes_its_arguments(command, words, monkeypatch):
    """Commands are only parsed here. Those that can run without data run in other tests, see the functions below."""
    known = {"make": made, "tclr": parsed, "pip": installed, "python": started, "bash": file_exists, "cd": nothing}
    known |= {"torchrun": launched, "accelerate": launched, "pytest": collected}
    known[Path(words[0]).name](words[1:], monkeypatch)


def made(words, _):
    """make: the target exists."""
    targets = [word for word in words if "=" not in word]
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def parsed(words, monkeypatch):
    """The trainer parses the command and calls its function. test_reproduce.py runs the commands of reproduce.md."""
    pytest.importorskip("jsonargparse", reason="the trainer needs jsonargparse: pip install .[train]")
    monkeypatch.syspath_prepend(str(ROOT / "python"))
    from tclr import cli

    called = []
    for function in ("pretrain", "retrieval", "linear", "finetune", "classify", "multiclip", "confusion", "page"):
        monkeypatch.setattr(cli, function, recorder(getattr(cli, function), called))
    for function in ("export", "load", "check"):
        monkeypatch.setattr(cli, function, recorder(getattr(cli, function), called))
    monkeypatch.setattr(cli.ablation, "run", recorder(cli.ablation.run, called))
    monkeypatch.chdir(ROOT)
    words = [word for word in words if word not in ("...", "--dry-run")]
    if "..." in words or words == ["pretrain"] or words[:1] == ["pretrain"] and "--config" not in words:
        words += ["--config", "python/tclr/configs/demo.yaml"]
    try:
        cli.main(words)
    except SystemExit as ended:
        assert ended.code == 0 and "--help" in words, words
    else:
        assert called


def recorder(function, called):
    @functools.wraps(function)
    def record(**arguments):
        called.append(arguments)

    return record


def installed(words, _):
    """pip: it installs PyTorch, or this folder with extras that exist."""
    assert words[0] == "install"
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for word in words[1:]:
        folder, _, extra = word.partition("[")
        assert folder == "torch" or (folder == "." and (not extra or extra.rstrip("]") in extras)), word


def started(words, _):
    """python: the module or file exists. `info` is run here, the self-test in test_installation.py."""
    if words[0] != "-m":
        assert (ROOT / words[0]).is_file()
        return
    file = words[1].replace(".", "/")
    found = [ROOT / folder / each for folder in (".", "python") for each in (f"{file}.py", f"{file}/__main__.py")]
    assert any(path.is_file() for path in found) or importlib.util.find_spec(words[1])
    if words[1] == "tclr_kernels.info":
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)


def launched(words, monkeypatch):
    """torchrun or accelerate: the script exists, or the trainer parses the arguments."""
    if "tclr.cli" in words:
        parsed(words[words.index("tclr.cli") + 1 :], monkeypatch)
    file_exists(words, monkeypatch)


def collected(words, _):
    assert (ROOT / words[0]).exists()


def file_exists(words, _):
    files = [word for word in words if word.endswith((".py", ".sh"))]
    assert all((ROOT / file).is_file() for file in files)


def nothing(words, _):
    pass


def anchors(page):
    """The anchors of a page's headings, as GitHub and Sphinx make them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    found = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading)).lower() for heading in found)
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_link_of_a_page_leads_somewhere(page):
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?:|mailto:)([^)\s]*)\)", text):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_committed_drawings_are_up_to_date():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import figures
    finally:
        sys.path.pop(0)
    for title, picture in figures.drawn().items():
        assert (ROOT / "docs" / "figures" / f"{title}.svg").read_text() == picture, "python -m docs.figures"


def test_the_readme_has_at_most_150_lines():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 220


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("sphinx") is None, reason="needs Sphinx: make docs")
def test_the_documentation_builds_without_a_warning(tmp_path):
    folders = ["-d", tmp_path / "doctrees", ROOT / "docs", tmp_path / "site"]
    done = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", *folders], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert (tmp_path / "site" / "index.html").exists()


@pytest.mark.parametrize("page", [ROOT / "docs" / "promises.md", ROOT / "docs" / "promises-trainer.md"], ids=name)
def test_every_test_that_a_page_names_exists(page):
    tests = {
        each for path in (ROOT / "tests").glob("test_*.py") for each in re.findall(r"def (test_\w+)", path.read_text())
    }
    named = re.findall(r"`(test_\w+)(\.\.\.|\[[^`]*)?`", page.read_text())
    assert len(named) > 5
    for each, more in named:
        assert each in tests or more == "..." and any(test.startswith(each) for test in tests), each
