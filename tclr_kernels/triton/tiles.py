"""The tiles of each kind of device: chosen ahead of time, so that a first call compiles and does not search.

No entry spills registers on sm_90: `python -m benchmarks.compile_triton` compiles all of them and predicts their time.
"""

import functools
from typing import NamedTuple

import torch
import triton


class Tile(NamedTuple):
    """A tile of BM rows by BN columns, for rows of DP features, of which BK are read at a time.

    DC: the features of the gradient that one program makes (BN divides BM; BK and DC divide DP).
    """

    BM: int
    BN: int
    DP: int
    BK: int
    DC: int
    warps: int
    stages: int


# (largest DP, BM, BN, BK, DC, warps, stages); BK or DC of 0: all of DP
TABLES = {
    "hopper": {
        "half": {
            "sums": [(128, 128, 128, 0, 0, 8, 3), (256, 128, 128, 0, 0, 8, 2), (1 << 30, 128, 128, 64, 0, 8, 4)],
            "gradient": [
                (128, 128, 64, 0, 0, 8, 3),
                (256, 64, 64, 0, 0, 8, 3),
                (512, 64, 64, 0, 0, 8, 2),
                (1 << 30, 64, 64, 64, 256, 8, 3),
            ],
        },
        "float": {
            "sums": [(1 << 30, 64, 64, 16, 0, 8, 3)],
            "gradient": [(64, 64, 32, 16, 0, 8, 2), (1 << 30, 64, 32, 16, 64, 8, 2)],
        },
        "double": {
            "sums": [(1 << 30, 32, 32, 16, 0, 4, 2)],
            "gradient": [(1 << 30, 32, 32, 16, 16, 4, 2)],
        },
    },
    "interpreter": {
        kind: {
            "sums": [(512, 64, 64, 0, 0, 4, 1), (1 << 30, 64, 64, 256, 0, 4, 1)],
            "gradient": [(512, 64, 64, 0, 0, 4, 1), (1 << 30, 64, 64, 256, 256, 4, 1)],
        }
        for kind in ("half", "float", "double")
    },
}  # fmt: skip


@functools.lru_cache
def device_class(index):
    """Which table serves the CUDA or HIP device; and its number of processors."""
    properties = torch.cuda.get_device_properties(index)
    return "hopper", properties.multi_processor_count


def padded(D):
    """Features of a packed row: a power of two, or several times 256."""
    return max(16, triton.next_power_of_2(D)) if D <= 512 else -(-D // 256) * 256


def choose(table, kernel, dtype, D):
    """The tile of a kernel, "sums" or "gradient". table: of TABLES; dtype: of the packed rows"""
    kind = {2: "half", 4: "float", 8: "double"}[dtype.itemsize]
    DP = padded(D)
    entry = next(entry for entry in TABLES[table][kind][kernel] if entry[0] >= DP)
    _, BM, BN, BK, DC, warps, stages = entry
    return Tile(BM, BN, DP, BK or DP, DC or DP, warps, stages)
