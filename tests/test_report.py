"""The report compares only what is comparable, and it survives damaged rows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, data_folder, write
from scipy import stats

import compare
import report


def row(method="el2n", seed=0, accuracy=90.0, cost=6.0, dev=None, **args):
    """Return a row. cost: in own full epochs."""
    if method != "full":
        args = {"keep": 0.5, "full_epochs": 2, "cycle": 2, **args}
    seen = 100 if method == "full" else 64
    train = seen * args.get("epochs", 10) / 10  # seconds: an epoch of full data takes 10
    return {
        "args": {"dataset": "d", "model": "m", "method": method, "epochs": 10, "lr": 1e-4, "seed": seed, **args},
        "environment": {"device": "cpu", "cpu": "a processor", "threads": 2, "processes": 1},
        "seconds": {"train": train, "total": train if method == "full" else 10 * cost}, "tokens_seen": seen,
        "tokens_full": 100,
        "dev": {"intent_acc": 99.0, "frame_acc": accuracy if dev is None else dev},
        "test": {"intent_acc": 98.0, "frame_acc": accuracy},
    }  # fmt: skip


def full(epochs, accuracies, **args):
    """Return rows on full data, one a seed."""
    return [row("full", seed, accuracy, epochs=epochs, **args) for seed, accuracy in enumerate(accuracies)]


def tasks(rows):
    return compare.tasks([compare.completed(one) for one in rows])


def only(rows):
    """Return the Task of rows that can all be compared, and its last arm."""
    (task,) = tasks(rows)
    return task, task.arms[-1]


# ---- statistics, against slow twins


@pytest.mark.parametrize("seed", range(20))
def test_the_envelope_is_the_highest_line_between_runs_that_cost_no_more(seed):
    rng = np.random.default_rng(seed)
    costs = np.sort(rng.choice(np.arange(1, 20), size=rng.integers(1, 7), replace=False))
    means = rng.normal(size=len(costs))
    corners = compare.envelope(list(zip(costs, means, means)))
    best = np.maximum.accumulate(means)
    for cost in np.linspace(costs[0], costs[-1] + 3, 100):
        pairs = [(x, y, x1, y1) for x, y in zip(costs, best) for x1, y1 in zip(costs, best) if x < cost < x1]
        lines = [y + (cost - x) / (x1 - x) * (y1 - y) for x, y, x1, y1 in pairs]
        wanted = max([*lines, *best[costs <= cost]])
        assert np.interp(cost, *list(zip(*corners))[:2]) == pytest.approx(wanted)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_intervals_are_those_of_student(n):
    values = np.random.default_rng(n).normal(size=n)
    low, high = stats.t.interval(0.95, n - 1, values.mean(), stats.sem(values))
    assert compare.half_width(values) == pytest.approx((high - low) / 2, rel=1e-3)


# ---- what is compared with what


def test_differences_are_paired_by_seed():
    rows = [*full(10, [80, 90, 70]), row(seed=2, accuracy=71), row(seed=0, accuracy=82)]
    task, arm = only(rows)
    assert task.to_full(arm) == [2, 1]  # seeds 0 and 2
    assert report.gain(task.to_full(arm), 3).endswith("(n 2)")
    assert report.gain([1.0, 2.0], 2) == "+1.50"  # two values have no interval
    assert report.gain([1.0, 2.0, 3.0], 3) == "+2.00 [-0.48, +4.48]"


@pytest.mark.parametrize(("rows", "gains"), [
    ([*full(10, [90, 94]), *full(5, [80, 90]), row(seed=0, accuracy=89, cost=6), row(seed=1, accuracy=93, cost=8)],
     [89 - 84, 93 - 91.6]),  # in the mean at 7 epochs: 0.6 and 0.4 of the two baselines, for every seed
    ([*full(10, [88]), *full(5, [90]), *full(3, [80]), row(accuracy=91, cost=7)], [1]),  # the curve never falls
    ([*full(10, [90]), *full(5, [80]), row(cost=4)], []),  # and is not extrapolated
    ([*full(10, [90, 92]), *full(5, [80]), *(row(cost=7.5, seed=seed) for seed in (0, 1))], [5]),  # full 5 lacks seed 1
])  # fmt: skip
def test_equal_time_is_on_the_curve_of_full_data(rows, gains):
    task, arm = only(rows)
    assert task.to_equal_time(arm) == pytest.approx(gains)


@pytest.mark.parametrize("seed", [0, 7])
def test_full_data_has_the_learning_rate_that_is_best_on_dev_of_those_with_the_most_seeds(seed):
    """Where a rate with fewer seeds took part, its one seed would be all that is left to compare with."""
    good, bad, stray = full(5, [85, 85], lr=4e-4), full(5, [89, 89]), row("full", seed, 99, epochs=5, lr=8e-4)
    for one, dev in zip([*good, *bad], (50, 90, 60, 10)):  # seed 0, 1 of the first, then of the second
        one["dev"]["frame_acc"] = dev
    task, _ = only([*full(10, [90, 90]), *good, *bad, stray, row()])
    assert [arm.args["lr"] for arm in task.baselines] == [1e-4, 4e-4]


def test_full_data_of_two_methods_has_one_baseline_for_each_number_of_epochs():
    task, _ = only([*full(10, [90]), *full(5, [80]), *full(10, [91], freeze=True), *full(5, [70], freeze=True)])
    assert [(arm.epochs, arm.mean) for arm in task.baselines] == [(10, 91), (5, 80)]


def test_a_rounding_decides_nothing_on_dev():
    """Some rows are rounded to 4 digits. Of equal arms the first counts, which has the lower learning rate."""
    one, other = full(5, [85]), full(5, [86], lr=4e-4)
    one[0]["dev"]["frame_acc"], other[0]["dev"]["frame_acc"] = 80.7606, 80.76062639
    task, _ = only([*full(10, [90]), *one, *other, row()])
    assert [arm.args["lr"] for arm in task.baselines] == [1e-4, 1e-4]


def test_time_is_counted_in_own_full_epochs_so_machines_may_differ():
    slow = {**row(), "seconds": {"train": 64 * 3, "total": 70 * 3}}
    task, arm = only([*full(10, [90]), slow])
    assert (task.full.cost, arm.cost) == pytest.approx((10, 7))


@pytest.mark.parametrize("flag", [{"model": "b"}, {"max_length": 128}, {"max_train": 100}])
def test_other_models_and_other_data_are_not_compared(flag):
    assert len(tasks([*full(10, [90]), row(**flag)])) == 2


def test_arms_differ_in_settings_and_not_in_what_has_no_effect():
    task, _ = only([*full(10, [90]), *full(10, [91], full_epochs=10, cycle=1), row(), row(seed=1, offset=0.0),
                    row(cycle=4), row("random"), row("random", seed=1)])  # fmt: skip
    names = [(arm.name, task.extras(arm), len(arm.rows)) for arm in task.arms]
    assert names == [("full data", "", 1), ("random", "", 2), ("highest EL2N", ", cycle 2", 2),
                     ("highest EL2N", ", cycle 4", 1)]  # fmt: skip


def test_of_two_runs_with_one_seed_the_last_counts_with_a_warning(capsys):
    _, arm = only([row(accuracy=80), row(accuracy=90, precision="bf16")])
    assert arm.mean == 90 and "warning: d, highest EL2N" in capsys.readouterr().err


def test_a_mean_over_datasets_is_of_one_metric_and_of_one_model():
    rows, other = [], [("cola", "a", "matthews"), ("rte", "a", "accuracy")]
    for dataset, model, metric in [*((d, m, "frame_acc") for d in "de" for m in "ab"), *other]:
        for method, value in (("full", 90), ("el2n", {"a": 80, "b": 70}[model])):
            rows.append({**row(method, dataset=dataset, model=model), "dev": {metric: value}, "test": {metric: value}})
    for first, mean in (("a", "-10.00"), ("b", "-20.00")):  # the mean is over the kind of the first dataset
        found = tasks(sorted(rows, key=lambda one: one["args"]["model"] != first))
        (_, _, line), _ = report.headline(found, report.headline_arms(found))
        assert found[0].kind == f"frame accuracy, model {first}" and line[3] == mean


@pytest.mark.parametrize("seeds", [2, 3])
def test_a_mean_over_datasets_has_an_interval_only_where_each_has_3_seeds(seeds):
    """Three datasets of one seed may agree by chance, and an interval of their means would be far too narrow."""
    rows = []
    for i, dataset in enumerate("def"):
        n = seeds if dataset == "f" else 3
        rows += [row(method, seed=seed, dataset=dataset, accuracy=value)
                 for seed in range(n) for method, value in (("full", 90), ("el2n", 80 + i))]  # fmt: skip
    found = tasks(rows)
    (_, _, line), _ = report.headline(found, report.headline_arms(found))
    assert line[3] == ("-9.00 [-11.48, -6.52]" if seeds == 3 else "-9.00")


def test_the_headline_has_the_equal_time_rows_and_the_arm_that_is_best_on_dev():
    rows = [*full(10, [90]), *full(5, [80]), row(accuracy=70, dev=10), row(accuracy=60, dev=20, lr=4e-4)]
    found = tasks(rows)
    (head, *lines), _ = report.headline(found, report.headline_arms(found))
    assert head[3:] == ["to full data", "to equal time", "d (n 1)"]
    assert lines == [["all", "full data", "100 %", "–", "–", "90.0"],
                     ["all", "full data, 5 epochs", "50 %", "-10.00", "–", "80.0"],
                     ["0.5", "highest EL2N", "60 %", "-30.00", "-22.00", "60.0"]]  # fmt: skip
    found = tasks([row()])  # without full data there are no such columns
    assert report.headline(found, report.headline_arms(found))[0][0][3:] == ["d (n 1)"]


def test_seconds_are_a_mean_only_within_one_machine():
    other = {**row(seed=1), "environment": {**row()["environment"], "cpu": "another"}}
    found = tasks([row(), other, row(keep=0.2)])
    table = report.full_page(found, report.headline_arms(found), wide=False)[-3]
    assert [line[-1] for line in table[1:]] == ["A, B", "60 A"]


# ---- files


def row_file(folder, *rows):
    """Write rows to a file. Returns its path."""
    write(folder, {"a.jsonl": [one if isinstance(one, str) else json.dumps(one) for one in rows]})
    return str(folder / "a.jsonl")


@pytest.mark.parametrize("change", [
    {"args": None}, {"args": []}, {"dev": {}}, {"test": {"frame_acc": "90"}}, {"test": {"frame_acc": float("nan")}},
    {"test": {"frame_acc": 10**400}}, {"seconds": {}}, {"seconds": {"train": 0, "total": 0}}, {"tokens_seen": "9"},
    {"environment": 5}, {"dev_mismatched": 5}, {"args": {**row()["args"], "epochs": 0}},
    {"args": {**row()["args"], "seed": []}}, {"args": {**row()["args"], "dataset": ["d"]}},
])  # fmt: skip
def test_damaged_rows_are_named_and_skipped(tmp_path, capsys, change):
    damaged = {**row(), **change}, json.dumps(row())[:50], "5", "[" * 100000
    path = row_file(tmp_path, row(), *damaged, row(seed=2))
    assert [kept["args"]["seed"] for kept in compare.read_rows([path])] == [0, 2]
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.split(":")[2] == "2" and warning.endswith("3 more")


def test_the_learning_rate_that_is_best_on_dev_is_chosen_once_all_are_there(tmp_path):
    rows = [row(lr=lr, dev=dev, seed=seed) for lr, dev, seed in ((1e-4, 80, 0), (2e-4, 81, 0), (3e-4, 99, 1))]
    write(tmp_path, {f"run{i}/result.json": [json.dumps(one)] for i, one in enumerate(rows)})
    assert compare.best_rate(tmp_path, "0", "1e-4", "2e-4") == 2e-4
    assert compare.best_rate(tmp_path, "0", "1e-4", "4e-4") is None
    write(tmp_path, {"other/result.json": [json.dumps(row(lr=2e-4, batch_size=16))]})
    with pytest.raises(SystemExit, match="several runs"):
        compare.best_rate(tmp_path, "0", "1e-4", "2e-4")


def test_a_folder_of_runs_is_read(tmp_path, capsys):
    """Stopped runs and odd folders are passed over. Nothing to report is an error."""
    (tmp_path / "stopped").mkdir()
    (tmp_path / "odd" / "result.json").mkdir(parents=True)
    for nothing in (tmp_path, tmp_path / "absent.jsonl"):
        assert report.main([str(nothing)]) == 2
    write(tmp_path, {f"run{seed}/result.json": [json.dumps(row(seed=seed))] for seed in (0, 1)})
    assert report.main([str(tmp_path)]) == 0
    assert "highest EL2N" in capsys.readouterr().out


@pytest.mark.parametrize("matplotlib", [True, False])
def test_pages_are_written_and_a_picture_where_matplotlib_is_installed(tmp_path, monkeypatch, capsys, matplotlib):
    """No text can break out of its cell."""
    if not matplotlib:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
    evil = "a | $b$\n| c\\| d\x1b[31m"
    rows = [*full(10, [90, 91]), *full(5, [80, 82]), row(), row(seed=1), row(keep=0.2, accuracy=10), row(clip=evil)]
    for one in rows:
        one["args"]["dataset"] = evil
    assert report.main([row_file(tmp_path, *rows), "--to", str(tmp_path / "to")]) == 0
    pages = {path.name: path for path in (tmp_path / "to").iterdir()}
    assert pages.keys() == {"headline.md", "results.md"} | ({"figure.svg", "figure.png"} if matplotlib else set())
    assert ("figure.svg" in pages["results.md"].read_text()) == matplotlib and "\x1b" not in capsys.readouterr().out
    for page in ("headline.md", "results.md"):
        lines = [line for line in pages[page].read_text().splitlines() if line.startswith("|")]
        cells = [line.replace("\\\\", "").replace("\\|", "").count("|") - 1 for line in lines]
        assert set(cells) <= {2, 6, 11}


def test_a_report_needs_no_torch():
    code = "import sys, report; assert not {'torch', 'transformers', 'models'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("file", sorted((ROOT / "results").glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_rows_are_whole_and_name_no_path(file, capsys):
    lines = file.read_text().splitlines()
    rows = compare.read_rows([file])
    assert len(rows) == len(lines) and not capsys.readouterr().err
    assert not any(part in line for line in lines for part in ("/tmp", "/work", "/home", "/root", "\\\\"))


# ---- one run


@pytest.fixture
def pruned(whole, tmp_path):
    """Return a copy of a run's folder. At the last selection, sample i got the score -i."""
    folder = Path(shutil.copytree(whole("--max-train", 40, "--no-model"), tmp_path / "run"))
    np.savez(folder / "rounds" / "epoch-009.npz", scores=-np.arange(40))
    return folder


