"""The tile sizes for each class of devices. They are fixed ahead of time, so that a first call need not search.

Those of Hopper for half precision, TF32 and pairs were the fastest of those tried on an H100 with Triton 3.6. Several
spill registers before and after their loop, as docs/triton.md shows. Tiles without spills took up to six times as long,
above all those that give 64 rows to eight warps.
"""

import functools
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """A tile of BM rows by BN columns, for rows padded to DP features, of which BK are read at a time.

    DC: the number of features for which one program computes the gradient. BM and BN are powers of two; BK and DC
    divide DP.
    """

    BM: int
    BN: int
    DP: int
    BK: int
    DC: int
    warps: int
    stages: int


Table = dict[str, list[tuple[int, ...]]]
ANY = 1 << 30
FLOAT: Table = {  # without TF32 there are no tensor cores, and tiles are as large as the registers allow
    "sums": [(32, 64, 64, 16, 0, 4, 2), (ANY, 64, 64, 16, 0, 8, 2)],
    "gradient": [(256, 64, 32, 16, 0, 8, 2), (ANY, 64, 32, 16, 256, 8, 2)],
    "gradient unbounded rectangle": [(128, 64, 32, 0, 0, 8, 2), (ANY, 64, 32, 16, 256, 8, 2)],
    "gradient unbounded rectangle keys": [
        (32, 64, 32, 0, 0, 4, 2),
        (128, 64, 32, 0, 0, 8, 2),
        (ANY, 64, 32, 16, 256, 8, 2),
    ],
}
DOUBLE: Table = {"sums": [(ANY, 32, 32, 16, 0, 4, 2)], "gradient": [(ANY, 32, 32, 16, 16, 4, 1)]}
INTERPRETED: Table = {
    "sums": [(512, 64, 64, 0, 0, 4, 1), (ANY, 64, 64, 256, 0, 4, 1)],
    "gradient": [(512, 64, 64, 0, 0, 4, 1), (ANY, 64, 64, 256, 256, 4, 1)],
}
# of Hopper's gradient of half precision, for more than 128 features
HALF_WIDE = [(256, 128, 64, 0, 0, 8, 3), (512, 64, 64, 0, 0, 8, 2), (ANY, 64, 128, 64, 256, 8, 3)]
# Each entry is (largest DP, BM, BN, BK, DC, warps, stages); BK or DC = 0 means all of DP. A missing kernel name falls
# back to the name without its last word, such as "sums unbounded" to "sums"; missing "tf32" or "pairs" to "float". The
# gradient's bounded and unbounded tiles must have the same BM, BN and DC, since both use the same coefficients; a test
# checks this.
TABLES: dict[str, dict[str, Table]] = {
    "hopper": {  # sm_90: 227 KiB of shared memory, wgmma
        "half": {
            "sums": [
                (64, 64, 64, 0, 0, 4, 3),
                (128, 64, 128, 0, 0, 4, 3),
                (256, 64, 128, 0, 0, 4, 1),
                (ANY, 128, 128, 64, 0, 4, 2),
            ],
            "sums unbounded": [(128, 64, 64, 0, 0, 4, 3), (256, 64, 64, 0, 0, 4, 2), (ANY, 128, 64, 64, 0, 4, 4)],
            "gradient": [(64, 64, 128, 0, 0, 4, 3), (128, 64, 128, 0, 0, 4, 2), *HALF_WIDE],
            "sums unbounded rectangle keys": [(256, 64, 32, 0, 0, 4, 3), (ANY, 64, 32, 64, 0, 4, 3)],
            "gradient unbounded rectangle keys": [
                (128, 64, 64, 0, 0, 4, 2),  # 64x128 took 0.9 of the time with Triton 3.6, but spills in 3.8's loop
                (192, 64, 32, 0, 0, 4, 2),
                (256, 128, 64, 0, 0, 8, 2),
                (384, 64, 32, 0, 0, 8, 3),
                (512, 64, 64, 0, 0, 8, 2),
                (ANY, 64, 64, 64, 256, 8, 3),
            ],
        },
        "tf32": {
            "sums": [(128, 64, 64, 0, 0, 4, 2), (ANY, 128, 128, 32, 0, 8, 4)],
            "sums unbounded": [(128, 64, 64, 0, 0, 4, 2), (ANY, 128, 64, 32, 0, 4, 4)],
            "gradient": [
                (32, 64, 64, 16, 0, 4, 3),
                (64, 64, 64, 32, 0, 4, 3),
                (256, 128, 64, 32, 0, 8, 3),
                (ANY, 128, 64, 32, 256, 8, 3),
            ],
        },
        "pairs": {
            "sums": [(128, 64, 64, 0, 0, 4, 2), (ANY, 128, 128, 64, 0, 8, 2)],
            "sums unbounded": [(128, 64, 64, 0, 0, 4, 2), (ANY, 128, 64, 64, 0, 8, 3)],
            "gradient": [
                (128, 64, 64, 0, 0, 4, 2),
                (192, 128, 64, 0, 0, 8, 2),
                (256, 128, 128, 64, 0, 8, 2),
                (384, 64, 64, 64, 0, 4, 2),
                (ANY, 128, 128, 64, 256, 8, 2),
            ],
            "gradient unbounded rectangle": [
                (64, 64, 64, 0, 0, 4, 2),
                (128, 128, 64, 0, 0, 8, 2),
                (256, 128, 128, 64, 0, 8, 2),
                (ANY, 128, 128, 64, 256, 8, 2),
            ],
            "sums unbounded rectangle keys": [(128, 64, 32, 0, 0, 4, 3), (ANY, 64, 32, 32, 0, 4, 3)],
            "gradient unbounded rectangle keys": [(256, 64, 64, 0, 0, 4, 2), (ANY, 128, 128, 16, 256, 8, 2)],
        },
        "float": FLOAT,
        "double": {
            **DOUBLE,
            "gradient unbounded": [(ANY, 32, 32, 16, 16, 8, 1)],
            "gradient unbounded rectangle": DOUBLE["gradient"],
        },
    },
    "blackwell": {  # sm_100: 227 KiB; larger tiles spill, since products are copied from tensor memory to registers
        "half": {
            "sums": [(256, 64, 64, 0, 0, 8, 2), (ANY, 128, 64, 64, 0, 8, 4)],
            "gradient": [
                (128, 64, 64, 0, 0, 8, 2),
                (256, 64, 32, 0, 0, 8, 2),
                (512, 64, 64, 0, 256, 8, 1),
                (ANY, 64, 128, 64, 256, 8, 3),
            ],
        },
        "tf32": {
            "sums": [(64, 64, 64, 0, 0, 8, 2), (128, 64, 64, 0, 0, 4, 1), (ANY, 128, 64, 32, 0, 8, 4)],
            "gradient": [(64, 64, 64, 0, 0, 8, 2), (128, 64, 32, 0, 0, 8, 2), (ANY, 64, 128, 32, 128, 8, 2)],
        },
        "float": FLOAT,
        "double": DOUBLE,
    },
    "ampere": {  # sm_80: 163 KiB
        "half": {
            "sums": [(128, 128, 64, 0, 0, 8, 2), (ANY, 128, 64, 64, 0, 8, 3)],
            "gradient": [(128, 64, 64, 0, 0, 8, 2), (256, 64, 64, 0, 0, 8, 2), (ANY, 64, 64, 64, 256, 8, 2)],
        },
        "tf32": {
            "sums": [(128, 64, 64, 0, 0, 4, 1), (ANY, 64, 64, 32, 0, 4, 3)],
            "gradient": [(64, 64, 64, 0, 0, 8, 2), (128, 64, 64, 0, 0, 8, 1), (ANY, 64, 64, 32, 128, 8, 2)],
        },
        "float": FLOAT,
        "double": DOUBLE,
    },
    "compact": {  # sm_86, sm_89, sm_120: 99 KiB
        "half": {
            "sums": [(128, 64, 64, 0, 0, 4, 2), (ANY, 64, 64, 64, 0, 4, 3)],
            "gradient": [(128, 64, 32, 0, 0, 4, 2), (ANY, 64, 32, 64, 128, 4, 2)],
        },
        "tf32": {
            "sums": [(32, 64, 64, 0, 0, 4, 2), (ANY, 64, 64, 32, 0, 4, 3)],
            "gradient": [(128, 64, 32, 0, 0, 8, 1), (ANY, 64, 32, 32, 128, 8, 2)],
        },
        "float": FLOAT,
        "double": DOUBLE,
    },
    "amd": {  # gfx942: 64 KiB, and copies to shared memory go through registers
        "half": {
            "sums": [(128, 128, 64, 0, 0, 8, 2), (ANY, 128, 64, 64, 0, 8, 2)],
            "gradient": [(128, 64, 64, 0, 0, 8, 2), (ANY, 64, 64, 64, 128, 8, 2)],
        },
        "float": FLOAT,
        "double": DOUBLE,
    },
    "interpreter": dict.fromkeys(("half", "float", "double"), INTERPRETED),
}


