"""Files that are whole or not there, the checkpoint of a run, and the signal that asks for one."""

import os
import re
import signal
from contextlib import contextmanager

import torch

from . import processes

STOPPED = 128 + signal.SIGTERM  # the shell's exit status of a process that ended at SIGTERM


@contextmanager
def whole(path, *, shared=False):
    """A binary file that appears under its name when it is complete and on the disk, or not at all.

    shared: another process may write the same file meanwhile; each then writes one of its own, and the last one stays.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def save(path, **state):
    """Writes what a run needs to go on; a full disk leaves the last good file in place."""
    with whole(path) as file:
        torch.save(state, file)


def load(path, content=None, **more):
    """What `save` wrote; a file that holds anything but tensors and plain values is refused, not run.

    content: the file, where it was read already. Raises ValueError with the reason in one sentence.
    """
    try:
        return torch.load(content or path, map_location="cpu", weights_only=True, **more)
    except Exception as error:  # a damaged file raises errors of every kind
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {refusal(error)}") from None  # torch's own message advises to run the file's code


def newest(path):
    """What `save` wrote last on the disk of any process, the same for all of them; None where none has such a file."""
    return processes.newest(path, steps, lambda content: load(path, content))


def steps(path):
    """How many steps the run has taken whose checkpoint this is; 0 of weights alone. The weights are not read."""
    return load(path, mmap=True).get("done", 0)


def refusal(error):
    """Why torch.load did not load a file, in one sentence."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        what = f"found an object of {found[1]}, and loading such an object can run code, so nothing was loaded"
        return f"{what}; wanted weights alone, as torch.save(model.state_dict(), file) writes them"
    if "TorchScript" in str(error):
        return "found a TorchScript program, and nothing was loaded; wanted weights alone, as a state dict"
    return "found no file of weights alone: it is cut short, damaged, of another kind, or holds more than weights"


def claim(out, *, resume, overwrite):
    """Makes sure that a run's folder is new, or that the user said what is to happen with what lies there."""
    vacant(out, resume=resume, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)


def vacant(out, *, resume, overwrite):
    """Refuses a folder in use unless the user said what is to happen with what lies there; writes nothing."""
    if resume and overwrite:
        raise SystemExit("found both resume and overwrite, wanted one: overwriting deletes what would be resumed")
    if out.exists() and any(out.iterdir()) and not (resume or overwrite):
        raise SystemExit(f"{out} is not empty: choose another --out, or pass --resume true or --overwrite true")


class StopRequest:
    """True once SIGTERM has come; within `with`, the signal itself ends nothing."""

    def __init__(self):
        self.came = False

    def __bool__(self):
        return self.came

    def __enter__(self):
        self.before = signal.signal(signal.SIGTERM, lambda *_: setattr(self, "came", True))
        return self

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self.before)
