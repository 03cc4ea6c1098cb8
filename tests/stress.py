"""Break runs in every way we can think of, resume them, and compare them with a run that nothing happened to.

    python tests/stress.py            some minutes
    python tests/stress.py --short    a little of everything, as in CI

Prints a table. Exit status 1: something was lost. Runs are forked from this process, which has done the slow imports.
"""

import argparse
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np
import torch
from conftest import assert_same_run, free_port, only_folder, small, tiny_bert

import train

TIMEOUT = 60  # seconds; a run that takes longer hangs


class Lab:
    """A scratch folder, a tiny model, a random generator, and the run that nothing happens to."""

    def __init__(self, scratch, short):
        self.scratch, self.short, self.rng, self.count = Path(scratch), short, np.random.default_rng(0), 0
        self.model = self.scratch / "tiny"
        self.model.mkdir()
        building = multiprocessing.get_context("fork").Process(target=tiny_bert, args=[self.model])
        building.start()  # in a child, as it starts threads
        building.join()
        out, begun = self.out(), time.perf_counter()
        small(self.model, out)  # writes the data, which a child could not remember
        assert self.wait(self.run(out)) == 0
        self.reference, self.seconds = only_folder(out), time.perf_counter() - begun

    def times(self, few, many):
        """Return how often to inject a fault."""
        return few if self.short else many

    def out(self):
        """Return the path of a new folder for runs."""
        self.count += 1
        return self.scratch / f"out-{self.count}"

    def run(self, out, *flags, before=lambda: None, **environment):
        """Fork a small run. before: called in the child first. Returns the child, a Process."""

        def child():
            log = os.open(self.scratch / f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(log, stream)
            os.environ.update(environment)
            torch.set_num_threads(1)
            signal.signal(signal.SIGTERM, train.terminated)
            before()
            sys.exit(train.main(small(self.model, out, *flags)))

        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        return process

    def wait(self, process):
        """Wait for a child. Returns its exit status, or minus the signal that killed it.

        A child with status 2, 130 or 143 must print one line, another child none, and no child a traceback.
        """
        process.join(TIMEOUT)
        assert process.exitcode is not None, f"a run hangs: {TIMEOUT} s and no end"
        log = (self.scratch / f"log-{process.pid}").read_text()
        lines = sum(line.startswith("train.py:") for line in log.splitlines())
        assert "Traceback" not in log and lines == (process.exitcode in (2, 130, 143)), log
        return process.exitcode

    def kill(self, process, number=signal.SIGKILL):
        """Send a signal to a child. Returns what `wait` does."""
        os.kill(process.pid, number)
        return self.wait(process)

    def await_checkpoint(self, out):
        """Wait until a run has saved a checkpoint."""
        ends = time.monotonic() + TIMEOUT
        while not list(out.glob("*/checkpoint.pt")):
            assert time.monotonic() < ends, "no checkpoint appeared"
            time.sleep(0.002)

    def assert_goes_on(self, out):
        """Resume a run. It must end as the run that nothing happened to."""
        assert self.wait(self.run(out, "--resume")) == 0
        assert_same_run(only_folder(out), self.reference)
        shutil.rmtree(out)


def signals(lab):
    """kill -9, SIGTERM or Ctrl-C at a random moment, also while resuming"""
    times = lab.times(6, 60)
    for i in range(times):
        out, number = lab.out(), (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)[i % 3]
        for flags in [(), ("--resume",)][: 1 + i % 2]:
            process = lab.run(out, *flags)
            time.sleep(0.1 + lab.rng.random() * lab.seconds)
            assert lab.kill(process, number) in (0, -9, 128 + number)  # 0: it had just ended
        lab.assert_goes_on(out)
    return times


def kill_before_each_change(lab):
    """kill -9 just before the n-th change to a file, for every n (short: every tenth)"""
    changes, step = {"os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir"}, lab.times(10, 1)

    def die_before(number, out):
        seen = 0

        def hook(event, args):
            nonlocal seen
            writes = event == "open" and isinstance(args[1], str) and args[1].strip("rbt")
            if (event in changes or writes) and str(out) in str(args[0]):
                seen += 1
                if seen == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    number, out = 1, lab.out()
    while lab.wait(lab.run(out, before=partial(die_before, number, out))) == -9:
        lab.assert_goes_on(out)
        number, out = number + step, lab.out()
    return number // step


def full_disk(lab):
    """No file may grow beyond a random size, as on a full disk"""
    times, largest = lab.times(6, 60), max(path.stat().st_size for path in lab.reference.rglob("*"))

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for size in np.geomspace(6000, 4 * largest, times).astype(int).tolist():  # a log of messages is smaller
        out = lab.out()
        assert lab.wait(lab.run(out, before=partial(limit, size))) in (0, 2)
        assert not list(out.rglob("part-*")), "a part of a file was left"
        lab.assert_goes_on(out)
    return times


def damage(lab):
    """Checkpoint cut off, or with a bit flipped: refused, or the same result. Log and config.json emptied"""
    times, out = lab.times(4, 60), lab.out()
    process = lab.run(out)
    lab.await_checkpoint(out)
    lab.kill(process)
    whole = (only_folder(out) / "checkpoint.pt").read_bytes()
    for i in range(times):
        copy, damaged = lab.out(), bytearray(whole)
        folder = only_folder(shutil.copytree(out, copy))
        for name in ("config.json", "epochs.jsonl"):
            (folder / name).write_bytes(b"")
        place = int(lab.rng.integers(len(whole)))
        damaged[place] ^= 1 << int(lab.rng.integers(8))
        (folder / "checkpoint.pt").write_bytes(damaged if i % 2 else whole[:place])
        if lab.wait(lab.run(copy, "--resume")):
            (folder / "checkpoint.pt").write_bytes(whole)
        lab.assert_goes_on(copy)
    return times


def two_at_once(lab):
    """The same run started again while it goes on: refused"""
    out = lab.out()
    first = lab.run(out)
    lab.await_checkpoint(out)
    os.kill(first.pid, signal.SIGSTOP)
    assert lab.wait(lab.run(out, "--resume")) == 2
    assert lab.kill(first, signal.SIGCONT) == 0
    lab.assert_goes_on(out)
    return 1


def dying_process(lab):
    """One of two processes killed: the other one ends, and both go on"""

    def pair(out, *flags):
        port = str(free_port())
        return [lab.run(out, *flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port,
                        MASTER_ADDR="localhost") for rank in "01"]  # fmt: skip

    whole, times = lab.out(), lab.times(2, 10)
    assert list(map(lab.wait, pair(whole))) == [0, 0]
    for i in range(times):
        out = lab.out()
        processes = pair(out)
        lab.await_checkpoint(out)
        assert lab.kill(processes[i % 2]) == -9 and lab.wait(processes[1 - i % 2]) == 2
        assert list(map(lab.wait, pair(out, "--resume"))) == [0, 0]
        assert_same_run(only_folder(out), only_folder(whole))
    return times


def main():
    """Inject all faults. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--short", action="store_true", help="a little of everything")
    args, status = p.parse_args(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(scratch, args.short)
        for fault in (signals, kill_before_each_change, full_disk, damage, two_at_once, dying_process):
            begun = time.perf_counter()
            try:
                outcome = f"{fault(lab):>3} times, nothing lost"
            except AssertionError as error:
                outcome, status = f"LOST: {str(error)[-400:]}", 1
            print(f"{fault.__name__:<24} {outcome}, {time.perf_counter() - begun:.0f} s. {fault.__doc__}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main())
