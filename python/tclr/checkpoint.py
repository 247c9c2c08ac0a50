"""Atomic writing of files, the checkpoint of a run, and signals as a request for a checkpoint."""

import errno
import fcntl
import os
import re
import signal
import time
from contextlib import contextmanager

import torch

from . import processes

STOPS = signal.SIGTERM, signal.SIGINT, signal.SIGHUP  # of a batch system, of Ctrl-C, of a terminal that closes
INSIST = 1.0  # seconds after the first Ctrl-C, which torchrun repeats, from which another one ends the process at once


@contextmanager
def whole(path, *, shared=False):
    """Opens a binary file for writing. It gets its name only when it is complete and on the disk.

    shared: other processes may write the same file at the same time; the last one to finish wins.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "its folder does not exist", str(path))
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.part" if shared else f"{path.name}.part")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError as error:
        if error.errno and error.filename is None:  # as on a full disk
            error.filename = str(path)
        raise
    finally:
        unfinished.unlink(missing_ok=True)


def save(path, **state):
    """Writes a checkpoint. If that fails, for example on a full disk, the previous file stays."""
    with whole(path) as file:
        torch.save(state, file)


def load(path, content=None, **more):
    """Loads what `save` wrote. Only tensors and plain values are loaded, so no code in the file is run.

    content: a file object to read instead of `path`. Raises ValueError with the reason in one sentence.
    """
    try:
        return torch.load(content or path, map_location="cpu", weights_only=True, **more)
    except Exception as error:  # a damaged file can raise any kind of error
        if isinstance(error, OSError) and error.filename is not None:
            raise
        raise ValueError(f"{path}: {refusal(error)}") from None  # torch's message suggests to run the file's code


def newest(path):
    """The newest checkpoint on the disk of any process, loaded in all processes; None if there is none."""
    return processes.newest(path, steps, lambda content: load(path, content))


def steps(path):
    """The number of steps that the run of a checkpoint has taken, without reading the weights; 0 for bare weights."""
    return load(path, mmap=True).get("done", 0)


def refusal(error):
    """The reason why torch.load did not load a file, in one sentence."""
    if found := re.search(r"GLOBAL (\S+)", str(error)):
        what = f"found an object of {found[1]}, and loading such an object can run code, so nothing was loaded"
        return f"{what}; wanted weights alone, as torch.save(model.state_dict(), file) writes them"
    if "TorchScript" in str(error):
        return "found a TorchScript program, and nothing was loaded; wanted weights alone, as a state dict"
    return "found no file of weights alone: it is cut short, damaged, of another kind, or holds more than weights"


@contextmanager
def alone(out):
    """Creates a run's folder and locks it. Raises SystemExit if another process has locked it, on this machine or not.

    The lock ends with the process. File systems without locks are left unlocked.
    """
    out.mkdir(parents=True, exist_ok=True)
    folder = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SystemExit(f"{out}: another process pretrains in this folder now: wait until it ends") from None
    except OSError:
        pass
    try:
        yield
    finally:
        os.close(folder)


def claim(out, *, resume, overwrite):
    """Creates a run's folder. Raises SystemExit if it is in use, and neither resume nor overwrite is given."""
    vacant(out, resume=resume, overwrite=overwrite)
    out.mkdir(parents=True, exist_ok=True)


def vacant(out, *, resume, overwrite):
    """Raises SystemExit as `claim` does, but writes nothing."""
    if resume and overwrite:
        raise SystemExit("found both resume and overwrite, wanted one: overwriting deletes what would be resumed")
    if out.exists() and any(out.iterdir()) and not (resume or overwrite):
        raise SystemExit(f"{out} is not empty: choose another --out, or pass --resume true or --overwrite true")


class StopRequest:
    """A context in which the signals STOPS do not end the process. As an int, it is the first one received, or 0."""

    def __init__(self):
        self.first, self.at = 0, 0.0

    def __int__(self):
        return self.first

    def __enter__(self):
        before = {each: signal.getsignal(each) for each in STOPS}
        ignored = None, signal.SIG_IGN  # as nohup does with SIGHUP
        self.before = {each: handler for each, handler in before.items() if handler not in ignored}
        for each in self.before:
            signal.signal(each, self.note)
        return self

    def note(self, number, frame):
        if not self.first:
            self.first, self.at = int(number), time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.at > INSIST:
            raise KeyboardInterrupt

    def __exit__(self, *_):
        for each, handler in self.before.items():
            signal.signal(each, handler)
