"""Several processes that share one run (torchrun). With a single process every function here does nothing."""

import os
import tempfile
from contextlib import contextmanager, redirect_stdout

import torch
from torch import distributed

from errors import UserError, one_line


def several():
    """Return whether torchrun started several processes, also before they have met."""
    return os.environ.get("WORLD_SIZE", "1") != "1"


def rank():
    """Return the number of this process, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world_size():
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def shard(items):
    """Return the part of a list or array that this process works on: every world-size-th item."""
    return items[rank() :: world_size()]


def all_reduce_sum(tensor):
    """Sum a tensor over all processes, in place, and return it."""
    if distributed.is_initialized():
        distributed.all_reduce(tensor)
    return tensor


def broadcast(value):
    """Return the first process's value, any picklable object, in every process."""
    box = [value]
    if distributed.is_initialized():
        distributed.broadcast_object_list(box)
    return box[0]


@contextmanager
def process_group(args):
    """Join the processes that torchrun started. All but the first write to a scratch folder and print only errors."""
    if not several():
        yield
        return
    world, on_gpu = os.environ["WORLD_SIZE"], torch.device(args.device).type == "cuda"
    try:
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            args.device = "cuda"  # the device that was just set
        distributed.init_process_group("nccl" if on_gpu else "gloo")
    except (ValueError, KeyError, RuntimeError) as error:  # for example, a variable is missing
        raise UserError(f"WORLD_SIZE={world}: the other processes cannot be reached ({one_line(error)}); start several "
                        "processes with torchrun, one for each GPU or with --device cpu; or unset WORLD_SIZE") from None
    if rank() == 0:
        yield
    else:
        scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with scratch as args.out, open(os.devnull, "w") as silence, redirect_stdout(silence):
            args.no_model = True
            yield
    distributed.destroy_process_group()  # not after an error: it would wait for the other processes


def lost_process(error):
    """Return whether an exception means that another process of this run has ended."""
    return (several() and "onnection" in str(error)) or isinstance(error, distributed.DistError)
