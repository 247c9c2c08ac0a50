"""Checks a data set before a run: which videos are missing, unreadable, too short or of another size."""

import csv
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from . import annotations, decode, index

COLUMNS = "video", "problem", "detail"


def check(dataset, root, part="train", split=1, *, out="data_check.csv", window=64):
    """Lists the videos of a data set that a run would skip, replace or pad, or for which it needs `data.size`.

    Every frame is decoded. Writes `out`, a CSV file of (video, problem, detail) in the order of the annotations, and
    returns the counts of "videos", "fine", "missing", "unreadable", "short" (fewer frames than `window`) and "size"
    (another size than the first readable video, which is an error in a run without `data.size`).
    """
    listing = annotations.read(dataset, root, part, split)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(partial(problems, listing.root, window=window), listing.entries))
    rows = [(path, "missing", "no such file") for path in listing.missing]
    first = next((size for size, _ in found if size), None)
    fine = 0
    for entry, (size, bad) in zip(listing.entries, found, strict=True):
        if size and size != first:
            wanted = "{} x {}, the first readable video has {} x {}: set data.size = [H, W]".format(*size, *first)
            bad = [*bad, ("size", wanted)]
        rows += [(entry.path, *each) for each in bad]
        fine += not bad
    with open(out, "w", newline="", errors="surrogateescape") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    counts = Counter(name for _, name, _ in rows)
    counts["videos"] = len(listing.entries) + len(listing.missing)
    counts["fine"] = fine
    return counts


def problems(root, entry, *, window=64):
    """(size, problems) of a video: (H, W), or None if it is unreadable, and a list of (problem, detail)."""
    bad = problem(root, entry, window=window)
    if bad and bad[0] == "unreadable":
        return None, [bad]
    return index.find(root / entry.path).size, [bad] if bad else []


def problem(root, entry, *, window=64):
    """("unreadable" or "short", detail) of a video, or None if it has no such problem."""
    try:
        frames = decode.length(root / entry.path)
    except decode.Unreadable as error:
        return "unreadable", str(error)
    frames = (frames if entry.end is None else min(frames, entry.end)) - entry.start
    if frames < 2:
        return "unreadable", f"found {frames} frames from frame {entry.start} on, wanted 2"
    return ("short", f"{frames} frames, under the window of {window}") if frames < window else None


def summary(dataset, counts, out):
    """The counts in one line."""
    bad = ", ".join(f"{counts[name]} {name}" for name in ("missing", "unreadable", "short"))
    bad += f", {counts['size']} of another size"
    return f"{dataset}: {counts['videos']} videos, {counts['fine']} fine, {bad}; listed in {out}"


def main(dataset, root, part="train", split=1, *, out="data_check.csv", window=64):
    """`tclr data check`: prints the decoder and a summary. Exits with 1 if a video is missing or unreadable."""
    print(f"decoding by {decode.DECODER}")
    counts = check(dataset, root, part, split, out=out, window=window)
    print(summary(dataset, counts, out))
    if counts["missing"] + counts["unreadable"]:
        sys.exit(1)
