"""Walks a data set before a run does: which videos are missing, unreadable or shorter than the window."""

import csv
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from . import annotations, decode

COLUMNS = "video", "problem", "detail"


def check(dataset, root, part="train", split=1, *, out="data_check.csv", window=64, quick=False, threads=4):
    """Lists the videos of a data set that a run would skip, replace or pad.

    Writes `out`, a CSV of (video, problem, detail) in the order of the annotations, and returns the counts: videos,
    fine, missing, unreadable, short (fewer frames than `window`). Every frame is decoded; `quick` counts packets alone,
    and so finds what is truncated or no video at all, but no damage within.
    """
    listing = annotations.read(dataset, root, part, split)
    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(partial(problem, listing.root, window=window, quick=quick), listing.entries)
        rows = [(path, "missing", "no such file") for path in listing.missing]
        rows += [(entry.path, *bad) for entry, bad in zip(listing.entries, found, strict=True) if bad]
    with open(out, "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    counts = Counter(name for _, name, _ in rows)
    counts["videos"] = len(listing.entries) + len(listing.missing)
    counts["fine"] = counts["videos"] - len(rows)
    return counts


def problem(root, entry, *, window=64, quick=False):
    """("unreadable" or "short", detail) of a video, None where it is fine."""
    try:
        frames = (decode.packets if quick else decode.length)(root / entry.path)
    except decode.Unreadable as error:
        return "unreadable", str(error)
    frames = (frames if entry.end is None else min(frames, entry.end)) - entry.start
    if frames < 2:
        return "unreadable", f"found {frames} frames from frame {entry.start} on, wanted 2"
    return ("short", f"{frames} frames, under the window of {window}") if frames < window else None


def summary(dataset, counts, out):
    """The counts in one line."""
    bad = ", ".join(f"{counts[name]} {name}" for name in ("missing", "unreadable", "short"))
    return f"{dataset}: {counts['videos']} videos, {counts['fine']} fine, {bad}; listed in {out}"


def main(dataset, root, part="train", split=1, *, out="data_check.csv", window=64, quick=False):
    """`tclr data check`: prints the decoder and the summary; exits 1 where a video is missing or unreadable."""
    print(f"decoding by {decode.DECODER}")
    counts = check(dataset, root, part, split, out=out, window=window, quick=quick)
    print(summary(dataset, counts, out))
    if counts["missing"] + counts["unreadable"]:
        sys.exit(1)
