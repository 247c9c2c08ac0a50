"""Communication between the processes that `torchrun` starts, so that all of them make the same decisions.

Anything that one process may find by itself (a file, a signal, an error, a number) is first exchanged, and every
process then decides from the same values. Without `torchrun`, or outside `group`, every function works for a single
process.
"""

import functools
import io
import itertools
import os
import signal
import socket
import threading
import time
import uuid
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
from torch import distributed

TIMEOUT = 1800.0  # seconds
LONGEST = 1_000_000  # seconds; gloo's clock cannot count thousands of times as many
AGENT = 20.0  # seconds to wait for the store of torchrun's agent, which starts before its processes
# Seconds in which gloo's threads release the tensors of the last collective, for which they need Python's global lock.
# If the group were freed or Python ended meanwhile, the process could hang or abort (pytorch/pytorch#190489).
PAUSE = 0.2


class Elsewhere(RuntimeError):
    """Another process failed, ended, or did not answer in time. Its own message says why."""


def launched():
    """The number of processes that `torchrun` started."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank():
    return distributed.get_rank() if distributed.is_initialized() else 0


def ranks():
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def group(timeout=TIMEOUT):
    """Creates the process group of the processes that `torchrun` started. Can be used as a decorator.

    It does nothing for a single process, or if there is a group already. After an error the group is not destroyed: the
    process ends, and other processes that wait for it get an error.

    timeout: the seconds after which a process that waits for the others raises an error.
    """
    if not 0 < timeout <= LONGEST:
        raise ValueError(f"timeout: found {timeout}, wanted a number of seconds above 0 and at most {LONGEST:,}")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_with, args=(os.getppid(),), daemon=True).start()
    if launched() == 1 or distributed.is_initialized():
        yield
        return
    nccl = torch.cuda.is_available() and distributed.is_nccl_available()
    backend, limit = "cpu:gloo,cuda:nccl" if nccl else "gloo", timedelta(seconds=timeout)
    try:
        store = met(agents_store(timeout) or served_store(limit), timeout)
        where = dict(store=store, rank=int(os.environ["RANK"]), world_size=launched())
        distributed.init_process_group(backend, timeout=limit, **where)
        yield
    except RuntimeError as error:
        if not isinstance(error, distributed.DistError) and "gloo" not in str(error):
            raise
        lost = f"another process ended, or did not answer within the timeout of {timeout:g} s: see its own message"
        raise Elsewhere(lost) from error
    finally:
        time.sleep(PAUSE)
    distributed.destroy_process_group()


def end_with(parent):
    """Sends this process a SIGTERM once its parent, the agent of torchrun, no longer exists.

    An agent that ends by itself has sent that signal before. A killed agent cannot, and the process might otherwise
    write to the folder of a run that was started again.
    """
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


def agents_store(timeout=TIMEOUT):
    """The store of torchrun's agents, which still exists after they restart the processes; None without agents."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = distributed.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=min(AGENT, timeout)))
    store.set_timeout(timedelta(seconds=timeout))
    return store


@functools.cache
def served_store(limit):
    """Without agents: a store that process 0 serves until it ends, so that later groups meet there too."""
    return next(distributed.rendezvous("env://", timeout=limit))[0]


def met(store, timeout):
    """A part of the store, under a new prefix, that only the processes started together use.

    In the agents' store itself, a process may read the address of a process that was killed before a restart, and wait
    for it (https://github.com/pytorch/pytorch/issues/135712). Process 0 offers a new prefix. The others answer with
    random names, and accept an offer when process 0 confirms that it received their name.
    """
    own, name = int(os.environ["RANK"]), uuid.uuid4().hex
    if own == 0:
        store.set("tclr/offer", name)
        answers = [store.get(f"tclr/{name}/{other}").decode() for other in range(1, launched())]
        store.set(f"tclr/{name}/received", " ".join(answers))
        return distributed.PrefixStore(name, store)
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        offer = store.get("tclr/offer").decode()
        store.set(f"tclr/{offer}/{own}", name)
        if store.check([f"tclr/{offer}/received"]) and name in store.get(f"tclr/{offer}/received").decode().split():
            return distributed.PrefixStore(offer, store)
        time.sleep(0.02)
    raise TimeoutError(f"process 0 did not start within {timeout} s, as process {own} did")


@contextmanager
def single(what):
    """Raises SystemExit if there is more than one process. Can be used as a decorator."""
    if (found := max(launched(), ranks())) > 1:
        raise SystemExit(f"{what}: found {found} processes, wanted one: start it without torchrun")
    yield


def exchange(value):
    """The values of all processes, in the order of ranks. If one of them failed (see `telling`), all raise an error."""
    if ranks() == 1:
        return [value]
    return _exchange(None, value)


