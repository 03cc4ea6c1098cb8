"""A run that was stopped goes on as if nothing had happened. What cannot go on is refused in one line."""

import io
import os
import re
import shutil
import signal
import sys
from contextlib import suppress

import pytest
import torch

from conftest import (  # isort: skip
    GPU, assert_same_run, await_checkpoint, data_folder, ended, log_of, only_folder, refused, row_of, small,
)  # fmt: skip
from transformers import BertModel

import runs
import train


def stopped(monkeypatch, command, epoch, before_checkpoint=False):
    """Interrupt a run after an epoch, with or without its checkpoint. Returns the run's folder."""
    end_epoch, save = runs.Run.end_epoch, torch.save

    def stop(log):
        if len(log) == epoch:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if before_checkpoint:
            patch.setattr(torch, "save", lambda state, path: stop(state["log"]) or save(state, path))
        else:
            patch.setattr(runs.Run, "end_epoch", lambda run, *args: end_epoch(run, *args) or stop(run.log))
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


@pytest.mark.parametrize("device", [GPU])
def test_a_stopped_run_on_a_gpu_goes_on_up_to_rounding(command, whole, monkeypatch, device):
    folder = stopped(monkeypatch, command("--device", device), 2)
    assert train.main(command("--device", device, "--resume")) == 0
    for ours, theirs in zip(log_of(folder), log_of(whole("--device", device)), strict=True):
        assert ours["kept"] == theirs["kept"] and ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_another_process_goes_on_with_one_that_a_signal_ended(start, command, whole, tmp_path, number, status):
    """The first one had another hash seed and another current folder."""
    process = start(command())
    await_checkpoint(process, tmp_path / "runs")
    os.kill(process.pid, number)
    assert ended(process) == status
    folder = only_folder(tmp_path / "runs")
    assert not (folder / "result.json").exists()
    assert train.main(command("--resume")) == 0
    assert_same_run(folder, whole())


def test_a_run_can_be_stopped_twice_and_its_clock_counts_all_parts(command, whole, monkeypatch):
    """config.json, which is for readers, may be damaged."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(runs.Clock, "now", lambda _: float(next(ticks)))  # each phase of an epoch takes a second
    folder = stopped(monkeypatch, command(), 1)
    (folder / "config.json").write_text("{")
    assert stopped(monkeypatch, command("--resume"), 3) == folder
    assert train.main(command("--resume")) == 0
    assert_same_run(folder, whole())
    seconds = row_of(folder)["seconds"]
    assert (seconds["train"], seconds["score"], seconds["select"], seconds["total"]) == (4, 3, 3, 10)


@pytest.mark.parametrize("failing", [1, 9, 12, 13])
def test_a_full_disk_leaves_only_whole_files(run, command, whole, monkeypatch, capsys, failing, tmp_path):
    """No file can be written from the n-th on. With room, the run goes on."""
    fsync, calls = os.fsync, iter(range(1, 1000))

    def full(descriptor):
        if next(calls) >= failing:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert "No space left" in refused(capsys, command())
    assert not list((tmp_path / "runs").rglob("part-*"))
    assert_same_run(run("--resume"), whole())


# ---- the same command again


def test_a_finished_run_is_finished(command, monkeypatch, capsys):
    """--resume says so. Without it, and where a model is wanted that was not saved, the command is refused."""
    assert train.main(command("--no-model")) == 0
    capsys.readouterr()
    assert train.main(command("--no-model", "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    if os.path.exists("/dev/full"):
        with suppress(OSError), open("/dev/full", "w") as full, monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", full)
            status = train.main(command("--no-model", "--resume"))
        assert status == 2
    for flags in (["--no-model"], ["--resume"], []):
        assert "data-el2n-0.5-seed0-" in refused(capsys, command(*flags))


def test_an_unfinished_run_goes_on_with_resume_only(command, monkeypatch, capsys):
    """How often a run is saved does not matter. Another seed is another run. A changed environment is said."""
    folder, environment = stopped(monkeypatch, command(), 2), runs.environment
    assert "--resume" in refused(capsys, command())
    assert train.main(command("--seed", 1)) == 0
    (other,) = set(folder.parent.iterdir()) - {folder}
    assert log_of(other)[0]["loss"] != log_of(folder)[0]["loss"]
    monkeypatch.setattr(runs, "environment", lambda device: environment(device) | {"threads": 64})
    assert train.main(command("--resume", "--save-every", 2, "--no-model")) == 0
    assert (folder / "result.json").exists() and (other / "result.json").exists()
    assert re.search(r"warning: .*threads", capsys.readouterr().err)


def test_a_run_locks_its_folder_until_it_ends(command, monkeypatch, capsys):
    lines, end_epoch = [], runs.Run.end_epoch

    def start_again(run, *args):
        end_epoch(run, *args)
        lines.append(refused(capsys, command("--resume")))

    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "end_epoch", start_again)
        assert train.main(command()) == 0
    assert len(lines) == 4 and train.main(command("--resume")) == 0


def with_code(raw):
    """Return a checkpoint that is right and could run code: it refers to a function."""
    buffer = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(raw), weights_only=True), "more": print}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: b"", with_code, lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_left(command, monkeypatch, capsys, damage):
    path = stopped(monkeypatch, command(), 2) / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert "checkpoint.pt" in refused(capsys, command("--resume")) and path.read_bytes() == damaged


@pytest.mark.parametrize("changed", ["samples", "model"])
def test_changed_samples_and_another_model_are_noticed(tiny, tmp_path, monkeypatch, capsys, changed):
    model = shutil.copytree(tiny, tmp_path / "model")
    command, encoder = small(model, tmp_path / "runs"), BertModel.from_pretrained(tiny)
    stopped(monkeypatch, command, 2)
    if changed == "model":
        encoder.config.intermediate_size *= 2
        BertModel(encoder.config).save_pretrained(model)
    else:
        path = data_folder(model) / "train" / "label"
        path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    assert "checkpoint.pt" in refused(capsys, [*command, "--resume"])
