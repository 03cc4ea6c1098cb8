"""Whole runs of the real program, with a tiny model: what they leave, that they repeat, how they refuse bad input."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import report
import train
from data import DEFAULT_MODEL, batches, demo, load, load_tokenizer
from models import FlatAdamW, NLUModel, bert, hugging_face, limit_vocabulary, losses, predictions, restore_vocabulary
from pruning import Smoother, select

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
    row, folder = run("--keep", 0.3, "--no-model")
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "epochs.jsonl", "rounds"]
    lines = [json.loads(line) for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert [line["kept"] for line in lines] == [400, 120, 120, 120]
    assert [json.loads(line) for line in (folder.parent / "results.jsonl").read_text().splitlines()] == [row]
    assert json.loads((folder / "config.json").read_text())["args"] == row["args"]

    rounds = read_rounds(folder)
    assert list(rounds) == ["epoch-002.npz", "epoch-004.npz"]  # scored before these epochs
    smooth = Smoother(0.8, 1.0)
    for scored in rounds.values():
        assert np.array_equal(smooth(scored["scores"]), scored["importance"])
        assert np.flatnonzero(scored["keep"]).tolist() == select(scored["importance"], 0.3).tolist()

    assert row["examples_seen"] == 400 + 3 * 120 and row["examples_full"] == 1600
    assert row["steps"] == 50 + 3 * 15
    assert row["epoch_kept"] == [400, 120, 120, 120]
    assert sum(row["epoch_seconds"]) == pytest.approx(row["seconds"]["train"], abs=0.01)
    assert set(row["seconds"]) == {"load", "train", "score", "select", "evaluate", "save", "total"}
    seconds = dict(row["seconds"])
    assert seconds.pop("total") == pytest.approx(seconds["train"] + seconds["score"] + seconds["select"], abs=0.01)
    assert row["curve"][-1] == row["dev"]


def test_a_run_that_pruning_has_spoilt_says_so(run):
    row, _ = run("--no-model")
    better = {name: value + 1 for name, value in row["dev"].items()}
    spoilt = report.summary(row | {"curve": [better, *row["curve"][1:]]})
    assert f"lost   dev frame_acc was {better['frame_acc']:.2f} before" in spoilt
    assert "wrong labels; a higher --keep, --draw or --stratify may help" in spoilt
    for flags in (["--method", "random"], ["--draw"], ["--stratify"]):  # no advice that would be refused or is taken
        other, _ = run("--no-model", *flags)
        assert "; a higher --keep may help" in report.summary(other | {"curve": [better, *row["curve"][1:]]})
    assert "lost   " not in report.summary(row | {"curve": [row["dev"]] * 4})
    row, _ = run("--no-model", "--method", "full")
    assert "lost   " not in report.summary(row | {"curve": [better] + [row["dev"]] * 3})
    row, _ = run("--no-model", "--method", "full", "--epochs", 1, "--full-epochs", 2)
    assert "lost   " not in report.summary(row)


def test_the_saved_model_has_the_metrics_of_the_row(run):
    row, folder = run()
    model = NLUModel.load(folder / "model")
    data = load("demo", load_tokenizer(folder / "model"), max_train=400)
    metrics = train.evaluate(data, data.evaluation["test"], *predictions(model, data.evaluation["test"]))
    assert metrics == row["test"]


def read_rounds(folder):
    """{file name: {array name: array}} of all scoring rounds."""
    return {path.name: dict(np.load(path)) for path in sorted(folder.glob("rounds/*"))}


def assert_same_training(first, second):
    a, b = read_rounds(first), read_rounds(second)
    assert a.keys() == b.keys()
    assert all(np.array_equal(a[name][k], b[name][k]) for name in a for k in ("scores", "importance", "keep"))
    for file in ("model.safetensors", "heads.safetensors"):
        assert (first / "model" / file).read_bytes() == (second / "model" / file).read_bytes()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_same_seed_gives_the_same_run_bit_for_bit(run, precision):
    flags = ("--precision", precision, "--seed")
    (one, first), (two, second), (other, _) = run(*flags, 5), run(*flags, 5, out="again"), run(*flags, 6)
    assert one["test"] == two["test"] and one["curve"] == two["curve"]
    assert_same_training(first, second)
    assert one["curve"] != other["curve"]


def test_training_visits_what_was_kept_and_nothing_else(run, monkeypatch):
    visited = []

    def recorded(*args):
        cut = batches(*args)
        visited.append(np.sort(np.concatenate(cut)).tolist())
        return cut

    monkeypatch.setattr(train, "batches", recorded)
    _, folder = run("--keep", 0.25)
    masks = [np.flatnonzero(scored["keep"]).tolist() for scored in read_rounds(folder).values()]
    assert visited == [list(range(400)), masks[0], masks[0], masks[1]]


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_the_learning_rate_falls_to_zero_over_the_pruned_schedule(run, monkeypatch, schedule):
    rates = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self)))
    row, _ = run("--schedule", schedule, "--lr", "1e-3")
    assert len(rates) == row["steps"]
    sizes = [50, 25, 25, 25]  # steps of each epoch: of 400 examples, and of half of them
    done = np.concatenate([(epoch + np.arange(size) / size) / 4 for epoch, size in enumerate(sizes)])
    falling = 1e-3 * (1 - done)
    np.testing.assert_allclose(rates, falling if schedule == "linear" else 1e-3)


@pytest.mark.parametrize("flags", [("--method", "full"), ("--keep", 1)])
def test_training_on_everything_scores_nothing(run, flags):
    row, folder = run(*flags)
    assert row["scoring_rounds"] == row["pruned_epochs"] == 0
    assert "score" not in row["seconds"] and not (folder / "rounds").exists()
    assert row["examples_seen"] == row["examples_full"] == 1600


def test_random_keeps_exactly_as_many_and_draws_anew(run):
    _, folder = run("--method", "random", "--keep", 0.25, "--cycle", 1)
    rounds = read_rounds(folder).values()
    assert [scored["keep"].sum() for scored in rounds] == [100, 100, 100]
    assert len({scored["keep"].tobytes() for scored in rounds}) == 3
    assert all(np.array_equal(scored["scores"], scored["importance"]) for scored in rounds)  # nothing to smooth


@pytest.mark.parametrize("flags", [("--method", "forgetting"), ("--method", "infobatch"), ("--method", "grand"),
                                   ("--method", "loss", "--stratify"), ("--selection", "static"), ("--draw",),
                                   ("--draw", "--selection", "static"),
                                   ("--rescore", "all"), ("--rescore", "none"), ("--class-floor", 3)])
def test_every_method_runs_and_counts_what_it_did(run, flags):
    row, folder = run("--keep", 0.5, *flags)
    rounds = read_rounds(folder)
    sizes = [json.loads(line)["kept"] for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert row["examples_seen"] == sum(sizes) and row["scoring_rounds"] == len(rounds) > 0
    assert all(scored["keep"].sum() in sizes for scored in rounds.values())
    if "infobatch" not in flags:
        assert set(sizes) == {400, 200}
    own = {"forgetting": "none", "infobatch": "none", "grand": "all", "static": "all", "--draw": "none"}
    assert row["args"]["rescore"] == own.get(flags[-1], flags[-1] if flags[0] == "--rescore" else "untrained")


def test_drawing_keeps_other_examples_every_epoch_and_needs_no_scoring_pass(run, monkeypatch):
    monkeypatch.setattr("scoring.score", None)
    _, folder = run("--draw", "--keep", 0.25)
    rounds = read_rounds(folder)
    assert list(rounds) == ["epoch-002.npz", "epoch-003.npz", "epoch-004.npz"]
    masks = [scored["keep"] for scored in rounds.values()]
    assert [mask.sum() for mask in masks] == [100] * 3 and 100 < np.any(masks, 0).sum() < 300
    first, second, third = (scored["scores"] for scored in rounds.values())
    assert np.array_equal(first != second, masks[0]) and np.array_equal(second != third, masks[1])  # the newest of each
    assert first[masks[0]].mean() > first[~masks[0]].mean()  # the higher the likelier


def test_infobatch_keeps_all_above_the_mean_and_ends_on_everything(run):
    _, folder = run("--method", "infobatch", "--epochs", 8, "--keep", 0.4)
    rounds = read_rounds(folder)
    sizes = [json.loads(line)["kept"] for line in (folder / "epochs.jsonl").read_text().splitlines()]
    assert list(rounds) == [f"epoch-{epoch:03}.npz" for epoch in range(2, 8)]
    assert sizes[0] == sizes[-1] == 400 and max(sizes[1:-1]) < 400
    for scored in rounds.values():
        above = scored["scores"] >= scored["scores"].mean(dtype=float)
        assert scored["keep"][above].all() and 0 < scored["keep"][~above].mean() < 1


def test_weights_of_examples_reach_the_gradient(run, monkeypatch):
    """Examples that weigh nothing leave the weights as they are, from the first selection on."""
    seen, step = [], FlatAdamW.step

    def watched_step(optimizer, lr):
        step(optimizer, lr)
        seen.append(optimizer.master.grad.count_nonzero().item())

    monkeypatch.setattr(FlatAdamW, "step", watched_step)
    monkeypatch.setattr(train, "choose", lambda importance, *_: (np.arange(64), np.zeros(400, np.float32)))
    run("--epochs", 2)
    assert min(seen[:50]) > 0 and seen[50:] == [0] * 8


def test_static_selection_trains_from_the_pretrained_weights_again(run, tiny, tokenizer, monkeypatch):
    states, load = [], FlatAdamW.load

    def watched_load(optimizer, state):
        states.append(optimizer.master.clone())
        load(optimizer, state)
        states.append(optimizer.master.clone())
        assert not optimizer.adam.state[optimizer.master]  # no averages of gradients from before

    monkeypatch.setattr(FlatAdamW, "load", watched_load)
    row, folder = run("--selection", "static", "--keep", 0.5)
    trained, again = states
    assert not torch.equal(trained, again)
    monkeypatch.undo()
    data = train.load("demo", tokenizer, max_train=400)
    fresh = NLUModel.build(tiny, tokenizer, data, seed=0)
    limit_vocabulary(fresh, data)
    assert torch.equal(FlatAdamW(fresh, "fp32", 1.0).master, again)
    assert list(read_rounds(folder)) == ["epoch-002.npz"] and len(row["curve"]) == 5


def test_dev_and_test_do_not_touch_training(run, monkeypatch):
    """With dev and test exchanged, training ends with the same weights and masks."""
    _, first = run("--keep", 0.5)
    generate = demo.generate

    def other():
        splits = generate()
        return {**splits, "dev": splits["test"], "test": splits["dev"]}

    monkeypatch.setitem(train.DATASETS, "demo", train.DATASETS["demo"]._replace(reader=other))
    _, second = run("--keep", 0.5)
    assert_same_training(first, second)


def test_runs_of_the_same_second_do_not_share_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "now")
    args = train.parse(["--out", str(tmp_path)])
    assert len({report.new_folder(args)[0] for _ in range(3)}) == 3


def test_scores_that_are_no_numbers_stop_the_run(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.Scorer, "__call__", lambda scorer, *_: np.full(len(scorer.split), np.nan))
    assert train.main(["--model", tiny, "--max-train", "100", "--epochs", "2", "--full-epochs", "1", "--out",
                       str(tmp_path)]) == 2
    assert "100 of 100 scores are NaN" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(run):
    with pytest.raises(train.RunError, match=r"the loss is nan at step [23] \(epoch 1\); start again with"):
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
    "--full-epochs 0": "--full-epochs 0: must be at least 1 (random: 0)",
    "--full-epochs 10": "--full-epochs 10: must be lower, or --full-end, or nothing is ever pruned",
    "--full-epochs 5 --full-end 5": "--full-epochs 5: must be lower",
    "--selection static --full-end 10": "--full-epochs 2: must be lower",
    "--full-end -1": "--full-end -1: must be at least 0",
    "--class-floor -1": "--class-floor -1: must be at least 0",
    "--method forgetting --rescore all": "--rescore all: must be none",
    "--method grand --rescore untrained": "--rescore untrained: must be all",
    "--method infobatch --selection static": "--method infobatch: must be another one for --selection static",
    "--method infobatch --stratify": "--method infobatch: must be another one",
    "--method infobatch --draw": "--method infobatch: must be el2n or loss for --draw",
    "--method grand --draw": "--method grand: must be el2n or loss for --draw",
    "--draw --stratify": "argument --stratify: not allowed with argument --draw",
    "--draw --offset 0.1": "--offset 0.1: must be 0 with --draw",
    "--method random --full-epochs -1": "--full-epochs -1: must be at least 1 (random: 0)",
    "--cycle 0": "--cycle 0: must be at least 1",
    "--batch-size 0": "--batch-size 0: must be at least 1",
    "--offset 0.6": "at most 1 - keep = 0.5",
    "--offset -0.1": "--offset -0.1: must be at least 0",
    "--ema 0": "--ema 0.0: must be above 0",
    "--std-weight -1": "--std-weight -1.0: must be a number, 0 or more",
    "--lr 0": "--lr 0.0: must be a number above 0",
    "--lr inf": "must be a number above 0",
    "--clip 0": "--clip 0.0: must be a number above 0",
    "--seed -1": "--seed -1: must be from 0",
    "--max-length 2": "--max-length 2: must be from 3",
    "--clip inf": "--clip inf: must be a number above 0",
    "--max-train 0": "--max-train 0: must be at least 1",
    "--device meta": "--device meta: not to be had here",
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


def test_the_default_learning_rate_is_that_of_the_task(tmp_path):
    table, words = tmp_path / "table", tmp_path / "words"
    table.mkdir()
    (words / "train").mkdir(parents=True)
    rates = {name: train.parse(["--dataset", str(name)]).lr for name in ("demo", "mtop", words, "rte", "sst2", table)}
    assert list(rates.values()) == [2e-4] * 3 + [1e-4] * 3
    assert train.parse(["--dataset", "rte", "--lr", "3e-5"]).lr == 3e-5


@pytest.mark.parametrize(("flags", "message"), [
    (["--max-train", "40"], "that is 20 of 40 train examples, less than one batch of 32"),
    (["--dataset", "snips", "--data-dir", "/proc/nope"], "/proc/nope/snips could not be written"),
    (["--model", "/nonexistent/model"], "--model /nonexistent/model:"),
    (["--model", "no-such/model"], "--model no-such/model:"),
    (["--out", "/proc/nope"], "--out /proc/nope:"),
    (["--out", str(Path(__file__))], "--out"),
])  # fmt: skip
def test_input_that_cannot_be_used_is_refused_in_one_line(tiny, flags, message, capsys):
    assert train.main(["--model", tiny, *flags]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and message in captured.err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(),
                                   RuntimeError("DefaultCPUAllocator: can't allocate memory: …"),
                                   RuntimeError("could not create a primitive"),
                                   RuntimeError("could not execute a primitive"), RuntimeError("std::bad_alloc")])
def test_running_out_of_memory_says_what_to_lower(monkeypatch, capsys, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(train, "run", fail)
    assert train.main(["--batch-size", "64"]) == 2
    assert capsys.readouterr().err == ("train.py: error: out of memory; lower --batch-size 64 or --max-length 256 "
                                       f"({str(error) or 'MemoryError'})\n")


def test_full_ignores_the_flags_of_pruning():
    args = train.parse(["--method", "full", "--keep", "0.2", "--offset", "0.1"])
    assert args.keep == 1 and args.offset == 0


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
    again = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert "('six'," in again.stdout, again.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_run_soon_and_says_how_to_go_on(tiny, tmp_path, number):
    process = program("--model", tiny, "--epochs", 500, "--out", tmp_path, cwd=ROOT)
    while "epoch  1/500" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    folder, = tmp_path.glob("demo-*")
    assert err.strip() == f"train.py: interrupted; to go on: python train.py --resume {folder}"
    assert json.loads((folder / "epochs.jsonl").read_text().splitlines()[0])["epoch"] == 1
    assert {path.name for path in folder.iterdir()} <= {"checkpoint.pt", "config.json", "epochs.jsonl", "rounds"}


def test_a_short_run_on_real_data(run, raw):
    row, _ = run("--dataset", "snips", "--data-dir", raw, "--model", DEFAULT_MODEL, "--lr", "3e-4")
    assert row["test"]["intent_acc"] > 60  # of seven intents, after 400 utterances


def test_ctrl_c_during_the_imports_leaves_no_traceback(tmp_path):
    process = program("--out", tmp_path)
    time.sleep(0.7)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode != 0 and "Traceback" not in err


# ---- the engine


def test_the_benchmark_of_encoding_reads_what_it_wrote():
    said = bench.encoding(train.parse([]), (31, 5, 7))
    assert re.fullmatch(r"43 sentence pairs of \d+ tokens read and encoded in [\d.]+ s; memory at most [\d,]+ MB", said)


def textbook_losses(model, data, cut, clip):
    """The loss of each batch, in the order a textbook would train on them."""
    assert model.run_encoder is bert
    model.run_encoder = hugging_face
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    return [bench.textbook_step(model, optimizer, data.train.batch(indices), clip).item() for indices in cut]


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_step_has_the_mathematics_of_the_textbook_loop(tiny, tokenizer, demo_data, clip):
    """Same batches, no dropout, fp32: the same loss curve and the same weights in the end."""
    cut = batches(demo_data.train.lengths, np.arange(640), 32, np.random.default_rng(0))
    plain, ours = (NLUModel.build(tiny, tokenizer, demo_data, seed=3).eval() for _ in range(2))
    wanted = textbook_losses(plain, demo_data, cut, clip)
    limit_vocabulary(ours, demo_data)
    optimizer, curve = FlatAdamW(ours, "fp32", clip), []
    for indices in cut:
        batch = demo_data.train.batch(indices)
        loss = losses(ours(batch), batch).mean()
        loss.backward()
        optimizer.step(1e-3)
        curve.append(loss.item())
    assert wanted[-1] < 0.7 * wanted[0]
    np.testing.assert_allclose(curve, wanted, rtol=1e-4)
    optimizer.restore()
    restore_vocabulary(ours)
    for (name, weight), other in zip(plain.named_parameters(), ours.parameters()):
        torch.testing.assert_close(other, weight, rtol=0, atol=2e-4, msg=name)


def test_gradients_of_several_batches_add_up_and_of_none_are_zero(tiny, tokenizer, demo_data):
    def stepped(*parts):
        model = NLUModel.build(tiny, tokenizer, demo_data, seed=3).eval()
        limit_vocabulary(model, demo_data)
        optimizer = FlatAdamW(model, "fp32", 1e9)
        for indices in parts:
            batch = demo_data.train.batch(indices)
            (losses(model(batch), batch).sum() / 32).backward()
        optimizer.step(1e-3)
        return optimizer.master.grad

    everything = np.arange(32)
    whole = stepped(everything)
    torch.testing.assert_close(stepped(everything[::2], everything[1::2]), whole, rtol=0, atol=1e-6)
    assert stepped().count_nonzero() == 0


def test_in_bf16_the_model_works_with_a_rounded_copy_and_leaves_in_fp32(model, demo_data):
    optimizer = FlatAdamW(model, "bf16", 1.0)
    batch = demo_data.train.batch(np.arange(16))
    before, rounded = optimizer.master.clone(), optimizer.copy.clone()
    losses(model(batch), batch).mean().backward()
    optimizer.step(1e-5)
    moved = optimizer.master != before
    assert moved.float().mean() > 0.5 and not torch.equal(rounded, optimizer.copy)
    assert (moved & (rounded == optimizer.copy)).any()  # steps too small for bf16 are not lost
    assert all(weight.dtype == torch.bfloat16 for weight in model.parameters())
    assert torch.equal(torch.cat([w.detach().flatten() for w in model.parameters()]), optimizer.master.bfloat16())
    optimizer.restore()
    assert torch.equal(torch.cat([weight.detach().flatten() for weight in model.parameters()]), optimizer.master)


def test_the_benchmark_prints_every_figure_that_it_promises(tiny, tmp_path, capsys):
    status = bench.main(["--model", tiny, "--max-train", "300", "--steps", "9", "--rounds", "1", "--seconds", "0.1",
                         "--grown", "1000", "--device", "cpu", "--json", str(tmp_path / "bench.json")])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "bench.json").read_text())
    assert status == 0
    for line in ("textbook, fp32", "engine, fp32", "a step, fp32", "padding", "with 1,000 examples",
                 "pruning, T = 2, 10 epochs", "pruning, T = 4, 40 epochs", "memory for each example"):
        assert f"| {line}" in printed
    assert result["score difference"]["fp32"]["largest"] < 1e-4
    assert result["loss difference"] < 1e-4
    assert 0 <= result["padding"]["training"] < 0.1 < result["padding"]["textbook"]


# ---- several processes


@pytest.fixture
def still(tiny, tmp_path):
    """The tiny model without dropout, whose random numbers differ between processes."""
    shutil.copytree(tiny, tmp_path / "still")
    config = json.loads((tmp_path / "still" / "config.json").read_text())
    config |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    (tmp_path / "still" / "config.json").write_text(json.dumps(config))
    return str(tmp_path / "still")


def command(model, out):
    # 321 % 32 is 1: of the last batch, one of two processes has nothing.
    return ["train.py", "--model", model, "--max-train", "321", "--epochs", "4", "--full-epochs", "2", "--lr", "1e-3",
            "--precision", "fp32", "--device", "cpu", "--keep", "0.5", "--out", str(out)]


@pytest.mark.parametrize("flags", [[], ["--method", "forgetting"], ["--method", "infobatch"]])
def test_two_processes_do_what_one_does(still, tmp_path, flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*launcher, *command(still, tmp_path / "two"), *flags], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test   intent_acc") == 1  # one process speaks
    one = train.run(train.parse([*command(still, tmp_path / "one")[1:], *flags]))
    two, = (json.loads(line) for line in (tmp_path / "two" / "results.jsonl").read_text().splitlines())
    assert two["environment"]["processes"] == 2 and one["environment"]["processes"] == 1
    assert two["steps"] == pytest.approx(one["steps"], abs=1)
    first, second = (read_rounds(Path(row["folder"]))["epoch-003.npz"] for row in (one, two))
    alike = np.isclose(second["scores"], first["scores"], atol=2e-4)  # rounding, after 22 steps of Adam
    assert alike.mean() > 0.98 if flags else alike.all()  # of a count, it can change a few
    assert np.mean(first["keep"] != second["keep"]) < 0.02
    for name, value in one["test"].items():
        assert two["test"][name] == pytest.approx(value, abs=2.0)


def test_a_process_that_dies_ends_the_run_with_an_error(still, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in "01":
        environ = {**os.environ, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                   "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        ranks.append(subprocess.Popen([sys.executable, *command(still, tmp_path / "runs"), "--epochs", "999"], cwd=ROOT,
                                      env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    first, second = ranks
    try:
        while "epoch  1" not in (line := first.stdout.readline()):
            assert line, first.stderr.read()  # it ended before
        second.kill()
        _, errors = first.communicate(timeout=60)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 2
    assert [line for line in errors.splitlines() if line.startswith("train.py: error: lost another process")]
    assert "Traceback" not in errors
