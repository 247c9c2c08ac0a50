"""Tile sizes by measurement, only with TCLR_KERNELS_AUTOTUNE=1: the first call of a kind times several tiles.

These are the tile of the table and its neighbours. The measurement takes seconds and synchronises with the device. Two
processes may choose different tiles, and then their results differ in the last bits.
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
    """The tile, and tiles that differ from it in one setting.

    A tile of 64 or more rows is never reduced below 64: Hopper uses other instructions there, with which S may have
    different bits.
    """
    sizes = [
        (name, size) for name in ("BM", "BN", "warps") for size in (getattr(tile, name) // 2, getattr(tile, name) * 2)
    ]
    sizes += [("stages", tile.stages - 1), ("stages", tile.stages + 1)]
    near = [tile, *(tile._replace(**{name: size}) for name, size in sizes)]
    fewest = min(64, tile.BM)
    return [t for t in near if fewest <= t.BM <= 256 and 32 <= t.BN <= 256 and 4 <= t.warps <= 8 and t.stages > 0]


def milliseconds(step: Callable[[], Any]) -> float:
    """The time of a call on its device; infinite if it does not compile or needs too much shared memory."""
    try:
        return triton.testing.do_bench(step, warmup=5, rep=20, return_mode="median")
    except TritonError:
        return math.inf


def by_trial(kind: Hashable, tile: Tile, run: Callable[[Tile], Any]) -> Tile | None:
    """The fastest tile for a kind of call, or None if it is not known while a CUDA graph is captured.

    tile: the first to try; run: makes the call with a given tile
    """
    if kind not in fastest:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None
        fastest[kind] = min(neighbours(tile), key=lambda t: milliseconds(lambda: run(t)))
    return fastest[kind]
