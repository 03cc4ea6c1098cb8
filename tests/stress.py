"""Break runs in every way we can think of, resume them, and compare them with a run that nothing happened to.

    python tests/stress.py            some minutes
    python tests/stress.py --short    a little of everything, as in CI

Prints a table. Exit status 1: something was lost. Runs are forked from this process, which has done the slow imports.
They have one thread each, a tiny model and real code.
"""

import argparse
import os
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np
import torch
from conftest import tiny_bert
from test_train import assert_same_run, only_folder, small

import train

TIMEOUT = 60  # seconds; a run that takes longer hangs


class Lab:
    """A scratch folder, a tiny model, a random generator, and the run that nothing happens to."""

    def __init__(self, scratch, short):
        self.scratch, self.short, self.rng, self.count = Path(scratch), short, np.random.default_rng(0), 0
        self.model = self.scratch / "tiny"
        self.model.mkdir()
        assert self.wait(self.start(lambda: tiny_bert(self.model) and 0))[0] == 0
        small(self.model, "")  # writes the data, which a child could not keep
        out, begun = self.out(), time.perf_counter()
        assert self.wait(self.run(out))[0] == 0
        self.reference, self.seconds = only_folder(out), time.perf_counter() - begun

    def times(self, few, many):
        """Return how often to inject a fault."""
        return few if self.short else many

    def out(self):
        """Return the path of a new folder for runs."""
        self.count += 1
        return self.scratch / f"out-{self.count}"

    def start(self, function, **environment):
        """Fork a child that calls function() and exits with what it returns. Returns its process id."""
        pid = os.fork()
        if pid:
            return pid
        status = 99  # a traceback
        try:
            log = os.open(self.scratch / f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(environment)
            torch.set_num_threads(1)
            signal.signal(signal.SIGTERM, train.terminated)
            status = function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(self, out, *flags, before=lambda: None, **environment):
        """Fork a small run. before: called in the child first. Returns its process id."""
        return self.start(lambda: before() or train.main(small(self.model, out, *flags)), **environment)

    def wait(self, pid):
        """Return a child's exit status, or minus the signal that killed it, and its lines that begin with train.py."""
        ends = time.monotonic() + TIMEOUT
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"a run hangs: {TIMEOUT} s and no end")
            time.sleep(0.005)
        lines = (self.scratch / f"log-{pid}").read_text().splitlines()
        assert not any("Traceback" in line for line in lines), "\n".join(lines)
        return os.waitstatus_to_exitcode(ended[1]), [line for line in lines if line.startswith("train.py:")]

    def begin(self, out):
        """Fork a small run, and wait until it has saved a checkpoint. Returns its process id."""
        pid, ends = self.run(out), time.monotonic() + TIMEOUT
        while not list(out.glob("*/checkpoint.pt")):
            assert time.monotonic() < ends, "no checkpoint appeared"
            time.sleep(0.002)
        return pid

    def kill(self, pid, number=signal.SIGKILL):
        """Send a signal to a child. Returns what `wait` does."""
        os.kill(pid, number)
        return self.wait(pid)

    def assert_goes_on(self, out):
        """Resume a run. It must end as the run that nothing happened to."""
        status, errors = self.wait(self.run(out, "--resume"))
        assert status == 0, errors
        assert_same_run(only_folder(out), self.reference)
        shutil.rmtree(out)


def kill_9(lab):
    """kill -9 at a random moment, also while resuming"""
    times = lab.times(4, 40)
    for i in range(times):
        out = lab.out()
        for flags in [(), ("--resume",)][: 1 + i % 2]:
            pid = lab.run(out, *flags)
            time.sleep(lab.rng.random() * lab.seconds)
            lab.kill(pid)
        lab.assert_goes_on(out)
    return times


def kill_9_before_each_change(lab):
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

    for n in range(1, 10**6, step):
        out = lab.out()
        status, errors = lab.wait(lab.run(out, before=lambda n=n, out=out: die_before(n, out)))
        if status == 0:
            return n // step
        assert status == -signal.SIGKILL, errors
        lab.assert_goes_on(out)


