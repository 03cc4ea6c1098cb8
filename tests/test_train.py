"""Whole runs with a tiny model: what they leave, what they train on, that they repeat, how they refuse and stop."""

import ast
import json
import re
import shlex
import shutil
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import (  # isort: skip
    GPU, ROOT, assert_same_run, data_folder, ended, log_of, only_folder, refused, rounds_of, row_of, start_two,
)  # fmt: skip

import runs
import scoring
import train
from data import load, load_tokenizer
from engine import FlatAdamW, limit_vocabulary
from metrics import evaluate
from models import NLUModel, build_model, predictions
from pruning import Smoother, highest

# ---- what a run leaves


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_run_leaves_what_the_readme_says(run, capsys, precision):
    """Its counts, its selections and its last lines are right. Its model is in fp32. Its row carries no path."""
    folder = run("--keep", 0.3, "--cycle", 2, "--precision", precision, out="my runs")
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
    assert evaluate(data, "test", *predictions(model, data.evaluation["test"])) == row["test"]
    assert {weight.dtype for weight in load_file(folder / "model" / "model.safetensors").values()} == {torch.float32}
    said, seconds = capsys.readouterr().out, row["seconds"]
    exec(re.search(r"from models import NLUModel; .*", said)[0])
    assert shlex.split(re.search(r"look   (.*) shows", said)[1]) == ["python", "report.py", str(folder)]
    seen = row["tokens_seen"] / row["tokens_full"]  # so all tokens, at the same speed, take seconds["train"] / seen
    share = seconds["total"] / (seconds["train"] / seen)
    assert f"{121 / 256:.1%} of the samples, {seen:.1%} of the tokens" in said and f"saved  {1 - share:.1%} of" in said
    assert f"--method full --epochs {round(4 * share)} " in said
    assert re.fullmatch("data-[0-9a-f]{6}", row["args"]["dataset"]) and not re.search(r'"(/|[A-Z]:)', json.dumps(row))


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the system does not tell")
def test_a_row_tells_machines_of_one_name_apart():
    assert re.search(r", family \w+, model \w+, stepping \w+$", runs.environment("cpu")["cpu"])


def test_the_phases_add_up_to_the_wall_time(run):
    run("--no-model", out="first")  # the first run of a process also imports, outside all phases
    begun = time.perf_counter()
    folder = run("--no-model", "--epochs", 8)
    wall, seconds = time.perf_counter() - begun, row_of(folder)["seconds"]
    total = seconds.pop("total")
    assert 0.9 * wall < sum(seconds.values()) <= 1.001 * wall
    assert total == pytest.approx(seconds["train"] + seconds["score"] + seconds["select"], abs=0.01)


# ---- what a run trains on


@pytest.mark.parametrize(("flags", "falls"), [
    (["--epochs", 2], np.r_[np.arange(8) / 8, 1 + np.arange(4) / 4] / 2),
    (["--epochs", 2, "--schedule", "constant"], np.zeros(12)),
    (["--selection", "static", "--epochs", 1, "--full-epochs", 3], np.r_[np.arange(24) / 24, np.arange(4) / 4]),
])  # fmt: skip
def test_the_learning_rate_falls_to_0_in_each_training(run, monkeypatch, flags, falls):
    """It falls with the epochs, so pruned steps are larger ones. A static run is two trainings. With τ > E it used to
    be negative."""
    rates, step = [], FlatAdamW.step
    monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: (rates.append(lr), step(self, lr)))
    run(*flags, "--no-model")
    np.testing.assert_allclose(rates, 3e-3 * (1 - falls))


def test_dropout_is_on_in_training_alone(run, monkeypatch):
    modes, forward = set(), NLUModel.forward

    def watched(model, *rest):
        modes.add((model.training, torch.is_grad_enabled()))
        return forward(model, *rest)

    monkeypatch.setattr(NLUModel, "forward", watched)
    run("--epochs", 2, "--no-model")
    assert modes == {(True, True), (False, False)}


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
        assert rounds[0]["scores"].max() < scoring.UNSEEN  # each was trained on at first
        assert all(np.array_equal(a["scores"] != b["scores"], a["keep"]) for a, b in pairwise(rounds))


def test_the_weights_of_samples_reach_the_gradient(run, monkeypatch):
    """With weights of 0 for the samples that are kept, and 1 for the others, the gradient is 0."""
    seen, step = [], FlatAdamW.step
    monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: (step(self, lr), seen.append(bool(self.master.grad.any()))))
    monkeypatch.setattr(train, "select", lambda *_: (np.arange(32, 64), np.float32(np.arange(64) < 32)))
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


def test_dev_and_test_do_not_touch_training(run, tiny, tmp_path):
    """With dev and test exchanged, a run has the same weights and masks, and the other one's metrics."""
    shutil.copytree(tiny, tmp_path / "model")
    first, data = run(model=tmp_path / "model", out="first"), data_folder(tmp_path / "model")
    for source, target in (("dev", "x"), ("test", "dev"), ("x", "test")):
        (data / source).rename(data / target)
    second = run(model=tmp_path / "model", out="second")
    assert_same_run(first, second, metrics=False)
    assert row_of(first)["dev"] == row_of(second)["test"] != row_of(first)["test"]