def _exchange(failed, value):
    found = [None] * ranks()
    distributed.all_gather_object(found, (failed, value))
    for number, (other, _) in enumerate(found):
        if other and not failed:
            message = f"process {number} of {ranks()} ended with {other}: see its own message"
            raise _told(SystemExit(1) if other == "SystemExit" else Elsewhere(message))
    return [each for _, each in found]


def _told(error):
    """Marks an error that all processes already know about."""
    error.told = True
    return error


@contextmanager
def telling():
    """Tells the other processes about an error in its body. They raise an error at their next `exchange`.

    The next communication of the other processes must therefore be an `exchange`. If it were another collective, such
    as that of a loss or a backward, they would wait there for this process.
    """
    try:
        yield
    except (Exception, SystemExit) as error:
        if ranks() > 1 and not getattr(error, "told", False):
            _told(error)
            with suppress(RuntimeError):  # the other processes may have ended
                _exchange(type(error).__name__, None)
        raise


@contextmanager
def together():
    """As `telling`, and then waits until all processes have reached the end of the body."""
    with telling():
        yield
    exchange(None)


def from_first(function):
    """Calls function() in the first process only, and returns its result in all processes."""
    with together():
        value = [function() if rank() == 0 else None]
    if ranks() > 1:
        distributed.broadcast_object_list(value, src=0)
    return value[0]


class Job:
    """The stage that a run's processes reached, kept in the store of torchrun's agents over restarts.

    "claiming": the first process may have changed the run's folder. "claimed": the folder is that of this run.
    "finished": the run is complete, and the folder may be that of a later run of the same program.

    TORCHELASTIC_RESTART_COUNT is not enough: it differs between machines, is 0 again after the number of machines has
    changed, and is above 0 even if the processes ended before they did anything.
    """

    STAGES = "new", "claiming", "claimed", "finished"
    runs = itertools.count()  # of this process

    def __init__(self, folder):
        self.store, self.key = agents_store(), f"tclr/{next(self.runs)}/{folder.resolve()}"

    def stage(self):
        """The last stage that any process of this job reached before the restart."""
        with telling():
            if self.store:
                reached = [stage for stage in self.STAGES if self.store.check([self.key + stage])]
            else:
                reached = ("claimed",) if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) else ()
        return max(("new", *(stage for stages in exchange(reached) for stage in stages)), key=self.STAGES.index)

    def note(self, stage):
        if self.store:
            self.store.set(self.key + stage, "")


def say(text):
    """Prints in the first process only."""
    if rank() == 0:
        print(text, flush=True)


def same(**facts):
    """Raises ValueError, in all processes, if a fact is not the same in all of them."""
    first, *others = exchange(facts)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other.get(name) != value:
                found = f"{value!r} in process 0 and {other.get(name)!r} in process {number}"
                raise _told(ValueError(f"{name}: found {found}, wanted the same in all {ranks()}"))


def newest(file, age, load):
    """Loads the newest file of this name on any process's disk, in all processes; None if no process has one.

    age(file): a number that is larger for a newer file. The machines need not share a disk.
    """
    if ranks() == 1:
        return load(file) if file.exists() else None
    with telling():
        mine = age(file) if file.exists() else None
    ages = exchange(mine)
    found = [number for number, each in enumerate(ages) if each is not None]
    if not found:
        return None
    source = max(found, key=lambda number: (ages[number], -number))
    with together():
        content = [file.read_bytes() if rank() == source else None]
    distributed.broadcast_object_list(content, src=source)
    with together():
        return load(io.BytesIO(content[0]))


@torch.no_grad()
def average(tensors, weight):
    """Replaces tensors by their means over the processes, each with its weight: the same bits in all processes.

    Of equal values the mean is that value.
    """
    if ranks() == 1 or not tensors:
        return
    flat = torch.cat([each.flatten().double() for each in tensors]) * weight
    every = [torch.empty_like(flat) for _ in range(ranks())]
    distributed.all_gather(every, flat)
    total = functools.reduce(torch.add, every)  # in their order, so that all get the same bits
    for each, mean in zip(tensors, total.split([each.numel() for each in tensors]), strict=True):
        each.copy_(mean.view_as(each))


def gpu():
    """The GPU of this process: cuda:LOCAL_RANK, or the only GPU that is visible to it."""
    count, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", 0))
    if 1 < count <= local or count == 0:
        raise ValueError(f"device: found {count} GPUs for local process {local}, wanted one for each process")
    return f"cuda:{local if count > 1 else 0}"


def one_gpu_each(device):
    """Raises ValueError, in all processes, if two of them use the same GPU."""
    with telling():
        mine = socket.gethostname(), str(torch.cuda.get_device_properties(device).uuid)
    found = exchange(mine)
    for number, each in enumerate(found):
        if (first := found.index(each)) != number:
            on = f"processes {first} and {number} on one GPU of {each[0]}"
            wanted = "a GPU for each: set device to cuda, without a number, and start no more processes than GPUs"
            raise _told(ValueError(f"device: found {on}, wanted {wanted}"))