def interrupt(lab):
    """SIGTERM or Ctrl-C at a random moment"""
    times = lab.times(2, 20)
    for number in (signal.SIGINT, signal.SIGTERM) * (times // 2):
        out = lab.out()
        pid = lab.run(out)
        time.sleep(0.1 + lab.rng.random() * lab.seconds * 0.8)
        status, errors = lab.kill(pid, number)
        assert status in (0, 128 + number) and len(errors) == (status > 0), (status, errors)  # 0: it had just ended
        lab.assert_goes_on(out)
    return times


def full_disk(lab):
    """No file may grow beyond a random size, as on a full disk"""
    times, largest = lab.times(6, 60), max(path.stat().st_size for path in lab.reference.rglob("*"))

    def limit(size):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then a write fails, as on a full disk
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    for size in np.geomspace(6000, 4 * largest, times).astype(int).tolist():  # a log of messages is smaller
        out = lab.out()
        status, errors = lab.wait(lab.run(out, before=lambda size=size: limit(size)))
        assert status in (0, 2) and len(errors) == (status > 0), (size, status, errors)
        assert not list(out.rglob("*part-*")), "a part of a file was left"
        lab.assert_goes_on(out)
    return times


def damage(lab):
    """Checkpoint cut off or with a bit flipped: refused, or the same result. Log and config.json emptied: no matter"""
    times, out = lab.times(4, 60), lab.out()
    lab.kill(lab.begin(out))
    whole = (only_folder(out) / "checkpoint.pt").read_bytes()
    for i in range(times):
        copy, damaged = lab.out(), bytearray(whole)
        shutil.copytree(out, copy)
        folder = only_folder(copy)
        for name in ("config.json", "epochs.jsonl"):
            (folder / name).write_bytes(b"")
        if i % 2:
            del damaged[int(lab.rng.integers(len(whole))) :]
        else:
            damaged[int(lab.rng.integers(len(whole)))] ^= 1 << int(lab.rng.integers(8))
        (folder / "checkpoint.pt").write_bytes(damaged)
        status, errors = lab.wait(lab.run(copy, "--resume"))
        if status:
            assert (status, len(errors)) == (2, 1), errors
            assert (folder / "checkpoint.pt").read_bytes() == damaged, "a damaged checkpoint was changed"
            (folder / "checkpoint.pt").write_bytes(whole)
        lab.assert_goes_on(copy)
    return times


def two_at_once(lab):
    """The same run started again while it goes on: refused"""
    times = lab.times(1, 5)
    for _ in range(times):
        out = lab.out()
        first = lab.begin(out)
        os.kill(first, signal.SIGSTOP)
        status, errors = lab.wait(lab.run(out, "--resume"))
        assert (status, len(errors)) == (2, 1), errors
        assert lab.kill(first, signal.SIGCONT)[0] == 0
        lab.assert_goes_on(out)
    return times


def dying_process(lab):
    """One of two processes killed: the other one ends, and both go on"""

    def pair(out, *flags):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        return [lab.run(out, *flags, WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port,
                        MASTER_ADDR="localhost") for rank in "01"]  # fmt: skip

    whole, times = lab.out(), lab.times(2, 10)
    assert [lab.wait(pid)[0] for pid in pair(whole)] == [0, 0]
    for i in range(times):
        out = lab.out()
        pids = pair(out)
        while not list(out.glob("*/checkpoint.pt")):
            time.sleep(0.002)
        lab.kill(pids[i % 2])
        status, errors = lab.wait(pids[1 - i % 2])
        assert (status, len(errors)) == (2, 1), errors
        assert [lab.wait(pid)[0] for pid in pair(out, "--resume")] == [0, 0]
        assert_same_run(only_folder(out), only_folder(whole))
    return times


FAULTS = (kill_9, kill_9_before_each_change, interrupt, full_disk, damage, two_at_once, dying_process)


def main():
    """Inject all faults, or those named. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--short", action="store_true", help="a little of everything")
    p.add_argument("--only", nargs="+", choices=[fault.__name__ for fault in FAULTS], help="these faults only")
    args, lost = p.parse_args(), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(scratch, args.short)
        for fault in FAULTS:
            if args.only and fault.__name__ not in args.only:
                continue
            begun = time.perf_counter()
            try:
                outcome = f"{fault(lab)} times, nothing lost"
            except AssertionError as error:
                outcome, lost = f"LOST: {error}", 1
            print(f"{fault.__doc__}:  {outcome}  ({time.perf_counter() - begun:.0f} s)", flush=True)
    return lost


if __name__ == "__main__":
    sys.exit(main())
