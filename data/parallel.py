"""What lets several processes share the work of a run (torchrun), and keeps others out of each other's files."""

import fcntl
import os
import tempfile
from contextlib import contextmanager, redirect_stdout

import torch
from torch import distributed


def rank():
    """Number of this process among those that torchrun started; 0 if it is alone."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def share(items):
    """What this process takes of a list or array that several work on (torchrun): every world-th; alone, all of it."""
    return items[distributed.get_rank() :: distributed.get_world_size()] if distributed.is_initialized() else items


def add_up(tensor):
    """Sum a tensor over all processes, in place. Returns it."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def from_first(value):
    """What the first process has, whatever it is, in all of them."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


@contextmanager
def processes(args):
    """Where torchrun starts several processes: join them. All but the first print errors only, and leave nothing."""
    world = os.environ.get("WORLD_SIZE", "1")
    if world == "1":
        yield
        return
    on_gpu = torch.device(args.device).type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            args.device = "cuda"  # the one just set, whichever --device names
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    except (ValueError, KeyError) as error:  # a variable is absent, or no number
        raise OSError(f"WORLD_SIZE is {world}, but the others cannot be met: {str(error).splitlines()[0]}; start "
                      "several processes with torchrun, or unset WORLD_SIZE") from None
    if rank() == 0:
        yield
    else:
        with tempfile.TemporaryDirectory() as scratch, open(os.devnull, "w") as silence, redirect_stdout(silence):
            args.out, args.no_model, args.resume = scratch, True, None
            yield
    distributed.destroy_process_group()


def lost_process(error):
    """Whether an exception says that another process of this run is gone."""
    lost = distributed.is_initialized() and "onnection" in str(error)
    return lost or isinstance(error, distributed.DistError)


def lock(file, wait=False):
    """Keep an open file from other processes that lock it, until it is closed: by the kernel, too, after kill -9.
    BlockingIOError where another holds it, unless told to wait."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise
    except OSError:
        pass  # some network file systems have no locks
