"""Sphinx's settings. Pages are Markdown with links that work on GitHub; here they become links within the site."""

import html
import os
import re
import sys
from pathlib import Path

import ziamath
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import tclr_kernels  # noqa: E402

project, author, version = "tclr-kernels", "The tclr-kernels developers", tclr_kernels.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_copybutton"]
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # a generated page may go from the first to the third level
default_role = "py:obj"
html_theme, html_title, html_math_renderer = "furo", "tclr-kernels", "svg"
html_static_path, html_css_files = ["site.css"], ["site.css"]
html_copy_source, pygments_dark_style = False, "github-dark"
autodoc_member_order = "bysource"
autodoc_inherit_docstrings = False
autodoc_type_aliases = {name: name for name in ("Temperature", "Negatives", "Group", "Shares", "Reduction")}
python_use_unqualified_type_names = True
maximum_signature_line_length = 80

REPOSITORY = "https://github.com/tclr-kernels/tclr-kernels/blob/main"
FROM_ROOT = {"README.md": "index", "CONTRIBUTING.md": "contributing", "CHANGELOG.md": "changelog"}
LINK = re.compile(r"(?<=\]\()(?!https?:|#|mailto:)([^)#\s]+)")
ARGUMENTS = re.compile(r"([a-z_]\w*(?:, [a-z_]\w*)*(?: \[[^]]*\])?(?:, [a-z_]\w*(?: \[[^]]*\])?)*): (?=\S)")
TALL = 150  # pixels: no formula of these pages has more than three lines
log = logging.getLogger(__name__)


def setup(app: Sphinx):
    app.connect("source-read", read_page)
    app.connect("autodoc-process-docstring", read_docstring)
    app.add_html_math_renderer("svg", (draw_formula, None), (draw_formula, None))


def read_page(app, docname, source):
    """The text of a page, which for some is a file of the root folder, with its links turned."""
    by_page = {page: name for name, page in FROM_ROOT.items()}
    folder = ROOT / "docs"
    if docname in by_page:
        folder, toctree = ROOT, source[0][source[0].find("```{toctree}") :] if "{toctree}" in source[0] else ""
        source[0] = (ROOT / by_page[docname]).read_text() + "\n" + toctree

    def link(match):
        path = Path(os.path.normpath(folder / match[1]))
        target = path.relative_to(ROOT).as_posix()
        if not path.exists():
            log.warning("the link to %s leads nowhere", match[1], location=docname)
        if target in FROM_ROOT:
            return f"{FROM_ROOT[target]}.md"
        if path.suffix in (".png", ".svg") or (path.suffix == ".md" and path.parent == ROOT / "docs"):
            return os.path.relpath(path, ROOT / "docs")
        return f"{REPOSITORY}/{target}"

    source[0] = LINK.sub(link, source[0])


def read_docstring(app, what, name, obj, options, lines):
    """A docstring of this project as reStructuredText: formulas are indented, arguments are lines "name: text"."""
    result, kind = [], "text"
    for line in lines:
        starts, before = ARGUMENTS.match(line), kind
        if not line.strip():
            kind = "text" if kind != "formula" else kind
        elif starts:
            result += ["", escaped(starts[1])]
            line, kind = f"    {escaped(line[starts.end() :])}", "argument"
        elif line.startswith("- "):
            line, kind = escaped(line), "item"
        elif line.startswith(" ") and kind in ("text", "formula"):
            result += ["", ".. code-block:: text", ""] if kind == "text" else []
            kind = "formula"
        elif line.startswith(("Returns ", "Raises ", "Source: ")):
            result.append("")
            line, kind = escaped(line), "text"
        elif kind == "argument":
            line = f"    {escaped(line.strip())}"
        else:
            kind = kind if line.startswith(" ") else "text"
            line = escaped(line)
        if before == "formula" and kind == "text":
            result.append("")
        result.append(line)
    lines[:] = [*result, ""]


def escaped(words):
    """Words without meaning to reStructuredText, but for names between backticks."""
    parts = words.split("`")
    return "`".join(part if n % 2 else re.sub(r"([\\*|_<>])", r"\\\1", part) for n, part in enumerate(parts))


def draw_formula(self, node):
    """A formula as SVG in the colour of the text, which needs no font, no JavaScript and no other server."""
    inline, source = isinstance(node, nodes.math), node.astext().strip()
    formula = ziamath.Latex(source, size=17 if inline else 19, color="currentColor", inline=inline)
    if formula.getsize()[1] > TALL:  # ziamath stretches \left( around some sums without end
        log.warning("the formula %s is drawn %d pixels high", source, formula.getsize()[1])
    label = f'<svg role="img" aria-label="{html.escape(source)}" '
    svg = formula.svg().replace("<svg ", f'{label} style="vertical-align:{formula.getyofst():.1f}px" ', 1)
    self.body.append(svg if inline else f'<div class="formula">{svg}</div>')
    raise nodes.SkipNode
