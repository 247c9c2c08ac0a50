"""Draws the pictures of the documentation: python -m docs.figures writes docs/figures/*.svg.

The pictures of the losses are not drawn by hand. The rows are unit vectors along different axes, so the gradient of
row r has, along the axis of row c, the derivative of the loss by their similarity: negative for a pair that the loss
pulls together, positive for one that it pushes apart, zero for one that it does not use.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

import tclr_kernels as tk

FOLDER = Path(__file__).parent / "figures"
PULLED, PUSHED, UNUSED, INK, PAPER = "#1b7f5c", "#b9c7ee", "#f1f1f1", "#222222", "#ffffff"
ROUNDS = "#1b7f5c", "#3b6fd4", "#c2571a", "#8a4bb8", "#b8930b"
CELL, MARGIN = 24, 58
NAMES = {PULLED: "positive pair", PUSHED: "negative, in the denominator", UNUSED: "not used"}


class Loss(NamedTuple):
    """A loss to draw. sizes: of its inputs, whose rows are the rows of the Gram matrix in this order."""

    function: Callable
    sizes: tuple[tuple[int, ...], ...]
    names: tuple[str, ...]  # of the sets, for the margins
    set_size: int
    anchors: int | None = None  # how many of the rows are shown as anchors; None: all


VIDEOS = torch.tensor([0, 0, 1, 2])
CLASSES = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
LOSSES = {
    "nt_xent": Loss(tk.nt_xent, ((4,), (4,)), ("a", "b"), 4),
    "nt_xent-labels": Loss(lambda a, b: tk.nt_xent(a, b, labels=VIDEOS), ((4,), (4,)), ("a", "b"), 4),
    "clip_loss": Loss(tk.clip_loss, ((4,), (4,)), ("a", "b"), 4),
    "info_nce": Loss(
        lambda q, k, n: tk.info_nce(q, k, negatives=n), ((4,), (4,), (4,)), ("query", "key", "negatives"), 4, 4
    ),
    "info_nce-queue": Loss(
        lambda q, k, n: tk.info_nce(q, k, negatives=n, in_batch=False), ((4,), (4,), (8,)), ("q", "k", "queue"), 4, 4
    ),
    "sup_con": Loss(lambda z: tk.sup_con(z, CLASSES), ((8,),), ("z",), 8),
    "instance_contrastive": Loss(lambda *views: tk.instance_contrastive(views), ((3,),) * 3, ("view 0", "1", "2"), 3),
    "local_local": Loss(tk.local_local, ((2, 4), (2, 4)), ("x1, video 0", "x1, 1", "x2, 0", "x2, 1"), 4),
    "global_local": Loss(tk.global_local, ((2, 4), (2, 4)), ("s, video 0", "s, 1", "x, 0", "x, 1"), 4),
}


def uses(loss):
    """The kind of every pair of rows, one of the colours: a list of lists."""
    M = sum(torch.Size(size).numel() for size in loss.sizes)
    rows = torch.eye(M, dtype=torch.float64, requires_grad=True)
    parts = rows.split([torch.Size(size).numel() for size in loss.sizes])
    inputs = [part.reshape(*size, M) for part, size in zip(parts, loss.sizes, strict=True)]
    loss.function(*inputs).backward()
    slopes = rows.grad[: loss.anchors]
    slopes = slopes.masked_fill(torch.eye(*slopes.shape, dtype=bool), 0)  # a row's similarity with itself is no pair
    return [[PULLED if x < -1e-9 else PUSHED if x > 1e-9 else UNUSED for x in line] for line in slopes.tolist()]


def gram(loss):
    """A picture of the Gram matrix, one square a pair of rows."""
    cells = uses(loss)
    width, height = len(cells[0]) * CELL, len(cells) * CELL
    parts = [
        box(MARGIN + c * CELL, MARGIN + r * CELL, CELL - 2, CELL - 2, fill)
        for r, line in enumerate(cells)
        for c, fill in enumerate(line)
    ]
    start = 0
    for name in loss.names:
        size = loss.set_size if start + loss.set_size < len(cells[0]) and name != "queue" else len(cells[0]) - start
        middle = MARGIN + (start + size / 2) * CELL
        parts.append(text(middle, MARGIN - 10, name))
        if start < len(cells):
            parts.append(text(MARGIN - 10, middle, name, turn=True))
        if start:
            edge = MARGIN + start * CELL - 1
            parts.append(line_of(edge, MARGIN - 6, edge, MARGIN + height))
            if start < len(cells):
                parts.append(line_of(MARGIN - 6, edge, MARGIN + width, edge))
        start += size
    legend = [fill for fill in NAMES if any(fill in line for line in cells)]
    for n, fill in enumerate(legend):
        y = MARGIN + height + 16 + 20 * n
        parts += [box(MARGIN, y, 14, 14, fill), text(MARGIN + 22, y + 12, NAMES[fill], anchor="start")]
    return svg(max(width + MARGIN + 20, MARGIN + 230), MARGIN + height + 24 + 20 * len(legend), parts)


def tiles():
    """One tile of the symmetric matrix serves the rows on its left and the rows above it."""
    n, side = 6, 44
    parts = [text(MARGIN + n * side / 2, 24, "rows, in blocks"), text(24, MARGIN + n * side / 2, "rows", turn=True)]
    for r in range(n):
        for c in range(n):
            fill = PULLED if (r, c) == (1, 4) else PUSHED if c >= r else UNUSED
            parts.append(box(MARGIN + c * side, MARGIN - 20 + r * side, side - 2, side - 2, fill))
    x, y, right = MARGIN + 4 * side + side / 2, MARGIN - 20 + side + side / 2, MARGIN + n * side + 40
    parts += [
        text(x, y + 5, "exp S", fill=PAPER),
        arrow(x + side / 2, y, right, y),
        text(right + 8, y - 4, "sums along its rows:", anchor="start"),
        text(right + 8, y + 14, "the anchors of block 1", anchor="start"),
        arrow(x, y + side / 2, x, y + side * 4.6 + 12),
        text(x, y + side * 4.6 + 30, "sums along its columns: the anchors of block 4"),
        text(right + 8, y + 3 * side, "below the diagonal:", anchor="start"),
        text(right + 8, y + 3 * side + 18, "never computed", anchor="start"),
    ]
    return svg(right + 190, MARGIN + n * side + 30, parts)


def tournament(blocks=6):
    """Which pairs of blocks meet in which round, as csrc/problem.h has them."""
    last, side = blocks - 1, 44
    parts = [text(MARGIN + blocks * side / 2, 24, "block"), text(24, MARGIN + blocks * side / 2, "block", turn=True)]
    for b in range(blocks):
        parts += [
            text(MARGIN + b * side + side / 2, 46, str(b)),
            text(46, MARGIN + b * side + side / 2 + 4, str(b)),
            box(MARGIN + b * side, MARGIN + b * side, side - 2, side - 2, INK),
            text(MARGIN + b * side + side / 2, MARGIN + b * side + side / 2 + 4, "first", fill=PAPER),
        ]
    for turn in range(last):
        for place in range(blocks // 2):
            one = last if place == 0 else (turn + place) % last
            low, high = sorted((one, (turn - place + last) % last))
            x, y = MARGIN + high * side, MARGIN + low * side
            parts += [
                box(x, y, side - 2, side - 2, ROUNDS[turn]),
                text(x + side / 2, y + side / 2 + 4, str(turn + 1), fill=PAPER),
            ]
    right = MARGIN + blocks * side + 24
    for turn, fill in enumerate(ROUNDS):
        y = MARGIN + turn * 28
        parts += [
            box(right, y, 16, 16, fill),
            text(right + 26, y + 13, f"round {turn + 1}: three pairs, at once", anchor="start"),
        ]
    return svg(right + 220, MARGIN + blocks * side + 16, parts)


def two_sided():
    """One recomputed tile of weights gives the gradient of its rows and of its columns."""
    parts = [
        box(240, 90, 120, 120, PULLED),
        text(300, 140, "one tile of", fill=PAPER),
        text(300, 160, "weights W", fill=PAPER),
        box(240, 26, 120, 36, PUSHED),
        text(300, 49, "z of its columns"),
        box(30, 90, 120, 120, PUSHED),
        text(90, 155, "z of its rows"),
        arrow(300, 62, 300, 88),
        arrow(150, 150, 238, 150),
        text(194, 142, "S again"),
        arrow(360, 150, 432, 150),
        box(434, 90, 170, 120, "#f6d9c6"),
        text(519, 140, "W z(columns)"),
        text(519, 162, "is added to dz of its rows"),
        arrow(300, 210, 300, 252),
        box(190, 254, 220, 52, "#f6d9c6"),
        text(300, 276, "Wᵀ z(rows)"),
        text(300, 295, "is added to dz of its columns"),
    ]
    return svg(630, 324, parts)


def box(x, y, width, height, fill):
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="3" fill="{fill}"/>'


def text(x, y, words, fill=INK, anchor="middle", turn=False):
    turned = f' transform="rotate(-90 {x:g} {y:g})"' if turn else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{fill}" text-anchor="{anchor}"{turned}>{words}</text>'


def line_of(x1, y1, x2, y2, more=""):
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{INK}"{more}/>'


def arrow(x1, y1, x2, y2):
    return line_of(x1, y1, x2, y2, ' stroke-width="1.5" marker-end="url(#tip)"')


def svg(width, height, parts):
    tip = '<marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}"'
            f' viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="13">',
            f'<defs>{tip}<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>',
            f'<rect width="{width:g}" height="{height:g}" rx="6" fill="{PAPER}"/>',
            *parts,
            "</svg>\n",
        ]
    )


def drawn():
    """Every picture: {name: SVG}."""
    pictures = {name: gram(loss) for name, loss in LOSSES.items()}
    return pictures | dict(tiles=tiles(), tournament=tournament()) | {"two-sided": two_sided()}


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, picture in drawn().items():
        (FOLDER / f"{name}.svg").write_text(picture)
