"""Whole runs with a tiny model: what they leave, what they train on, that they repeat, how they refuse and stop."""

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import scoring
import train
from data import batches, demo, load, load_tokenizer
from engine import FlatAdamW, limit_vocabulary
from metrics import evaluate
from models import NLUModel, build_model, predictions
from pruning import Smoother, highest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("one_thread")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]

# ---- tools, also of test_flags.py, test_resume.py and stress.py


@cache
def data_folder(model):
    """Write a little of demo as a dataset of one's own, beside the files of the tiny model. Returns its folder."""
    folder = Path(model) / "data"
    for split, size in {"train": 64, "dev": 24, "test": 24}.items():
        samples = demo.generate()[split].take(range(size))
        rows = {"seq.in": map(" ".join, samples.texts), "seq.out": map(" ".join, samples.tags), "label": samples.labels}
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name, lines in rows.items():
            (folder / split / name).write_text("".join(line + "\n" for line in lines))
    return folder


def small(model, out, *flags):
    """Return the arguments of a small run: 8 steps an epoch on everything, 4 on half, selections before 2, 3 and 4."""
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


def assert_same_run(folder, wanted, metrics=True):
    """Two finished runs have the same files, selections, weights, log and metrics, bit for bit."""
    others, files = ({path.relative_to(run) for path in run.rglob("*")} for run in (folder, wanted))
    assert others == files, f"files differ: {others ^ files}"
    for name in files:
        if name.suffix == ".safetensors":
            assert (folder / name).read_bytes() == (wanted / name).read_bytes(), name
        if name.suffix == ".npz":
            assert all(map(np.array_equal, np.load(folder / name).values(), np.load(wanted / name).values())), name
    ours, theirs = ([line | {"dev": metrics and line["dev"]} for line in log_of(run)] for run in (folder, wanted))
    assert ours == theirs, "logs differ"
    same = ("test", "dev", "steps", "samples_seen", "tokens_seen", "selections")[0 if metrics else 2 :]
    assert all(row_of(folder)[key] == row_of(wanted)[key] for key in same), "rows differ"


