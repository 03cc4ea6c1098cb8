"""Whole runs of the real program, with a tiny model: what they leave, that they repeat, how they refuse bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import train
from data import demo, load
from models import NLUModel, default_model, load_tokenizer, predict
from pruning import select

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tiny, tmp_path):
    """run("--keep", "0.3", …) → (row, folder) of a small run."""

    def go(*flags, out="runs"):
        standard = ["--model", tiny, "--max-train", "400", "--epochs", "4", "--full-epochs", "1", "--lr", "3e-3",
                    "--batch-size", "8", "--precision", "fp32", "--device", "cpu", "--out", str(tmp_path / out)]
        row = train.run(train.parse([*standard, *map(str, flags)]))
        return row, Path(row["folder"])

    return go


def test_a_run_leaves_what_the_readme_says(run, tiny, tokenizer):
    start = time.perf_counter()
    row, folder = run("--keep", 0.3)
    wall = time.perf_counter() - start
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "epochs.jsonl", "model", "rounds.npz"]
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [400, 120, 120, 120]
    assert [json.loads(line) for line in (folder.parent / "results.jsonl").read_text().splitlines()] == [row]
    assert json.loads((folder / "config.json").read_text())["args"] == row["args"]

    with np.load(folder / "rounds.npz") as rounds:
        assert rounds["epoch"].tolist() == [2, 4]  # scored before these epochs
        assert rounds["scores"].shape == rounds["importance"].shape == rounds["keep"].shape == (2, 400)
        for importance, keep in zip(rounds["importance"], rounds["keep"]):
            assert np.flatnonzero(keep).tolist() == select(importance, 0.3).tolist()

    assert row["examples_seen"] == 400 + 3 * 120 and row["examples_full"] == 1600
    assert row["steps"] == 50 + 3 * 15
    assert set(row["seconds"]) == {"load", "train", "score", "select", "evaluate", "save", "total"}
    seconds = dict(row["seconds"])
    assert seconds.pop("total") == pytest.approx(seconds["train"] + seconds["score"] + seconds["select"], abs=0.01)
    phases = sum(seconds.values())
    assert 0.8 * wall < phases <= wall  # the rest is log lines and git
    assert row["curve"][-1] == row["dev"]

    model = NLUModel.load(folder / "model")
    data = load("demo", load_tokenizer(folder / "model"), max_train=400)
    metrics = train.evaluate(data.test, *predict(model, data.test), data.tags)
    assert metrics == row["test"]


def test_the_same_seed_gives_the_same_run_bit_for_bit(run):
    (one, first), (two, second), (other, _) = run("--seed", 5), run("--seed", 5, out="again"), run("--seed", 6)
    assert one["test"] == two["test"] and one["curve"] == two["curve"]
    with np.load(first / "rounds.npz") as a, np.load(second / "rounds.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    for file in ("model.safetensors", "heads.safetensors"):
        assert (first / "model" / file).read_bytes() == (second / "model" / file).read_bytes()
    assert one["curve"] != other["curve"]


@pytest.mark.parametrize("flags", [("--method", "full"), ("--keep", 1)])
def test_training_on_everything_scores_nothing(run, flags):
    row, folder = run(*flags)
    assert row["scoring_rounds"] == row["pruned_epochs"] == 0
    assert "score" not in row["seconds"] and not (folder / "rounds.npz").exists()
    assert row["examples_seen"] == row["examples_full"] == 1600


def test_random_keeps_exactly_as_many_and_draws_anew(run):
    _, folder = run("--method", "random", "--keep", 0.25, "--cycle", 1)
    with np.load(folder / "rounds.npz") as rounds:
        assert rounds["keep"].sum(1).tolist() == [100, 100, 100]
        assert len({mask.tobytes() for mask in rounds["keep"]}) == 3
        assert np.array_equal(rounds["scores"], rounds["importance"])  # nothing to smooth


def test_dev_and_test_do_not_touch_training(run, monkeypatch):
    """Training sees only train: a run with another dev and test set ends with the same weights and masks."""
    _, first = run("--keep", 0.5)
    generate = demo.generate

    def other(**_):
        splits = generate()
        return {**splits, "dev": splits["test"].take(range(50)), "test": splits["dev"].take(range(50))}

    monkeypatch.setitem(train.DATASETS, "demo", (other, None))
    _, second = run("--keep", 0.5)
    with np.load(first / "rounds.npz") as a, np.load(second / "rounds.npz") as b:
        assert all(np.array_equal(a[name], b[name]) for name in a.files)
    assert (first / "model/heads.safetensors").read_bytes() == (second / "model/heads.safetensors").read_bytes()


def test_runs_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    args = train.parse(["--out", str(tmp_path)])
    assert len({train.new_folder(args) for _ in range(3)}) == 3


def test_a_loss_that_is_no_number_stops_the_run(run):
    with pytest.raises(train.RunError, match=r"the loss is nan in epoch [12]; try a lower --lr"):
        run("--lr", 1e30)


# ---- bad input: one line, exit status 2


BAD_FLAGS = {
    "--dataset nope": "--dataset nope: must be one of demo, snips, atis",
    "--method nope": "invalid choice: 'nope' (choose from",
    "--keep 0": "--keep 0.0: must be above 0 and at most 1",
    "--keep 1.01": "must be above 0 and at most 1",
    "--keep nan": "must be above 0 and at most 1",
    "--keep half": "invalid float value: 'half'",
    "--epochs 0": "--epochs 0: must be at least 1",
    "--full-epochs 0": "--full-epochs 0: must be at least 1",
    "--full-epochs 10": "--full-epochs 10: must be below --epochs 10",
    "--cycle 0": "--cycle 0: must be at least 1",
    "--batch-size 0": "--batch-size 0: must be at least 1",
    "--offset 0.6": "at most 1 - keep = 0.5",
    "--offset -0.1": "--offset -0.1: must be at least 0",
    "--ema 0": "--ema 0.0: must be above 0",
    "--std-weight -1": "--std-weight -1.0: must be a number, 0 or more",
    "--lr 0": "--lr 0.0: must be a number above 0",
    "--lr inf": "must be a number above 0",
    "--clip 0": "--clip 0.0: must be above 0",
    "--seed -1": "--seed -1: must be 0 or more",
    "--max-train 0": "--max-train 0: must be at least 1",
    "--device nope": "--device nope: not to be had here",
    "--precision fp8": "invalid choice: 'fp8'",
    "--no-such-flag": "unrecognized arguments: --no-such-flag",
}


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused_in_one_line(flags, message, capsys):
    with pytest.raises(SystemExit) as caught:
        train.main(flags.split())
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and message in error


@pytest.mark.parametrize(("flags", "message"), [
    (["--max-train", "40"], "that is 20 of 40 train examples, less than one batch of 32"),
    (["--dataset", "snips", "--data-dir", "/nonexistent"], "no folder /nonexistent/snips; get the files with"),
    (["--model", "/nonexistent/model"], "--model /nonexistent/model:"),
    (["--model", "no-such/model"], "--model no-such/model:"),
    (["--out", "/proc/nope"], "--out /proc/nope:"),
    (["--out", str(Path(__file__))], "--out"),
])  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(tiny, flags, message, capsys):
    assert train.main(["--model", tiny, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err


def program(*flags, **options):
    return subprocess.Popen([sys.executable, str(ROOT / "train.py"), *map(str, flags)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}, **options)


def test_the_command_works_from_another_folder_and_says_what_happened(tiny, tmp_path):
    process = program("--model", tiny, "--max-train", 300, "--epochs", 3, "--full-epochs", 1, cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    for wanted in ("epoch  3/3  kept 150/300", "test   intent_acc", "saved  ", "the cost model says", "found  "):
        assert wanted in out
    command = re.search(r"next   (.*)", out)[1].replace("python", sys.executable, 1).replace("…", "wake me up at six")
    again = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True,
                           env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert "('six'," in again.stdout, again.stderr


def test_ctrl_c_ends_with_one_line_and_keeps_finished_epochs(tiny, tmp_path):
    process = program("--model", tiny, "--epochs", 500, "--out", tmp_path)
    while "epoch  1/500" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "train.py: interrupted; its run folder keeps the epochs that were finished"
    log, = tmp_path.glob("demo-*/epochs.jsonl")
    assert json.loads(log.read_text().splitlines()[0])["epoch"] == 1


def test_a_short_run_on_real_data(run, raw):
    row, _ = run("--dataset", "snips", "--data-dir", raw, "--model", default_model(), "--lr", "3e-4")
    assert row["test"]["intent_acc"] > 60  # of seven intents, after 400 utterances
