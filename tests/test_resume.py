"""A run that is stopped goes on where it was, as if nothing had happened; what cannot be gone on with is refused.

`tests/faults.py` does the same with `kill -9`; here, an exception that nobody catches ends the run.
"""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import ROOT, assert_same_training, read_rounds
from transformers import BertConfig, BertModel

import report
import train
from data import demo
from pruning import Smoother

pytestmark = pytest.mark.usefixtures("one_thread")


class Killed(BaseException):
    """Nobody catches this."""


def small(model, out, *more):
    """The arguments of a small run."""
    return ["--model", model, "--max-train", "160", "--epochs", "5", "--full-epochs", "1", "--cycle", "1", "--lr",
            "3e-3", "--batch-size", "8", "--precision", "fp32", "--device", "cpu", *more, "--out", str(out)]


@pytest.fixture
def command(tiny, tmp_path):
    """command("--keep", "0.3", …) → the arguments of a small run."""
    return lambda *more, out="runs": small(tiny, tmp_path / out, *more)


@pytest.fixture(scope="module")
def splits():
    return {split: examples.take(range(160 if split == "train" else 80)) for split, examples in demo.generate().items()}


@pytest.fixture(autouse=True)
def little_data(splits, monkeypatch):
    """Half of a small run would be spent on making the demo data and on its dev and test examples."""
    monkeypatch.setitem(train.DATASETS, "demo", train.DATASETS["demo"]._replace(reader=lambda: dict(splits)))


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
    """whole("--keep", "0.3", …) → the row of such a run, to which nothing happened."""
    return cache(lambda *more: run(small(tiny, tmp_path_factory.mktemp("whole"), *more)))


def run(arguments):
    return train.run(train.parse(arguments))


def die_after(monkeypatch, function, calls):
    """The run ends when this function of report has returned so often."""
    real, left = getattr(report, function), iter(range(calls, 0, -1))

    def fatal(*args):
        result = real(*args)
        if next(left) == 1:
            raise Killed
        return result

    monkeypatch.setattr(report, function, fatal)


def killed(monkeypatch, arguments, function="save_checkpoint", calls=2):
    """Start a run that ends there. Returns its folder."""
    with monkeypatch.context() as patch:
        die_after(patch, function, calls)
        with pytest.raises(Killed):
            run(arguments)
    folder, = (config.parent for config in Path(arguments[arguments.index("--out") + 1]).glob("*/config.json"))
    return folder