def test_the_highest_scores_are_shown_in_words(pruned, tiny, tmp_path, capsys):
    """They are those of the last selection. Rows are those of the user's file, also under --max-train."""
    assert report.main([str(pruned), "--errors", "40", "--to", str(tmp_path / "to")]) == 0
    files = [(data_folder(tiny) / "train" / name).read_text().splitlines() for name in ("seq.in", "seq.out", "label")]
    lines = [re.split(r" *\| ?", line)[1:-1] for line in capsys.readouterr().out.splitlines()[-40:]]
    assert [float(score) for _, score, _, _ in lines] == [-i for i in range(40)]
    for row, _, label, text in lines:
        pairs = re.findall(r"\[(\S+): (\S+)\]|(\S+)", text)
        words, tags = [word or plain for word, _, plain in pairs], [tag or "O" for _, tag, _ in pairs]
        assert [" ".join(words), " ".join(tags), label] == [file[int(row)] for file in files]
    assert len({row for row, *_ in lines}) == 40
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"likely_errors.md"}


@pytest.mark.parametrize("change", [{"method": "random"}, {"max_train": 10}, {"dataset": "absent"},
                                    {"max_train": "10"}, {"dataset": None}, {"data_dir": 5, "dataset": "atis"}])
def test_scores_that_say_nothing_are_refused_in_one_line(pruned, capsys, change):
    """Random ones, those of other samples, and those of data that are gone."""
    facts = json.loads((pruned / "config.json").read_text())
    facts["args"] |= change
    write(pruned, {"config.json": json.dumps(facts)})
    assert report.main([str(pruned)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_damaged_selection_and_a_run_without_any_are_refused_in_one_line(pruned, capsys):
    for damage in (lambda path: path.write_bytes(b"PK damaged"), lambda _: shutil.rmtree(pruned / "rounds")):
        damage(pruned / "rounds" / "epoch-009.npz")
        assert report.main([str(pruned)]) == 2
    assert capsys.readouterr().err.count("\n") == 2
