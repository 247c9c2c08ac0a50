"""`tclr COMMAND ... --dry-run` runs the command within a minute, on a few small generated videos in UCF101's layout.

It reads, trains, evaluates and writes as the command does, but with two steps of two videos, a narrow network of the
same architecture, frames of 32 x 32 pixels and two clips per video. "-dry-run" is appended to the name of the run's
folder, so that the dry run of an evaluation finds that of its pretraining, and no other run is changed.
"""

import dataclasses
import functools
import os
import shutil
import tempfile
from pathlib import Path

from . import config, motions, processes

FLAG = "--dry-run"
SMALL = dict(  # argument -> the settings in it that are replaced
    net=dict(width=4, dim=8),
    recipe=dict(steps=2, epochs=0, batch=2, accumulate=1, side=32, readers=2, compile=False, checkpoint_every=1),
    evaluation=dict(clips=2, side=32),
    scale=dict(groups=2, test_groups=1, takes=1, steps=2, batch=4, width=2, eval_clips=2),
)
VALUES = dict(epochs=1, batch=2, resume=False, overwrite=True, classes=None, seeds=2, other_seeds=1)


def small(command):
    """The command, with those arguments replaced that determine how long it takes."""

    @functools.wraps(command)
    def dry(**given):
        name = next((name for name in ("out", "run") if name in given), None)
        folder = given[name].with_name(f"{given[name].name}-dry-run")
        given |= {name: folder} | {key: value for key, value in VALUES.items() if key in given}
        untrained = "recipe" in given and not given["recipe"].steps and not given["recipe"].epochs
        for key, values in SMALL.items():
            if key in given:
                given[key] = dataclasses.replace(given[key], **values)
        if "recipe" in given:
            given["recipe"] = dataclasses.replace(given["recipe"], batch=max(2, processes.launched()))
        if untrained:
            given["recipe"] = dataclasses.replace(given["recipe"], steps=0)
        if "recipe" in given and config.device(given["device"]) == "cpu":
            given["recipe"] = dataclasses.replace(given["recipe"], amp="off")
        if given.get("data") is not None:
            here = dict(dataset="ucf101", root=str(videos(folder.parent)), split=1, train="train", test="test")
            given["data"] = dataclasses.replace(given["data"], **here)
        if os.environ.get("RANK", "0") == "0":  # there is no process group yet
            print(f"dry run: {command.__name__}, written to {folder}", flush=True)
        return command(**given)

    return dry


def videos(parent):
    """The folder of 20 videos of 64 frames of 48 x 48 pixels in UCF101's layout. They are written once."""
    root = parent / "dry-run-videos"
    if not root.exists():
        parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(dir=parent))
        try:
            motions.write_dataset(unfinished, groups=2, test_groups=1, takes=1, frames=64, side=48, seed=0)
            os.rename(unfinished, root)
        except OSError:
            if not root.exists():  # otherwise another process was faster, and its videos are the same
                raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
    return root
