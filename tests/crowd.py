"""Starts processes together, as torchrun does, but faster: they are forked, and communicate by gloo.

    Crowd(3, function, tmp_path).results()

calls function() in each of 3 processes that form torch.distributed's group.
"""

import multiprocessing
import os
import time
import traceback
import uuid
from datetime import timedelta

import torch
import torch.distributed as dist

LIMIT = 120  # the longest time, in seconds, that a process may run or wait


def wait_for(condition, limit=LIMIT):
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Crowd:
    """Starts `size` processes that each call function(), and meet and write their results in `folder`."""

    def __init__(self, size, function, folder, together=True):
        """together=False: without a process group, which function() is to create."""
        self.together = together
        self.folder = folder / f"crowd-{uuid.uuid4().hex[:8]}"
        self.folder.mkdir()
        context = multiprocessing.get_context("fork")
        self.children = [context.Process(target=self._play, args=(rank, size, function)) for rank in range(size)]
        for child in self.children:
            child.start()

    def _play(self, rank, size, function):
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
        meet = dict(init_method=f"file://{self.folder}/meet", rank=rank, world_size=size)
        if self.together:
            dist.init_process_group("gloo", timeout=timedelta(seconds=LIMIT), **meet)
        try:
            result = function()
        except BaseException:
            (self.folder / f"{rank}.txt").write_text(traceback.format_exc())
            raise
        torch.save(result, self.folder / f"{rank}.pt")

    def ended(self, limit=LIMIT):
        """The exit codes. A process that does not end within the limit is killed, and fails the test."""
        deadline = time.monotonic() + limit
        for child in self.children:
            child.join(max(0, deadline - time.monotonic()))
        late = [rank for rank, child in enumerate(self.children) if child.is_alive()]
        for child in self.children:
            child.kill()
            child.join()
        assert not late, f"processes {late} did not end within {limit} s"
        return [child.exitcode for child in self.children]

    def results(self, limit=LIMIT):
        """What function() returned in each process."""
        codes = self.ended(limit)
        assert not any(codes), self.messages()
        return [torch.load(self.folder / f"{rank}.pt", weights_only=False) for rank in range(len(self.children))]

    def messages(self):
        """The traceback of each process, or "" if it ended without an error."""
        files = [self.folder / f"{rank}.txt" for rank in range(len(self.children))]
        return [file.read_text() if file.exists() else "" for file in files]