# The tables of devices whose products read rows from shared memory. Elsewhere they are held in registers, which are too
# few for a row that is divided into several tensors.
IN_PARTS = "hopper", "blackwell", "interpreter"


@functools.lru_cache
def device_class(index: int | None) -> tuple[str, int]:
    """The name of the table for a CUDA or HIP device, and the number of its multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = "amd"
    elif (properties.major, properties.minor) == (8, 0):
        name = "ampere"
    else:
        name = {9: "hopper", 10: "blackwell"}.get(properties.major, "compact")
    return name, properties.multi_processor_count


def padded(D: int) -> int:
    """The features of a packed row that is read in large parts: a power of two, or a multiple of 256 above 512."""
    return max(16, 1 << (D - 1).bit_length()) if D <= 512 else -(-D // 256) * 256


def by_parts(D: int, size: int = 64) -> int:
    """The features of a packed row that is read in parts of `size` features or fewer: a multiple of `size`."""
    return -(-D // size) * size


def choose(table: str, kernel: str, dtype: torch.dtype, D: int, precision: str = "ieee") -> Tile:
    """The tile for a kernel: "sums" or "gradient", which "unbounded", "rectangle" and "keys" may follow.

    table: a key of TABLES; dtype: that of the packed rows; precision: a result of `large.precision`
    """
    kind = precision if precision in ("tf32", "pairs") else {2: "half", 4: "float", 8: "double"}[dtype.itemsize]
    DP = padded(D)
    entries = TABLES[table][kind if kind in TABLES[table] else "float"]
    sums = kernel.startswith("sums")
    found = kernel
    while found not in entries:
        found = found.rpartition(" ")[0]
    *_, last = entries[found]
    if sums and by_parts(D) < DP and last[3] and 64 % last[3] == 0:
        DP, entry = by_parts(D), last
    else:
        entry = next(entry for entry in entries[found] if entry[0] >= D)
    _, BM, BN, BK, DC, warps, stages = entry
    if not sums and table in IN_PARTS and 64 < D <= 384:
        DP = by_parts(D, max(DC, 64))
    tile = Tile(BM, BN, DP, BK or DP, DC or DP, warps, stages)
    return with_keys(tile, sums, dtype) if kernel.endswith(" keys") and found != kernel else tile


def with_keys(tile: Tile, sums: bool, dtype: torch.dtype) -> Tile:
    """A tile that was chosen for a kernel without keys. With keys, each similarity takes more registers."""
    if sums:
        return tile._replace(BM=64, warps=8) if tile.BM > 32 else tile
    widest = 16 if dtype == torch.float64 else 64 if tile.DC <= 256 else 32
    return tile._replace(BN=min(tile.BN, widest))
