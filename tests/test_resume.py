"""A run that was stopped goes on as if nothing had happened. What cannot go on is refused in one line."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import filelock
import pytest
import torch
from test_train import (
    ROOT,
    assert_same_run,
    data_folder,
    log_of,
    only_folder,
    refused,
    row_of,
    small,
)

import runs
import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tiny, tmp_path):
    """command("--keep", "0.3", …) → the arguments of a small run."""
    return lambda *flags: small(tiny, tmp_path, *flags)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole("--keep", "0.3", …) → the folder of such a run that nothing happened to."""

    def go(*flags):
        out = tmp_path_factory.mktemp("whole")
        assert train.main(small(tiny, out, *flags)) == 0
        return only_folder(out)

    return cache(go)


def stopped(monkeypatch, command, epoch, before_checkpoint=False):
    """Interrupt a run after an epoch, with or without its checkpoint. Returns the run's folder."""
    end_epoch, save = runs.Run.end_epoch, torch.save

    def end(run, *args):
        end_epoch(run, *args)
        if len(run.log) == epoch:
            raise KeyboardInterrupt

    def save_or_stop(state, path):
        if len(state["log"]) == epoch:
            raise KeyboardInterrupt
        save(state, path)

    with monkeypatch.context() as patch:
        if before_checkpoint:
            patch.setattr(torch, "save", save_or_stop)
        else:
            patch.setattr(runs.Run, "end_epoch", end)
        assert train.main(command) == 130
    folder = only_folder(command[command.index("--out") + 1])
    assert len(log_of(folder)) == epoch and not (folder / "result.json").exists()
    return folder


# ---- bit for bit


@pytest.mark.parametrize(("flags", "epoch", "before_checkpoint"), [
    ((), 1, False), ((), 3, True), (("--precision", "bf16"), 2, True), (("--method", "random"), 2, False),
    (("--method", "full"), 2, True), (("--save-every", "2"), 3, False), (("--sample",), 3, True),
    (("--method", "loss", "--rescore", "none"), 2, False), (("--method", "forgetting"), 3, False),
    (("--method", "infobatch", "--cycle", 2, "--full-end", 0), 2, False),
    (("--selection", "static", "--full-epochs", 2), 1, False), (("--selection", "static", "--full-epochs", 2), 3, True),
])  # fmt: skip
def test_a_stopped_run_ends_as_if_it_had_not_been(command, whole, monkeypatch, flags, epoch, before_checkpoint):
    """Weights, selections, log and metrics are the same. A log that is ahead of its checkpoint is put right."""
    folder = stopped(monkeypatch, command(*flags), epoch, before_checkpoint)
    assert train.main([*command(*flags), "--resume"]) == 0
    assert_same_run(folder, whole(*flags))


def test_a_killed_process_with_another_hash_seed_and_folder_ends_the_same(command, whole, tmp_path):
    """`kill -9` in the second epoch of a real process, then --resume in this one."""
    (tmp_path / "elsewhere").mkdir()
    environment = {**os.environ, "PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *command()], env=environment, text=True,
                               cwd=tmp_path / "elsewhere", stdout=subprocess.PIPE)  # fmt: skip
    while "epoch  1/4" not in process.stdout.readline():
        assert process.poll() is None
    process.kill()
    process.wait()
    assert not list((tmp_path / "elsewhere").iterdir())
    folder = only_folder(tmp_path)
    assert not (folder / "result.json").exists()
    assert train.main([*command(), "--resume"]) == 0
    assert_same_run(folder, whole())


