"""Break runs in every way we can think of, resume them, and compare them with a run that nothing happened to.

    python tests/stress.py            some minutes
    python tests/stress.py --short    a little of everything, as in CI

Exit status 1: something was lost. Damaged checkpoints and two runs at once are in test_resume.py.
"""

import os
import resource
import shutil
import signal
import sys
import time
from contextlib import suppress
from functools import partial

import numpy as np
import pytest

if __name__ == "__main__":  # pytest then imports this file, and finds what the tests need
    sys.exit(pytest.main([__file__, "-v"]))

from conftest import assert_same_run, await_checkpoint, ended, only_folder, start_two

SHORT = "--short" in sys.argv


@pytest.fixture
def assert_goes_on(start, command, whole, tmp_path):
    """assert_goes_on("runs") resumes the run in this folder. It must end as the run that nothing happened to."""

    def go(out):
        assert ended(start(command("--resume", out=out))) == 0
        assert_same_run(only_folder(tmp_path / out), whole())
        shutil.rmtree(tmp_path / out)

    return go


@pytest.mark.parametrize("resumes", [False, True])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_signal_at_a_random_moment(start, command, assert_goes_on, rng, number, resumes):
    """Within the time of a whole run, also while resuming."""
    began = time.perf_counter()
    assert ended(start(command(out="whole"))) == 0
    duration = time.perf_counter() - began
    for _ in range(1 if SHORT else 10):
        for flags in [[], ["--resume"]][: 1 + resumes]:
            process = start(command(*flags))
            time.sleep(0.2 + duration * rng.random())
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process.pid, number)
            assert ended(process) in (0, -9, 128 + number)  # 0: it had just ended
        assert_goes_on("runs")


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir"}


def die_before(number, out):
    """Have this process killed just before it changes a file below `out` for the n-th time."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and args[1].strip("rbt")
        if (event in CHANGES or writes) and str(out) in str(args[0]):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def test_a_kill_just_before_each_change_to_a_file(start, command, assert_goes_on, tmp_path):
    """For every n, the n-th change. Short: for every tenth."""
    number = 1
    while ended(start(command(), before=partial(die_before, number, tmp_path / "runs"))) == -9:
        assert_goes_on("runs")
        number += 10 if SHORT else 1
    assert number > 20


def limit_files(size):
    """Let no file of this process grow beyond a size. A write then fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk(start, command, assert_goes_on, whole, tmp_path):
    """No file may grow beyond a size, from that of a log to four times the largest."""
    largest = max(path.stat().st_size for path in whole().rglob("*"))
    for size in np.geomspace(6000, 4 * largest, 6 if SHORT else 60).astype(int).tolist():
        assert ended(start(command(), before=partial(limit_files, size))) in (0, 2)
        assert not list(tmp_path.rglob("part-*")), "a part of a file was left"
        assert_goes_on("runs")


@pytest.mark.parametrize("killed", [0, 1])
def test_one_of_two_processes_killed(start, command, tmp_path, killed):
    """The other one ends, and both go on."""
    assert list(map(ended, start_two(start, command(out="whole")))) == [0, 0]
    for _ in range(1 if SHORT else 5):
        processes = start_two(start, command())
        await_checkpoint(processes[0], tmp_path / "runs")
        os.kill(processes[killed].pid, signal.SIGKILL)
        assert [ended(processes[killed]), ended(processes[1 - killed])] == [-9, 2]
        assert list(map(ended, start_two(start, command("--resume")))) == [0, 0]
        assert_same_run(only_folder(tmp_path / "runs"), only_folder(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "runs")