def free_port():
    """Return the number of a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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
    """Its counts, its selections and the line of Python that it prints are right. Its row carries no path."""
    folder = run("--keep", 0.3, "--cycle", 2)
    row, rounds, smooth = row_of(folder), rounds_of(folder), Smoother(0.8, 1.0)
    names = {"config.json", "epochs.jsonl", "model", "result.json", "rounds"}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names
    assert row["epoch_kept"] == [64, 19, 19, 19] and row["samples_seen"] == 64 + 3 * 19 and row["samples_full"] == 256
    assert row["steps"] == 8 + 3 * 3 and row["selections"] == 2 and row["epoch_dev"][-1] == row["dev"]
    assert list(rounds) == ["epoch-002.npz", "epoch-004.npz"]  # written before these epochs
    for arrays in rounds.values():
        assert np.array_equal(smooth(arrays["scores"]), arrays["importance"])
        assert np.flatnonzero(arrays["keep"]).tolist() == highest(arrays["importance"], 0.3).tolist()
    dataset = json.loads((folder / "config.json").read_text())["args"]["dataset"]
    model, data = NLUModel.load(folder / "model"), load(dataset, load_tokenizer(folder / "model"))
    assert evaluate(data, data.evaluation["test"], *predictions(model, data.evaluation["test"])) == row["test"]
    exec(re.search(r"from models import NLUModel; .*", capsys.readouterr().out)[0])
    assert re.fullmatch("data-[0-9a-f]{6}", row["args"]["dataset"]) and not re.search(r'"(/|[A-Z]:)', json.dumps(row))


def test_the_phases_add_up_to_the_wall_time(tiny, tmp_path):
    start = time.perf_counter()
    assert train.main(["--model", tiny, "--epochs", "3", "--full-epochs", "1", "--no-model", "--max-train", "1500",
                       "--out", str(tmp_path)]) == 0  # fmt: skip
    wall, seconds = time.perf_counter() - start, row_of(only_folder(tmp_path))["seconds"]
    total = seconds.pop("total")
    assert 0.95 * wall < sum(seconds.values()) <= 1.001 * wall
    assert total == pytest.approx(seconds["train"] + seconds["score"] + seconds["select"], abs=0.01)


# ---- what a run trains on


def test_training_visits_exactly_the_kept_samples(run, monkeypatch):
    visited = []

    def recorded(*args):
        visited.append(np.sort(np.concatenate(batches(*args))).tolist())
        return batches(*args)

    monkeypatch.setattr(train, "batches", recorded)
    masks = [np.flatnonzero(arrays["keep"]).tolist() for arrays in rounds_of(run("--keep", 0.25)).values()]
    assert visited == [list(range(64)), *masks]


@pytest.mark.parametrize("flags", [[], ["--schedule", "constant"],
                                   ["--selection", "static", "--epochs", 1, "--full-epochs", 3]])  # fmt: skip
def test_the_learning_rate_falls_from_lr_to_0_in_each_training(run, monkeypatch, flags):
    """A static run with τ > E used to train with a negative rate. Now each of its trainings has its own schedule."""
    rates, step = [], FlatAdamW.step
    monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: (rates.append(lr), step(self, lr)))
    run(*flags, "--no-model")
    done = np.concatenate([(epoch + np.arange(n) / n) / 4 for epoch, n in enumerate([8, 4, 4, 4])])
    if "static" in flags:
        done = np.r_[np.arange(24) / 24, np.arange(4) / 4]
    np.testing.assert_allclose(rates, [3e-3] * 20 if "constant" in flags else 3e-3 * (1 - done))


@pytest.mark.parametrize("flags", [["full"], ["random"], ["forgetting"], ["infobatch"], ["el2n", "--sample"]])
def test_what_needs_no_scoring_pass_makes_none(run, monkeypatch, flags):
    """With --sample, exactly the samples that were trained on get a new score."""
    monkeypatch.setattr(scoring, "score", None)
    folder = run("--method", *flags, "--no-model")
    rounds = list(rounds_of(folder).values())
    kept = [arrays["keep"].sum() for arrays in rounds]
    assert row_of(folder)["epoch_kept"] == [64, *kept, *[64] * (3 - len(kept))]
    assert len({arrays["keep"].tobytes() for arrays in rounds}) == len(rounds)
    if "--sample" in flags:
        assert all(np.array_equal(a["scores"] != b["scores"], a["keep"]) for a, b in pairwise(rounds))


def test_the_weights_of_samples_reach_the_gradient(run, monkeypatch):
    """With weights of 0 after the first selection, the gradient is 0 from there on."""
    seen, step = [], FlatAdamW.step
    monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: (step(self, lr), seen.append(bool(self.master.grad.any()))))
    monkeypatch.setattr(train, "select", lambda *_: (np.arange(32), np.zeros(64, np.float32)))
    run("--epochs", 2, "--no-model")
    assert seen == [True] * 8 + [False] * 4


def test_static_selection_trains_from_the_pretrained_weights_again(run, tiny, tokenizer, monkeypatch):
    states, load_state = [], FlatAdamW.load_state_dict

    def watched(optimizer, state):
        load_state(optimizer, state)
        states.append(optimizer.master.clone())
        assert not optimizer.adam.state[optimizer.master]  # no averages of earlier gradients

    monkeypatch.setattr(FlatAdamW, "load_state_dict", watched)
    folder = run("--selection", "static", "--no-model")
    data = load(str(data_folder(tiny)), tokenizer)
    fresh = build_model(tiny, tokenizer, data, seed=0)
    limit_vocabulary(fresh, data)
    assert len(states) == 1 and torch.equal(FlatAdamW(fresh, "fp32", 1.0).master, states[0])
    assert list(rounds_of(folder)) == ["epoch-002.npz"] and row_of(folder)["epoch_kept"] == [64] + [32] * 4


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
    first, data = run(model=tmp_path / "model", out="first"), data_folder(tmp_path / "model")
    for source, target in (("dev", "x"), ("test", "dev"), ("x", "test")):
        (data / source).rename(data / target)
    second = run(model=tmp_path / "model", out="second")
    assert_same_run(first, second, metrics=False)
    assert row_of(first)["dev"] == row_of(second)["test"] != row_of(first)["test"]


TWO = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import train
for port, command in json.loads(sys.argv[2]):  # a process can join torchrun's own store only once
    os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    assert train.main(command) == 0
"""


