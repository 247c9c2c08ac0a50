"""Tiles by trial, with TCLR_KERNELS_AUTOTUNE=1 alone: at the first call of a kind, the table's tile and its neighbours.

That takes seconds and waits for the device. Another process may find another tile the fastest, and other last bits.
"""

import math
import os
from collections.abc import Callable, Hashable
from typing import Any

import torch
import triton
from triton.errors import TritonError

from .tiles import Tile

ENABLED = os.environ.get("TCLR_KERNELS_AUTOTUNE") == "1"
fastest: dict[Hashable, Tile] = {}  # kind of call -> tile


def neighbours(tile: Tile) -> list[Tile]:
    """The tile, and those that differ from it in one setting.

    Not from 64 rows to fewer: Hopper has other instructions for those, and S need not have the same bits by both.
    """
    sizes = [
        (name, size) for name in ("BM", "BN", "warps") for size in (getattr(tile, name) // 2, getattr(tile, name) * 2)
    ]
    sizes += [("stages", tile.stages - 1), ("stages", tile.stages + 1)]
    near = [tile, *(tile._replace(**{name: size}) for name, size in sizes)]
    fewest = min(64, tile.BM)
    return [t for t in near if fewest <= t.BM <= 256 and 32 <= t.BN <= 256 and 4 <= t.warps <= 8 and t.stages > 0]


def milliseconds(step: Callable[[], Any]) -> float:
    """On its device; infinite for what does not compile, or fits no processor."""
    try:
        return triton.testing.do_bench(step, warmup=5, rep=20, return_mode="median")
    except TritonError:
        return math.inf


def by_trial(kind: Hashable, tile: Tile, run: Callable[[Tile], Any]) -> Tile | None:
    """The fastest tile for a kind of call; None while a CUDA graph is captured, which allows no trial.

    tile: the first to try; run: does the call with one
    """
    if kind not in fastest:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        fastest[kind] = min(neighbours(tile), key=lambda t: milliseconds(lambda: run(t)))
    return fastest[kind]
