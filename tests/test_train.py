"""Whole runs with a tiny model: what they leave, what they train on, that they repeat, how they refuse and stop."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import time
from functools import cache
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

import runs
import scoring
import train
from data import batches, demo, load, load_tokenizer
from engine import FlatAdamW, limit_vocabulary
from metrics import evaluate
from models import NLUModel, build_model, predictions
from pruning import Smoother, highest

ROOT = Path(__file__).parents[1]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
pytestmark = pytest.mark.usefixtures("one_thread")

# ---- tools, also of test_flags.py, test_resume.py and stress.py


@cache
def data_folder(model):
    """Write a little of demo as a dataset of one's own, beside the files of the tiny model. Returns its folder."""
    folder = Path(model) / "data"
    for split, size in {"train": 96, "dev": 40, "test": 40}.items():
        samples = demo.generate()[split].take(range(size))
        (folder / split).mkdir(parents=True, exist_ok=True)
        (folder / split / "seq.in").write_text("".join(" ".join(words) + "\n" for words in samples.texts))
        (folder / split / "seq.out").write_text("".join(" ".join(tags) + "\n" for tags in samples.tags))
        (folder / split / "label").write_text("".join(label + "\n" for label in samples.labels))
    return folder


def small(model, out, *flags):
    """Return the arguments of a small run: 12 steps an epoch on everything, 6 on half, selections before 2, 3 and 4."""
    pruning = [] if "full" in flags else ["--full-epochs", "1"]
    cycle = [] if {"full", "static"} & set(flags) else ["--cycle", "1"]
    return ["--model", str(model), "--dataset", str(data_folder(model)), "--epochs", "4", *pruning, *cycle,
            "--batch-size", "8", "--lr", "3e-3", "--precision", "fp32", "--device", "cpu", "--out", str(out),
            *map(str, flags)]  # fmt: skip


def only_folder(out):
    """Return the one run folder in `out`."""
    folder, = (config.parent for config in Path(out).glob("*/config.json"))
    return folder


def row_of(folder):
    """Return the row of a finished run."""
    return json.loads((folder / "result.json").read_text())


def log_of(folder):
    """Return the lines of a run's log without seconds, which no two runs share."""
    lines = map(json.loads, (folder / "epochs.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def rounds_of(folder):
    """Return {file name: {array name: array}} of all selections of a run."""
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("rounds/*"))}


def assert_same_run(folder, wanted):
    """Two finished runs have the same files, selections, weights, log and metrics, bit for bit."""
    files = sorted(str(path.relative_to(wanted)) for path in wanted.rglob("*"))
    assert sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) == files
    assert_same_training(folder, wanted)
    ours, theirs = row_of(folder), row_of(wanted)
    assert all(ours[key] == theirs[key] for key in theirs if "seconds" not in key and key not in ("run", "args"))


def assert_same_training(folder, wanted):
    """Two runs have the same selections, weights and log, bit for bit, apart from dev metrics."""
    ours, theirs = rounds_of(folder), rounds_of(wanted)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name][key], theirs[name][key]) for name in theirs for key in theirs[name])
    for path in wanted.glob("model/*.safetensors"):
        assert (folder / "model" / path.name).read_bytes() == path.read_bytes()
    logs = [[{**line, "dev": None} for line in log_of(run)] for run in (folder, wanted)]
    assert logs[0] == logs[1]


def refused(capsys, arguments, status=2):
    """Run a command that cannot work. Returns the one line that it prints on standard error."""
    capsys.readouterr()
    try:
        got = train.main(list(map(str, arguments)))
    except SystemExit as error:
        got = error.code
    line = capsys.readouterr().err
    assert got == status and line.count("\n") == 1 and line.startswith("train.py: "), line
    return line


@pytest.fixture
def run(tiny, tmp_path):
    """run("--keep", "0.3", …) → the folder of such a finished small run."""

    def go(*flags, out="runs", model=tiny):
        assert train.main(small(model, tmp_path / out, *flags)) == 0
        return only_folder(tmp_path / out)

    return go


# ---- what a run leaves


def test_a_run_leaves_what_the_readme_says(run, capsys):
    """Its counts, its selections and the line of Python that it prints are right."""
    folder = run("--keep", 0.3, "--cycle", 2)
    row, rounds, printed = row_of(folder), rounds_of(folder), capsys.readouterr().out
    assert {path.name for path in folder.iterdir()} == {"config.json", "epochs.jsonl", "model", "result.json", "rounds",
                                                        ".lock"}  # fmt: skip
    assert row["epoch_kept"] == [96, 29, 29, 29] and row["samples_seen"] == 96 + 3 * 29 and row["samples_full"] == 384
    assert row["steps"] == 12 + 3 * 4 and row["selections"] == 2 and row["epoch_dev"][-1] == row["dev"]
    assert list(rounds) == ["epoch-002.npz", "epoch-004.npz"]  # written before these epochs
    smooth = Smoother(0.8, 1.0)
    for arrays in rounds.values():
        assert np.array_equal(smooth(arrays["scores"]), arrays["importance"])
        assert np.flatnonzero(arrays["keep"]).tolist() == highest(arrays["importance"], 0.3).tolist()
    model, data = NLUModel.load(folder / "model"), load(row_args(folder)["dataset"], load_tokenizer(folder / "model"))
    metrics = evaluate(data, data.evaluation["test"], *predictions(model, data.evaluation["test"]))
    assert metrics == row["test"]
    exec(re.search(r"from models import NLUModel; .*", printed)[0])