def test_two_processes_do_what_one_does(run, command, start, tiny, tmp_path):
    """Up to rounding, with a model without dropout, whose random numbers differ between processes."""
    still = shutil.copytree(tiny, tmp_path / "still")
    config = json.loads((still / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (still / "config.json").write_text(json.dumps(config))
    for rescore in ("all", "none"):  # scores of a pass, and of training steps
        flags = ["--lr", 5e-4, "--epochs", 3, "--rescore", rescore]
        processes = start_two(start, command(*flags, model=still, out=f"two-{rescore}"))
        assert list(map(ended, processes)) == [0, 0]
        two, one = only_folder(tmp_path / f"two-{rescore}"), run(*flags, model=still, out=rescore)
        assert [row_of(folder)["environment"]["processes"] for folder in (two, one)] == [2, 1]
        for name, arrays in rounds_of(one).items():
            np.testing.assert_allclose(rounds_of(two)[name]["scores"], arrays["scores"], rtol=1e-3, atol=1e-4)
            assert np.array_equal(rounds_of(two)[name]["keep"], arrays["keep"])
        np.testing.assert_allclose(*([line["loss"] for line in log_of(folder)] for folder in (two, one)), rtol=1e-3)


@pytest.mark.parametrize("device", [GPU])
def test_a_gpu_scores_as_a_cpu_does(model, demo_data, device):
    """EL2N within 1e-3, and the same samples are kept, but for ties."""
    on_cpu = scoring.score(model, demo_data.train, "el2n").numpy()
    on_gpu = scoring.score(model.to(device), demo_data.train.to(device), "el2n").cpu().numpy()
    np.testing.assert_allclose(on_gpu, on_cpu, rtol=0, atol=1e-3)
    differing = on_cpu[np.setxor1d(highest(on_gpu, 0.5), highest(on_cpu, 0.5))]
    np.testing.assert_allclose(differing, np.full(len(differing), np.median(on_cpu)), rtol=0, atol=2e-3)


# ---- how it refuses and stops


@pytest.mark.parametrize(("flags", "word"), [
    (["--batch-size", 50], "--batch-size"), (["--keep", 0.1], "--keep"), (["--model", "/no/model"], "--model"),
    (["--model", "no-such/model"], "--model"), (["--out", "/proc/x"], "--out"), (["--out", __file__], "--out"),
    (["--dataset", ROOT / "tests"], "train"),
])  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(command, flags, word, capsys):
    assert word in refused(capsys, command(*flags))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: …"),
                                   RuntimeError("could not create a primitive"), RuntimeError("std::bad_alloc")])
def test_running_out_of_memory_says_what_to_lower(command, monkeypatch, capsys, error):
    monkeypatch.setattr(train, "fine_tune", lambda *_: (_ for _ in ()).throw(error))
    assert "--batch-size 8" in refused(capsys, command())


@pytest.mark.parametrize("step", [5, 8, 20])  # within an epoch, at its end, and at the end of all
@pytest.mark.parametrize("what", ["losses", "weights"])
@pytest.mark.parametrize("device", ["cpu", GPU])
def test_a_run_stops_where_loss_or_weights_are_not_finite(command, tmp_path, monkeypatch, capsys, step, what, device):
    """No result and no model is left."""
    calls, losses, update = iter(range(1, 1000)), train.losses, FlatAdamW.step
    if what == "losses":
        monkeypatch.setattr(train, "losses", lambda *both: losses(*both) * (np.inf if next(calls) == step else 1))
    else:
        monkeypatch.setattr(FlatAdamW, "step", lambda self, lr: update(self, np.nan if next(calls) == step else lr))
    line = refused(capsys, command("--device", device))
    assert re.search(rf"loss is (inf|nan) .*\(epoch {1 if step < 9 else 4}\)", line)
    assert not list(tmp_path.rglob("model")) and not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "x"}, {"WORLD_SIZE": "2", "RANK": "0"}])
def test_half_an_environment_of_torchrun_is_refused(command, monkeypatch, capsys, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert "torchrun" in refused(capsys, command())


# ---- the house


def test_imports_run_one_way_and_none_is_of_unix_alone():
    """errors ← distributed ← data ← engine ← encoders ← models ← scoring ← flags ← train.

    pruning, metrics and runs know nothing of models.
    """
    order = ["errors", "distributed", "data", "engine", "encoders", "models", "scoring", "flags", "train"]
    allowed = {name: set(order[: i + 1]) for i, name in enumerate(order)}
    allowed["train"] |= {"pruning", "metrics", "runs"}
    allowed |= {"pruning": {"errors"}, "metrics": set(), "runs": {"errors", "distributed", "data"}}
    files = {path: path.stem for path in ROOT.glob("*.py")} | dict.fromkeys(ROOT.glob("data/[a-z]*.py"), "data")
    for path, name in files.items():
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and not node.level}
        imported = {module.split(".")[0] for module in imported}
        assert not imported & {"fcntl", "resource", "termios", "pwd", "grp"}, path
        assert imported & set(files.values()) <= allowed.get(name, set(files.values())), path