def log_of(folder):
    """epochs.jsonl without the seconds, which no two runs share."""
    lines = map(json.loads, (folder / "epochs.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


@pytest.mark.parametrize(("flags", "epoch"), [
    *product([("--precision", "fp32"), ("--precision", "bf16"), ("--save-every", "3"), ("--method", "random"),
              ("--method", "full"), ("--schedule", "constant", "--cycle", "3")], [1, 4]),
    # In a checkpoint for these alone: the weights of examples, scores of training steps, the pretrained weights.
    *product([("--method", "infobatch", "--cycle", "2"), ("--method", "forgetting", "--cycle", "2"),
              ("--draw",), ("--selection", "static")], [2, 3, 4]),
])  # fmt: skip
def test_a_killed_run_ends_as_if_it_had_not_been(command, whole, monkeypatch, flags, epoch):
    """Between an epoch's log line and its checkpoint, where the log is ahead of what can be gone on with."""
    wanted = whole(*flags)
    folder = killed(monkeypatch, command(*flags), "log_epoch", epoch)
    assert len(log_of(folder)) == epoch
    row = run(["--resume", str(folder)])
    assert row["folder"] == str(folder)
    assert_same_training(Path(wanted["folder"]), folder)
    assert log_of(folder) == log_of(Path(wanted["folder"]))
    for name in ("test", "dev", "curve", "steps", "examples_seen", "tokens_seen", "pruned_epochs"):
        assert row[name] == wanted[name]
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in Path(wanted["folder"]).iterdir()) and "checkpoint.pt" not in names
    assert report.read_rows([folder.parent / "results.jsonl"]) == [row]


@pytest.mark.parametrize(("function", "calls"), [
    ("new_folder", 1), ("load_checkpoint", 1), ("save_round", 1), ("save_checkpoint", 1), ("save_checkpoint", 5),
    ("recorded", 1), ("append_line", 6), ("publish", 12), ("remove_checkpoints", 1),
])  # fmt: skip
def test_wherever_it_is_killed_there_is_one_row_and_the_model(command, whole, monkeypatch, capsys, function, calls):
    """append_line: five epochs, then the row. publish: config, log, four rounds, five checkpoints, then the model."""
    folder = killed(monkeypatch, command(), function, calls)
    had_row = (folder.parent / "results.jsonl").read_text()
    row = run(command("--resume", "auto"))
    assert ("is finished" in capsys.readouterr().out) == (function in ("remove_checkpoints", "publish"))
    assert_same_training(Path(whole()["folder"]), folder)
    assert report.read_rows([folder.parent / "results.jsonl"]) == [row]
    assert not had_row or had_row == (folder.parent / "results.jsonl").read_text()
    assert {path.name for path in folder.iterdir()} == {"config.json", "epochs.jsonl", "model", "rounds"}


def test_the_clock_counts_both_parts_and_not_what_was_lost(command, monkeypatch):
    folder = killed(monkeypatch, command(), "log_epoch", 3)
    spent = report.load_checkpoint(folder, {})["seconds"]
    ticks = iter(range(10**6))
    monkeypatch.setattr(report.Clock, "now", lambda _: float(next(ticks)))  # a second for each phase of an epoch
    row = run(["--resume", str(folder)])
    for phase in ("train", "score", "select"):
        assert row["seconds"][phase] == pytest.approx(spent[phase] + 3, abs=1e-3)  # in epochs 3, 4 and 5
    total = sum(row["seconds"][phase] for phase in ("train", "score", "select"))
    assert row["seconds"]["total"] == pytest.approx(total, abs=2e-3)


def test_at_most_two_checkpoints_are_on_disk(command, monkeypatch):
    seen, replace = [], os.replace

    def look(source, target):
        seen.append(sorted(path.name for path in Path(target).parent.glob("checkpoint*")))
        replace(source, target)

    monkeypatch.setattr(os, "replace", look)
    run(command("--no-model"))
    assert max(seen, key=len) == ["checkpoint.pt", "checkpoint.pt.part"]


def test_save_every_leaves_out_checkpoints_but_the_last(command, monkeypatch):
    epochs = []
    monkeypatch.setattr(report, "save_checkpoint", lambda folder, state: epochs.append(len(state["log"])))
    run(command("--save-every", "2"))
    assert epochs == [2, 4, 5]


def test_auto_knows_the_runs_from_before_a_flag(command, monkeypatch, capsys):
    """A new flag is no reason to do everything again, nor to give up a run that has begun."""
    def without(path):
        facts = json.loads(path.read_text())
        assert facts["args"].pop("draw") is False
        path.write_text(json.dumps(facts) + "\n")

    with monkeypatch.context() as patch:
        identity = report.identity
        patch.setattr(report, "identity", lambda *of: {k: v for k, v in identity(*of).items() if k != "draw"})
        folder = killed(monkeypatch, command())
    without(folder / "config.json")
    assert run(command("--resume", "auto"))["folder"] == str(folder)
    assert "resumed after epoch 2 of 5" in capsys.readouterr().out
    without(folder.parent / "results.jsonl")
    assert run(command("--resume", "auto"))["folder"] == str(folder)
    assert "is finished" in capsys.readouterr().out


def test_auto_goes_on_with_the_same_flags_only(command, monkeypatch, capsys):
    folder = killed(monkeypatch, command("--seed", "3"))
    other = run(command("--seed", "4", "--resume", "auto"))
    said = capsys.readouterr().out
    assert "no run with these flags" in said and "resumed" not in said and other["folder"] != str(folder)
    assert run(command("--seed", "3", "--resume", "auto"))["folder"] == str(folder)
    assert "resumed after epoch 2 of 5" in capsys.readouterr().out


def test_a_finished_run_is_not_done_again(command, capsys):
    row, auto = run(command()), command("--resume", "auto")
    capsys.readouterr()
    assert run(auto) == row and run(["--resume", row["folder"]]) == row
    assert capsys.readouterr().out.splitlines() == [f"{row['folder']}/ is finished: nothing is left to do"] * 2
    assert len((Path(row["folder"]).parent / "results.jsonl").read_text().splitlines()) == 1


def test_flags_that_do_not_matter_are_no_reason_to_do_a_run_again(command):
    """Pruning's are nothing to full data, and how often a run was saved is nothing to any."""
    row = run(command("--method", "full"))
    for further in (["--cycle", "3"], ["--save-every", "2"]):
        assert run(command("--method", "full", *further, "--resume", "auto")) == row


def test_a_run_that_left_a_model_serves_where_none_is_wanted_but_not_the_other_way_round(command, monkeypatch, capsys):
    with_model, auto = run(command()), ["--resume", "auto"]
    assert run(command("--no-model", *auto)) == with_model
    shutil.rmtree(Path(with_model["folder"]) / "model")
    assert run(command("--no-model", *auto)) == with_model  # its row is all that is wanted

    without = run(command("--no-model", out="others"))
    again = run(command(*auto, out="others"))
    assert again["folder"] != without["folder"] and (Path(again["folder"]) / "model").is_dir()

    folder = killed(monkeypatch, command(out="killed"))
    other = run(command("--no-model", *auto, out="killed"))
    assert other["folder"] != str(folder)  # which goes on as it began
    assert run(command(*auto, out="killed"))["folder"] == str(folder) and (folder / "model").is_dir()


def refused(capsys, arguments):
    """The one line that a run is refused with."""
    capsys.readouterr()
    try:
        status = train.main(arguments)
    except SystemExit as error:
        status = error.code
    line = capsys.readouterr().err
    assert status == 2 and line.count("\n") == 1, line
    return line


def test_a_live_run_is_left_alone(command, monkeypatch, capsys):
    folder = killed(monkeypatch, command())
    with open(folder / "config.json") as config:
        fcntl.flock(config, fcntl.LOCK_EX)  # as the run would
        for arguments in (["--resume", str(folder)], command("--resume", "auto")):
            assert f"{folder}: in use by a run that is going on" in refused(capsys, arguments)
    run(["--resume", str(folder)])


def test_a_run_locks_its_folder_until_it_ends(command, monkeypatch, capsys):
    lines = []
    log_epoch = report.log_epoch

    def second_run(folder, *args):
        log_epoch(folder, *args)
        with monkeypatch.context() as patch:
            patch.setattr(report, "log_epoch", log_epoch)
            lines.append(refused(capsys, ["--resume", str(folder)]))

    monkeypatch.setattr(report, "log_epoch", second_run)
    run(command())
    assert len(lines) == 5 and all("in use by a run" in line for line in lines)


@pytest.mark.parametrize("damage", [
    lambda raw: raw[:-1], lambda raw: b"", lambda raw: raw[:5000] + b"x" + raw[5001:], lambda raw: raw + b"x",
])  # fmt: skip
def test_a_damaged_checkpoint_is_refused_and_left(command, monkeypatch, capsys, damage):
    path = killed(monkeypatch, command()) / "checkpoint.pt"
    damaged = damage(path.read_bytes())
    path.write_bytes(damaged)
    assert f"{path}: damaged" in refused(capsys, ["--resume", str(path.parent)])
    assert path.read_bytes() == damaged


def test_a_checkpoint_cannot_run_code(tmp_path):
    class Evil:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    report.save_checkpoint(tmp_path, {"identity": Evil()})  # with the right checksum
    with pytest.raises(report.RunError, match=r"checkpoint.pt: damaged, or no checkpoint of this program"):
        report.load_checkpoint(tmp_path, {})
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("flags", "named"), [
    (["--seed", "9"], "seed"), (["--keep", "0.4"], "keep"), (["--max-train", "159"], "max_train, examples"),
    (["--method", "full"], "method"),
])  # fmt: skip
def test_a_foreign_checkpoint_is_refused(command, monkeypatch, capsys, flags, named):
    folder = killed(monkeypatch, command())
    other = killed(monkeypatch, command(*flags, out="other"))
    own = (folder / "checkpoint.pt").read_bytes()
    shutil.copy(other / "checkpoint.pt", folder)
    (other / "checkpoint.pt").write_bytes(own)
    for mixed in (folder, other):
        assert f"checkpoint.pt: of another run, with other {named}" in refused(capsys, ["--resume", str(mixed)])


