"""A run that was stopped goes on as if nothing had happened. What cannot go on is refused in one line."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from functools import cache

import pytest
import torch
from test_train import DEVICES, ROOT, assert_same_run, data_folder, log_of, only_folder, refused, row_of, small
from transformers import BertModel

import runs
import train

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def command(tiny, tmp_path):
    """command("--keep", "0.3", …) → the arguments of a small run."""
    return lambda *flags: small(tiny, tmp_path / "runs", *flags)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole("--keep", "0.3", …) → the folder of such a run that nothing happened to."""

    @cache
    def go(*flags):
        out = tmp_path_factory.mktemp("whole")
        assert train.main(small(tiny, out, *flags)) == 0
        return only_folder(out)

    return go


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


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_stopped_run_on_a_gpu_goes_on_up_to_rounding(command, whole, monkeypatch, device):
    folder = stopped(monkeypatch, command("--device", device), 2)
    assert train.main(command("--device", device, "--resume")) == 0
    for ours, theirs in zip(log_of(folder), log_of(whole("--device", device)), strict=True):
        assert ours["kept"] == theirs["kept"] and ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)


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
    folder = only_folder(tmp_path / "runs")
    assert not (folder / "result.json").exists() and not list((tmp_path / "elsewhere").iterdir())
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


@pytest.mark.parametrize("failing", [1, 4, 9, 12])
def test_a_full_disk_leaves_only_whole_files(command, whole, monkeypatch, capsys, failing, tmp_path):
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
    assert train.main(command("--resume")) == 0
    assert_same_run(only_folder(tmp_path / "runs"), whole())


# ---- the same command again


def test_a_finished_run_is_finished(command, capsys):
    """--resume says so. Without it, and where a model is wanted that was not saved, the command is refused."""
    assert train.main(command("--no-model")) == 0
    capsys.readouterr()
    assert train.main(command("--no-model", "--resume")) == 0
    assert "finished" in capsys.readouterr().out
    for flags in (["--no-model"], ["--resume"], []):
        assert "data-el2n-0.5-seed0-" in refused(capsys, command(*flags))


def test_an_unfinished_run_goes_on_with_resume_only(command, monkeypatch, capsys):
    """How often a run is saved does not matter. Another seed is another run. A changed environment is said."""
    folder, environment = stopped(monkeypatch, command(), 2), runs.environment
    assert "--resume" in refused(capsys, command())
    assert train.main(command("--seed", 1)) == 0
    monkeypatch.setattr(runs, "environment", lambda device: environment(device) | {"threads": 64})
    assert train.main(command("--resume", "--save-every", 2, "--no-model")) == 0
    assert (folder / "result.json").exists() and len(list(folder.parent.glob("*/result.json"))) == 2
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


def with_code(_):
    """Return a checkpoint that could run code: it refers to a function."""
    buffer = io.BytesIO()
    torch.save({"log": print}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[: len(raw) // 2], lambda raw: b"text", with_code,
    lambda raw: raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:],
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


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_its_status(command, monkeypatch, capsys, number):
    monkeypatch.setattr(train, "train", lambda *_: train.terminated(number, None))
    assert "--resume" in refused(capsys, command(), 128 + number)