def test_a_run_can_be_stopped_twice_and_its_clock_counts_all_parts(command, whole, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr(runs.Clock, "now", lambda _: float(next(ticks)))  # each phase of an epoch takes a second
    folder = stopped(monkeypatch, command(), 1)
    assert stopped(monkeypatch, [*command(), "--resume"], 3) == folder
    assert train.main([*command(), "--resume"]) == 0
    assert_same_run(folder, whole())
    seconds = row_of(folder)["seconds"]
    assert (seconds["train"], seconds["score"], seconds["select"], seconds["total"]) == (4, 3, 3, 10)


@pytest.mark.parametrize("failing", [1, 4, 9, 12])
def test_a_full_disk_leaves_only_whole_files(command, whole, monkeypatch, capsys, failing):
    """The n-th file cannot be written: config, epochs, a checkpoint, a selection. With room, the run goes on."""
    fsync, calls = os.fsync, iter(range(1, 1000))

    def full(descriptor):
        if next(calls) >= failing:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refused(capsys, command())
    folder = Path(only_folder(command()[-1])) if failing > 1 else None
    if folder:
        json.loads((folder / "config.json").read_text())
        assert not list(folder.rglob("*part*")) and len(log_of(folder)) >= (failing > 4)
    assert train.main([*command(), "--resume"]) == 0
    assert_same_run(only_folder(command()[-1]), whole())


# ---- the same command again


def test_a_finished_run_is_finished(command, capsys):
    """--resume says so. Without it, and where a model is wanted that was not saved, the command is refused."""
    assert train.main(command("--no-model")) == 0
    folder, before = only_folder(command()[-1]), time.time_ns()
    capsys.readouterr()
    assert train.main(command("--no-model", "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    for flags in (["--no-model"], ["--resume"], []):
        assert str(folder) in refused(capsys, command(*flags))
    assert (folder / "result.json").stat().st_mtime_ns < before


def test_an_unfinished_run_goes_on_with_resume_only(command, monkeypatch, capsys):
    """Where a run writes and how often it saves does not matter. Another seed is another run."""
    folder = stopped(monkeypatch, command(), 2)
    assert "--resume" in refused(capsys, command())
    assert train.main(command("--seed", 1)) == 0
    assert train.main(command("--resume", "--save-every", 2, "--no-model")) == 0
    assert (folder / "result.json").exists() and len(list(folder.parent.glob("*/result.json"))) == 2


def test_a_run_locks_its_folder_until_it_ends(command, monkeypatch, capsys):
    lines, end_epoch = [], runs.Run.end_epoch

    def second_run(run, *args):
        end_epoch(run, *args)
        lines.append(refused(capsys, command("--resume")))

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "end_epoch", second_run)
        assert train.main(command()) == 0
    assert len(lines) == 4 and all(str(only_folder(command()[-1])) in line for line in lines)
    with filelock.FileLock(only_folder(command()[-1]) / ".lock", timeout=0):
        refused(capsys, command("--resume"))
    assert train.main(command("--resume")) == 0


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"text",
    lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_left(command, monkeypatch, capsys, damage):
    path = stopped(monkeypatch, command(), 2) / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert str(path) in refused(capsys, command("--resume")) and path.read_bytes() == damaged


def test_a_checkpoint_cannot_run_code(command, monkeypatch, capsys, tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder, buffer = stopped(monkeypatch, command(), 2), io.BytesIO()
    torch.save({"log": Evil()}, buffer)
    (folder / "checkpoint.pt").write_bytes(buffer.getvalue())
    assert "checkpoint.pt" in refused(capsys, command("--resume")) and not (tmp_path / "ran").exists()


def test_a_damaged_config_does_not_matter(command, whole, monkeypatch):
    """config.json is for readers. A run's command and its checkpoint hold all that it needs."""
    folder = stopped(monkeypatch, command(), 2)
    (folder / "config.json").write_text("{")
    assert train.main(command("--resume")) == 0
    assert_same_run(folder, whole())


def test_changed_train_samples_are_noticed(tiny, tmp_path, monkeypatch, capsys):
    shutil.copytree(data_folder(tiny), tmp_path / "data")
    command = small(tiny, tmp_path / "runs", "--dataset", tmp_path / "data")
    stopped(monkeypatch, command, 2)
    labels = tmp_path / "data" / "train" / "label"
    first, *others = labels.read_text().splitlines()
    labels.write_text("\n".join([*others, first]) + "\n")
    assert "checkpoint.pt" in refused(capsys, [*command, "--resume"])


def test_another_environment_is_said(command, monkeypatch, capsys):
    stopped(monkeypatch, command(), 2)
    environment = runs.environment
    monkeypatch.setattr(runs, "environment", lambda device: environment(device) | {"threads": 64})
    capsys.readouterr()
    assert train.main(command("--resume")) == 0
    assert re.search(r"warning: .*threads", capsys.readouterr().err)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_its_status(command, monkeypatch, capsys, number):
    monkeypatch.setattr(train, "train", lambda *_: train.terminated(number, None))
    assert "--resume" in refused(capsys, command(), 128 + number)
