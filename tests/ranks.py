"""A pool of processes that act as ranks and communicate by gloo. All tests use the same pool.

    with Pool(4) as pool: pool.run(3, function, *arguments)

calls function(group, *arguments) in the first 3 processes, where `group` is their process group, and returns their
results. An exception is returned as its text. If a call exceeds the time limit, the pool is closed and the test fails.
"""

import tempfile
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

LIMIT = 60  # seconds a call may take


class Error(str):
    """The type and message of an exception: "ValueError: group: ..."."""


class Pool:
    def __init__(self, size, backend="gloo"):
        context = mp.get_context("forkserver")  # it imports PyTorch once for all ranks
        context.set_forkserver_preload(["torch", "tclr_kernels"])
        self.folder = tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, size, Path(self.folder.name) / "store", there, backend), daemon=True
            )
            process.start()
            self.pipes.append(here)
            self.processes.append(process)
        self.run(size, _ready)

    def run(self, size, function, *arguments, limit=LIMIT, dead=()):
        """Calls function(group, *arguments) on `size` ranks. dead: the ranks that are expected not to answer."""
        for pipe in self.pipes[:size]:
            pipe.send((size, function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes[:size]):
            if rank in dead:
                results.append(None)
                continue
            if not pipe.poll(limit):
                self.close()
                raise TimeoutError(f"rank {rank} of {size} gave no answer within {limit} s")
            results.append(pipe.recv())
        return results

    def close(self):
        for process in self.processes:
            process.kill()
        self.folder.cleanup()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _ready(group):
    return dist.get_rank(group)


def _serve(rank, size, store, pipe, backend):
    torch.set_num_threads(1)
    if backend == "nccl":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=LIMIT)
    )
    groups = {P: dist.new_group(list(range(P))) for P in range(1, size)} | {size: dist.group.WORLD}
    while True:
        P, function, arguments = pipe.recv()
        try:
            result = function(groups[P], *arguments)
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            result = Error(f"{type(error).__name__}: {error}")
        pipe.send(result)