def row_args(folder):
    """Return the flags that config.json holds."""
    return json.loads((folder / "config.json").read_text())["args"]


def test_a_row_carries_no_path_of_the_machine(run):
    """Model and dataset are local folders here."""

    def strings(value):
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return [value] if isinstance(value, str) else list(chain.from_iterable(map(strings, parts)))

    row = row_of(run("--no-model"))
    assert row["args"]["dataset"] == "data" and not any(map(os.path.isabs, strings(row)))


def test_the_phases_add_up_to_the_wall_time(tiny, tmp_path):
    start = time.perf_counter()
    assert train.main(["--model", tiny, "--epochs", "3", "--full-epochs", "1", "--no-model", "--max-train", "1500",
                       "--out", str(tmp_path)]) == 0  # fmt: skip
    wall = time.perf_counter() - start
    seconds = row_of(only_folder(tmp_path))["seconds"]
    phases = sum(seconds[phase] for phase in ("load", "train", "score", "select", "evaluate", "save"))
    assert 0.95 * wall < phases <= 1.001 * wall
    assert seconds["total"] == pytest.approx(seconds["train"] + seconds["score"] + seconds["select"], abs=0.01)


# ---- what a run trains on


def test_training_visits_exactly_the_kept_samples(run, monkeypatch):
    visited = []

    def recorded(*args):
        visited.append(np.sort(np.concatenate(batches(*args))).tolist())
        return batches(*args)

    monkeypatch.setattr(train, "batches", recorded)
    masks = [np.flatnonzero(arrays["keep"]).tolist() for arrays in rounds_of(run("--keep", 0.25)).values()]
    assert visited == [list(range(96)), *masks]


@pytest.mark.parametrize("flags", [["--schedule", "linear"], ["--schedule", "constant"],
                                   ["--selection", "static", "--epochs", 1, "--full-epochs", 3]])  # fmt: skip
def test_the_learning_rate_falls_from_lr_to_0_in_each_training(run, monkeypatch, flags):
    """A static run with τ > E used to train with a negative rate. Now each training has its own schedule."""
    rates, step = [], FlatAdamW.step
    monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: (rates.append(lr), step(self, lr)))
    run(*flags, "--no-model")
    parts = [np.arange(36) / 36, np.arange(6) / 6] if "static" in flags else [
        np.concatenate([(epoch + np.arange(n) / n) / 4 for epoch, n in enumerate([12, 6, 6, 6])])]  # fmt: skip
    wanted = np.concatenate([3e-3 * (1 - part) for part in parts])
    np.testing.assert_allclose(rates, np.full(30, 3e-3) if "constant" in flags else wanted)


def test_full_data_is_never_scored(run, monkeypatch):
    monkeypatch.setattr(scoring, "score", None)
    row = row_of(run("--method", "full", "--no-model"))
    assert row["selections"] == 0 and row["samples_seen"] == row["samples_full"] == 384


def test_random_keeps_the_same_number_and_draws_anew(run):
    masks = [arrays["keep"] for arrays in rounds_of(run("--method", "random", "--keep", 0.25, "--no-model")).values()]
    assert [mask.sum() for mask in masks] == [24] * 3 and len({mask.tobytes() for mask in masks}) == 3


def test_sampling_takes_scores_from_training_steps(run, monkeypatch):
    """No scoring pass is made, and exactly the samples that were trained on get a new score."""
    monkeypatch.setattr(scoring, "score", None)
    first, second, third = rounds_of(run("--sample", "--keep", 0.25, "--no-model")).values()
    assert np.array_equal(first["scores"] != second["scores"], first["keep"])
    assert np.array_equal(second["scores"] != third["scores"], second["keep"])
    assert not np.array_equal(first["keep"], second["keep"]) and {first["keep"].sum(), third["keep"].sum()} == {24}