def test_changed_data_and_another_model_are_noticed(command, monkeypatch, capsys, tiny, tmp_path, splits):
    shutil.copytree(tiny, tmp_path / "model")
    folder = killed(monkeypatch, command("--model", str(tmp_path / "model")))
    with monkeypatch.context() as patch:
        train_split = replace(splits["train"], labels=["PlayMusic"] * 20 + splits["train"].labels[20:])
        other = train.DATASETS["demo"]._replace(reader=lambda: {**splits, "train": train_split})
        patch.setitem(train.DATASETS, "demo", other)
        assert "with other examples;" in refused(capsys, ["--resume", str(folder)])
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    BertModel(BertConfig(**{**config, "intermediate_size": 64})).save_pretrained(tmp_path / "model")
    assert "with other weights;" in refused(capsys, ["--resume", str(folder)])


@pytest.mark.parametrize(("content", "message"), [
    (None, "no run's folder, its config.json cannot be read"), ("{", "no run's folder"), ("[]", "no run's folder"),
    ('{"args": {"lr": "x"}, "environment": {}}', "config.json: error: argument --lr: invalid float value: 'x'"),
    ('{"args": {"keep": 7}, "environment": {}}', "config.json: error: --keep 7.0: must be above 0"),
    ('{"args": {"nope": 7}, "environment": {}}', "config.json: error: unrecognized arguments: --nope=7"),
])  # fmt: skip
def test_a_folder_that_is_no_runs_is_refused(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    assert message in refused(capsys, ["--resume", str(tmp_path)])


def test_a_run_is_found_from_within_its_folder(command, whole, monkeypatch):
    folder = killed(monkeypatch, command())
    monkeypatch.chdir(folder)
    assert run(["--resume", "."])["folder"] == str(folder)
    assert_same_training(Path(whole()["folder"]), folder)


def test_resuming_takes_no_other_flags(capsys):
    assert "leave all others out" in refused(capsys, ["--resume", "runs/x", "--lr", "1"])


@pytest.mark.parametrize("flags", [[], ["--no-model"]])
def test_a_run_whose_row_is_gone_is_not_made_again(command, capsys, flags):
    row = run(command(*flags))
    (Path(row["folder"]).parent / "results.jsonl").unlink()
    assert "has run, but has no row in" in refused(capsys, ["--resume", row["folder"]])


def test_auto_does_nothing_where_one_of_the_runs_is_finished(command, monkeypatch, capsys):
    """Though another with these flags is not; and how often it was to be saved does not matter."""
    killed(monkeypatch, command())
    row = run(command())
    capsys.readouterr()
    assert run(command("--resume", "auto", "--save-every", "3")) == row
    assert "is finished: nothing is left to do" in capsys.readouterr().out


def test_auto_says_which_folders_it_cannot_read(command, monkeypatch, capsys):
    folder = killed(monkeypatch, command())
    (folder / "config.json").write_text("{")
    run(command("--resume", "auto"))
    assert "config.json cannot be read" in capsys.readouterr().err


def test_a_local_model_is_found_from_another_folder(command, whole, tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(Path(tiny).parent)
    folder = killed(monkeypatch, command("--model", Path(tiny).name))
    monkeypatch.chdir(tmp_path)
    run(["--resume", str(folder)])
    assert_same_training(Path(whole()["folder"]), folder)


def test_one_checkpoint_that_is_there_needs_no_room(command, monkeypatch, capsys):
    folder = killed(monkeypatch, command())
    size = (folder / "checkpoint.pt").stat().st_size
    for free, enough in ((1.5 * size, True), (0.5 * size, False)):
        monkeypatch.setattr(report.shutil, "disk_usage", lambda _, free=free: type("Usage", (), {"free": free}))
        if enough:
            report.check_space(folder, [torch.zeros(size // 12)])
        else:
            with pytest.raises(OSError, match="are free on this disk"):
                report.check_space(folder, [torch.zeros(size // 12)])


def test_another_environment_is_said(command, monkeypatch, capsys):
    folder = killed(monkeypatch, command())
    facts = json.loads((folder / "config.json").read_text())
    facts["environment"]["threads"] = 64
    (folder / "config.json").write_text(json.dumps(facts))
    capsys.readouterr()
    run(["--resume", str(folder)])
    assert f"warning: {folder}: began in another environment (threads)" in capsys.readouterr().err


# ---- limits


def test_a_loss_that_is_no_number_keeps_the_checkpoint_and_says_its_step(command, whole, monkeypatch, capsys):
    losses, calls = train.losses, iter(range(1, 1000))
    with monkeypatch.context() as patch:
        patch.setattr(train, "losses", lambda *both: losses(*both) * (np.inf if next(calls) == 37 else 1))
        line = refused(capsys, command())
    folder, = (config.parent for config in Path(command()[-1]).glob("*/config.json"))
    assert "the loss is inf at step 37 (epoch 3)" in line and "--resume" not in line  # it would end in the same
    run(["--resume", str(folder)])
    assert_same_training(Path(whole()["folder"]), folder)


@pytest.mark.parametrize("step", [20, 60])  # the last of the first epoch, and of all
def test_a_blow_up_in_an_epochs_last_step_is_noticed(command, monkeypatch, capsys, step):
    real, calls = train.FlatAdamW.step, iter(range(1, 1000))
    monkeypatch.setattr(train.FlatAdamW, "step", lambda self, lr: real(self, np.nan if next(calls) == step else lr))
    assert f"the loss is nan at step {step} (epoch {1 if step == 20 else 5})" in refused(capsys, command())
    assert not list(Path(command()[-1]).glob("*/model")) and not (Path(command()[-1]) / "results.jsonl").read_text()


def test_on_a_device_the_first_bad_step_is_known_though_seldom_looked_at(command, monkeypatch):
    """Any device not called "cpu" is looked at when the bar is redrawn, here never, and at the end of an epoch."""
    losses, calls = train.losses, iter(range(1, 1000))
    monkeypatch.setattr(train, "losses", lambda *both: losses(*both) * (np.nan if next(calls) == 25 else 1))
    args = train.parse(command())
    args.device = "cpu:0"
    with pytest.raises(report.RunError, match=r"the loss is nan at step 25 \(epoch 2\)"):
        train.run(args)
    assert next(calls) > 30  # the epoch went on


def test_too_small_a_disk_is_said_before_training(command, monkeypatch, capsys):
    usage = shutil.disk_usage("/")._replace(free=10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert re.search(r"1 MB are free on this disk, and checkpoints take \d MB", refused(capsys, command()))
    assert not Path(command()[-1]).exists()


def test_a_disk_that_becomes_full_leaves_the_last_checkpoint(command, whole, monkeypatch, capsys):
    real, calls = os.fsync, iter(range(1, 1000))

    def full(descriptor):
        if next(calls) > 12:
            raise OSError(28, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        line = refused(capsys, command())
    folder, = (config.parent for config in Path(command()[-1]).glob("*/config.json"))
    assert "No space left on device; it is left as it was; to go on: " in line
    assert not list(folder.rglob("*.part"))
    run(["--resume", str(folder)])
    assert_same_training(Path(whole()["folder"]), folder)


@pytest.mark.parametrize(("variables", "message"), [
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but"), ({"WORLD_SIZE": "x"}, "WORLD_SIZE is x, but"),
    ({"WORLD_SIZE": "2", "RANK": "0"}, "environment variable MASTER_ADDR expected"),
])  # fmt: skip
def test_half_an_environment_of_torchrun_is_refused(monkeypatch, capsys, variables, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused(capsys, [])
    assert message in line and "start several processes with torchrun" in line


# ---- trust


def test_the_hash_seed_and_the_working_folder_change_nothing(command, tmp_path):
    runs = {}
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        environment = {**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"}
        program = [sys.executable, str(ROOT / "train.py"), *command(out=f"runs-{seed}")]
        runs[seed] = subprocess.Popen(program, env=environment, cwd=tmp_path / seed, stdout=subprocess.PIPE,
                                      stderr=subprocess.PIPE, text=True)
    folders = []
    for seed, process in runs.items():
        errors = process.communicate(timeout=100)[1]
        assert process.returncode == 0, errors
        folders += [config.parent for config in (tmp_path / f"runs-{seed}").glob("*/config.json")]
        assert not list((tmp_path / seed).iterdir())
    assert_same_training(*folders)
    assert log_of(folders[0]) == log_of(folders[1])


def test_the_number_of_threads_changes_nothing_but_rounding(command):
    """The scores of the first round, after 20 steps of Adam, agree within 1e-3 of themselves."""
    scores = []
    for number in (1, 2):
        torch.set_num_threads(number)
        row = run(command("--epochs", "2", "--no-model", out=f"runs-{number}"))
        scores.append(read_rounds(Path(row["folder"]))["epoch-002.npz"]["scores"])
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3)


def test_the_phases_add_up_to_the_wall_time(tiny, tmp_path, monkeypatch):
    """Within 2 %, checkpoints included, of a run on all of demo."""
    monkeypatch.undo()
    arguments = ["--model", tiny, "--epochs", "3", "--full-epochs", "1", "--no-model", "--out", str(tmp_path)]
    start = time.perf_counter()
    row = run(arguments)
    wall = time.perf_counter() - start
    phases = sum(seconds for phase, seconds in row["seconds"].items() if phase != "total")
    assert 0.98 * wall < phases <= 1.001 * wall


def test_smoothing_goes_on_from_its_attributes(rng):
    """vars() holds all of a Smoother's state: what a checkpoint keeps."""
    first, second = Smoother(0.8, 1.0), Smoother(0.8, 1.0)
    rounds = rng.random((4, 9)).astype(np.float32)
    for scores in rounds[:3]:
        first(scores)
    vars(second).update(vars(first))
    assert np.array_equal(second(rounds[3]), first(rounds[3]))


def test_sigterm_is_taken_for_an_interruption():
    with pytest.raises(KeyboardInterrupt) as caught:
        train.terminated(signal.SIGTERM, None)
    assert caught.value.args == (15,)