def test_two_processes_do_what_one_does(run, tiny, tmp_path):
    """Up to rounding, with a model without dropout, whose random numbers differ between processes."""
    still, methods = shutil.copytree(tiny, tmp_path / "still"), ("el2n", "forgetting")
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    flags = {method: ["--lr", 5e-4, "--epochs", 3, "--method", method] for method in methods}
    commands = [(str(free_port()), small(still, tmp_path / f"two-{method}", *flags[method])) for method in methods]
    (tmp_path / "two.py").write_text(TWO)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           tmp_path / "two.py", ROOT, json.dumps(commands)], capture_output=True, text=True,
                          timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for method in methods:
        two, one = only_folder(tmp_path / f"two-{method}"), run(*flags[method], model=still, out=method)
        assert [row_of(folder)["environment"]["processes"] for folder in (two, one)] == [2, 1]
        for name, arrays in rounds_of(one).items():
            np.testing.assert_allclose(rounds_of(two)[name]["scores"], arrays["scores"], rtol=1e-3, atol=1e-4)
            assert np.array_equal(rounds_of(two)[name]["keep"], arrays["keep"])
        np.testing.assert_allclose(*([line["loss"] for line in log_of(folder)] for folder in (two, one)), rtol=1e-3)


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_gpu_scores_as_a_cpu_does(model, demo_data, device):
    """EL2N within 1e-3, and the same samples are kept, but for ties."""
    on_cpu = scoring.score(model, demo_data.train, "el2n").numpy()
    on_gpu = scoring.score(model.to(device), demo_data.train.to(device), "el2n").cpu().numpy()
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3)
    differing = on_cpu[np.setxor1d(highest(on_gpu, 0.5), highest(on_cpu, 0.5))]
    np.testing.assert_allclose(differing, np.full(len(differing), np.median(on_cpu)), rtol=0, atol=2e-3)


# ---- how it refuses and stops


@pytest.mark.parametrize(("flags", "word"), [
    (["--batch-size", 50], "--batch-size"), (["--keep", 0.1], "--keep"), (["--class-floor", 9], "--class-floor"),
    (["--model", "/no/model"], "--model"), (["--model", "no-such/model"], "--model"), (["--out", "/proc/x"], "--out"),
    (["--out", __file__], "--out"), (["--dataset", ROOT / "tests"], "train"),
])  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(tiny, tmp_path, flags, word, capsys):
    assert word in refused(capsys, small(tiny, tmp_path, *flags))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: …"),
                                   RuntimeError("could not create a primitive"), RuntimeError("std::bad_alloc")])
def test_running_out_of_memory_says_what_to_lower(tiny, tmp_path, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "fine_tune", lambda *_: (_ for _ in ()).throw(error))
    assert "--batch-size 8" in refused(capsys, small(tiny, tmp_path))


@pytest.mark.parametrize("step", [5, 8, 20])  # within an epoch, at its end, and at the end of all
@pytest.mark.parametrize("what", ["losses", "weights"])
@pytest.mark.parametrize("device", DEVICES)
def test_a_run_stops_where_loss_or_weights_are_not_finite(tiny, tmp_path, monkeypatch, capsys, step, what, device):
    """No result and no model is left."""
    calls, losses, update = iter(range(1, 1000)), train.losses, FlatAdamW.step
    if what == "losses":
        monkeypatch.setattr(train, "losses", lambda *both: losses(*both) * (np.inf if next(calls) == step else 1))
    else:
        monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: update(self, np.nan if next(calls) == step else lr))
    line = refused(capsys, small(tiny, tmp_path, "--device", device))
    assert re.search(rf"loss is (inf|nan) .*\(epoch {1 if step < 9 else 4}\)", line)
    assert not list(tmp_path.glob("*/model")) and not list(tmp_path.glob("*/result.json"))


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_half_an_environment_of_torchrun_is_refused(tiny, tmp_path, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(capsys, small(tiny, tmp_path))


# ---- the house


def test_imports_run_one_way_and_none_is_of_unix_alone():
    """distributed ← data ← engine ← encoders ← models ← scoring ← flags ← train. The others know nothing of models."""
    order = ["distributed", "data", "engine", "encoders", "models", "scoring", "flags", "train"]
    allowed = {name: set(order[: i + 1]) for i, name in enumerate(order)}
    allowed["train"] |= {"pruning", "metrics", "runs"}
    allowed |= {"pruning": set(), "metrics": set(), "runs": {"distributed", "data"}}
    files = {path: path.stem for path in ROOT.glob("*.py")} | dict.fromkeys(ROOT.glob("data/[a-z]*.py"), "data")
    for path, name in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        imported = {module.split(".")[0] for module in imported}
        assert not imported & {"fcntl", "resource", "termios", "pwd", "grp"}, path
        assert imported & set(files.values()) <= allowed.get(name, set(files.values())), path