def test_infobatch_keeps_all_losses_above_the_mean(run):
    folder = run("--method", "infobatch", "--epochs", 8, "--keep", 0.4, "--no-model")
    rounds, sizes = rounds_of(folder), row_of(folder)["epoch_kept"]
    assert list(rounds) == [f"epoch-{epoch:03}.npz" for epoch in range(2, 8)]
    assert sizes[0] == sizes[-1] == 96 and max(sizes[1:-1]) < 96
    for arrays in rounds.values():
        above = arrays["scores"] >= arrays["scores"].mean(dtype=float)
        assert arrays["keep"][above].all() and 0 < arrays["keep"][~above].mean() < 1


def test_the_weights_of_samples_reach_the_gradient(run, monkeypatch):
    """With weights of 0 after the first selection, the gradient is 0 from there on."""
    seen, step = [], FlatAdamW.step

    def watched(optimizer, lr):
        step(optimizer, lr)
        seen.append(optimizer.master.grad.count_nonzero().item())

    monkeypatch.setattr(FlatAdamW, "step", watched)
    monkeypatch.setattr(train, "select", lambda *_: (np.arange(64), np.zeros(96, np.float32)))
    run("--epochs", 2, "--no-model")
    assert min(seen[:12]) > 0 and seen[12:] == [0] * 8


def test_static_selection_trains_from_the_pretrained_weights_again(run, tiny, tokenizer, monkeypatch):
    states, load_state = [], FlatAdamW.load_state_dict

    def watched(optimizer, state):
        states.append(optimizer.master.clone())
        load_state(optimizer, state)
        states.append(optimizer.master.clone())
        assert not optimizer.adam.state[optimizer.master]  # no averages of earlier gradients

    monkeypatch.setattr(FlatAdamW, "load_state_dict", watched)
    folder = run("--selection", "static", "--no-model")
    data = load(str(data_folder(tiny)), tokenizer)
    fresh = build_model(tiny, tokenizer, data, seed=0)
    limit_vocabulary(fresh, data)
    trained, again = states
    assert torch.equal(FlatAdamW(fresh, "fp32", 1.0).master, again) and not torch.equal(trained, again)
    assert list(rounds_of(folder)) == ["epoch-002.npz"] and row_of(folder)["epoch_kept"] == [96] + [48] * 4


# ---- that it repeats


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(run, precision):
    first, second, other = (run("--precision", precision, "--seed", seed, out=out) for seed, out in
                            ((5, "first"), (5, "second"), (6, "other")))  # fmt: skip
    assert_same_run(first, second)
    assert log_of(first) != log_of(other)


def test_dev_and_test_do_not_touch_training(run, tiny, tmp_path):
    """With dev and test exchanged, a run has the same weights and masks, and the other one's metrics."""
    shutil.copytree(tiny, tmp_path / "model")
    first = run(model=tmp_path / "model", out="first")
    data = data_folder(tmp_path / "model")
    for source, target in (("dev", "x"), ("test", "dev"), ("x", "test")):
        (data / source).rename(data / target)
    second = run(model=tmp_path / "model", out="second")
    assert_same_training(first, second)
    assert row_of(first)["dev"] == row_of(second)["test"] != row_of(first)["test"]


TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
import train
sys.exit(max(train.main(command) for command in json.loads(sys.argv[2])))
"""


def test_two_processes_do_what_one_does(run, tiny, tmp_path):
    """Up to rounding, with a model without dropout, whose random numbers differ between processes."""
    shutil.copytree(tiny, tmp_path / "still")
    config = json.loads((tmp_path / "still" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "still" / "config.json").write_text(json.dumps(config))
    (tmp_path / "two.py").write_text(TWO)
    flags = ["--lr", 5e-4, "--epochs", 3]
    commands = [small(tmp_path / "still", tmp_path / f"two-{method}", *flags, "--method", method)
                for method in ("el2n", "forgetting")]  # fmt: skip
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, tmp_path / "two.py", ROOT, json.dumps(commands)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for method in ("el2n", "forgetting"):
        two, one = only_folder(tmp_path / f"two-{method}"), run(*flags, "--method", method, model=tmp_path / "still",
                                                                out=method)  # fmt: skip
        assert row_of(two)["environment"]["processes"] == 2 and row_of(one)["environment"]["processes"] == 1
        assert row_of(two)["steps"] == row_of(one)["steps"]
        for name, arrays in rounds_of(one).items():
            np.testing.assert_allclose(rounds_of(two)[name]["scores"], arrays["scores"], rtol=1e-3, atol=1e-4)
            assert np.array_equal(rounds_of(two)[name]["keep"], arrays["keep"])
        for ours, theirs in zip(log_of(two), log_of(one)):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3)


@gpu
def test_a_gpu_scores_as_a_cpu_does_and_repeats_up_to_rounding(run, tiny, tokenizer, monkeypatch, capsys, tmp_path):
    """A run on a GPU also goes on after a stop, and stops where the loss is NaN."""
    data = load("demo", tokenizer)
    model = build_model(tiny, tokenizer, data, seed=0)
    on_cpu = scoring.score(model, data.train, "el2n").numpy()
    on_gpu = scoring.score(model.to("cuda"), data.train.to("cuda"), "el2n").cpu().numpy()
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3)
    border = np.sort(on_cpu)[len(on_cpu) // 2]
    other = np.setxor1d(highest(on_gpu, 0.5), highest(on_cpu, 0.5))
    assert (np.abs(on_cpu[other] - border) < 2e-3).all()

    whole, end_epoch = run("--device", "cuda", out="whole"), runs.Run.end_epoch
    with monkeypatch.context() as patch:
        patch.setattr(runs.Run, "end_epoch", lambda self, *args: end_epoch(self, *args) or stop(self, 2))
        assert train.main(small(tiny, tmp_path / "stopped", "--device", "cuda")) == 130
    again = run("--device", "cuda", "--resume", out="stopped")
    for ours, theirs in zip(log_of(again), log_of(whole), strict=True):
        assert ours["kept"] == theirs["kept"] and ours["loss"] == pytest.approx(theirs["loss"], rel=0.05)
    assert "loss is nan" in refused(capsys, small(tiny, tmp_path / "nan", "--device", "cuda", "--lr", 1e30))


def stop(run, epoch):
    """Interrupt a run after an epoch."""
    if len(run.log) == epoch:
        raise KeyboardInterrupt


# ---- how it refuses and stops


@pytest.mark.parametrize(("flags", "word"), [
    (["--batch-size", 50], "--batch-size"), (["--model", "/nonexistent/model"], "--model"),
    (["--model", "no-such/model"], "--model"), (["--out", "/proc/nope"], "--out"), (["--out", __file__], "--out"),
    (["--max-length", 4000], "--max-length"),
])  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(tiny, tmp_path, flags, word, capsys):
    """The last one has a sample that is longer than the model takes."""
    shutil.copytree(data_folder(tiny), tmp_path / "data")
    for split, lengthened in (("seq.in", "seven " * 200), ("seq.out", "O " * 200), ("label", "GetWeather")):
        with open(tmp_path / "data" / "train" / split, "a") as file:
            file.write(lengthened.strip() + "\n")
    arguments = small(tiny, tmp_path / "runs", "--dataset", tmp_path / "data", *flags)
    assert word in refused(capsys, arguments)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: …"),
                                   RuntimeError("could not create a primitive"), RuntimeError("std::bad_alloc")])
def test_running_out_of_memory_says_what_to_lower(tiny, tmp_path, monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "fine_tune", fail)
    assert "--batch-size 8" in refused(capsys, small(tiny, tmp_path))


@pytest.mark.parametrize("step", [7, 12, 30])  # within an epoch, at its end, and at the end of all
@pytest.mark.parametrize("what", ["losses", "weights"])
def test_a_run_stops_where_loss_or_weights_are_not_finite(tiny, tmp_path, monkeypatch, capsys, step, what):
    """No result and no model is left."""
    calls, losses, update = iter(range(1, 1000)), train.losses, FlatAdamW.step
    if what == "losses":
        monkeypatch.setattr(train, "losses", lambda *both: losses(*both) * (np.inf if next(calls) == step else 1))
    else:
        monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: update(self, np.nan if next(calls) == step else lr))
    line = refused(capsys, small(tiny, tmp_path))
    assert re.search(rf"loss is (inf|nan) by step {step + (what == 'weights' and step == 7)} ", line)
    assert not list(tmp_path.glob("*/model")) and not list(tmp_path.glob("*/result.json"))


def test_a_run_stops_where_scores_are_not_finite(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Scorer, "__call__", lambda scorer, *_: np.full(96, np.nan))
    assert "96 of 96 scores" in refused(capsys, small(tiny, tmp_path))


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_half_an_environment_of_torchrun_is_refused(tiny, tmp_path, monkeypatch, capsys, variables):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(capsys, small(tiny, tmp_path))


# ---- the house


def test_imports_run_one_way_and_none_is_of_unix_alone():
    """distributed ← data ← engine ← encoders ← models ← scoring ← flags ← train. The others know nothing of models."""
    order = ["distributed", "data", "engine", "encoders", "models", "scoring", "flags", "train"]
    allowed = {name: set(order[:i]) for i, name in enumerate(order)}
    allowed["train"] |= {"pruning", "metrics", "runs"}
    allowed |= {"pruning": set(), "metrics": set(), "runs": {"distributed", "data"}}
    files = {path: path.stem for path in ROOT.glob("*.py")} | dict.fromkeys(ROOT.glob("data/*.py"), "data")
    del files[ROOT / "data" / "__main__.py"]  # a program
    for path, name in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        tops = {module.split(".")[0] for module in imported}
        assert not tops & {"fcntl", "resource", "termios", "pwd", "grp"}, path
        if name in allowed:
            assert tops & set(files.values()) <= allowed[name] | {name}, path
