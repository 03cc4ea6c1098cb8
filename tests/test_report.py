"""The table compares only what is comparable, and damaged rows neither stop it nor slip through."""

import copy
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

import report
import train
from data import demo


def row(method="el2n", seed=0, frame=90.0, seconds=60.0, **args):
    return {
        "args": {**report.BEFORE, "dataset": "d", "method": method, "keep": 1.0 if method == "full" else 0.5,
                 "seed": seed, "lr": 1e-4, "epochs": 10, "full_epochs": 2, "out": "runs", "no_model": True,
                 "data_dir": None, **args},
        "environment": {"device": "cpu", "cpu": "a processor", "threads": 2, "torch": "2", "transformers": "5"},
        "dev": {"frame_acc": frame}, "test": {"intent_acc": 99.0, "frame_acc": frame}, "seconds": {"total": seconds},
    }  # fmt: skip


def table_of(markdown):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if line[:1] == "|"]


def cells(rows):
    return table_of(report.table(rows))[2:]


def test_runs_are_compared_with_the_full_run_of_their_seed():
    rows = [row("full", 0, 90, 100), row("full", 1, 92, 200), row("el2n", 0, 91, 60), row("el2n", 1, 91, 100)]
    full, el2n = cells(rows)
    assert full[3:] == ["10", "2", "intent_acc 99.00 ± 0.00, frame_acc 91.00 ± 1.41", "–", "–", "150 ± 71", "–"]
    assert el2n[6:] == ["+0.00 ± 1.41 (p 1.000)", "–", "80 ± 28", "45.0 ± 7.1"]  # +1 and −1; 40 % and 50 %


def test_the_reference_is_full_data_for_the_most_epochs_and_the_most_alike_in_other_flags():
    full, short, other = row("full", 0, 90, 100), row("full", 0, 80, 50, epochs=5), row("full", 0, 70, 300, lr=9e-4)
    lines = cells([short, full, other, row("el2n", 0, 89, 40), row("el2n", 0, 88, 75, keep=0.3, epochs=8)])
    assert [line[9] for line in lines] == ["50.0", "–", "–", "60.0", "25.0"]
    assert cells([full, row(seed=1)])[1][9] == "–"
    assert cells([full, row(seed=0), row(seed=1)])[1][9] == "–"  # not of all n seeds


def test_one_reference_serves_all_seeds_of_a_group():
    """Seed 1's run for 10 epochs is missing: 7 epochs do not stand in for it."""
    rows = [row("full", 0, 90, 100), row("full", 0, 88, 70, epochs=7), row("full", 1, 89, 70, epochs=7),
            row("el2n", 0, 90, 60), row("el2n", 1, 90, 60)]  # fmt: skip
    assert [line[6] for line in cells(rows)] == ["–", "–", "–"]
    assert cells([*rows[:2], rows[3]])[2][6] == "+0.00"


def test_targets_are_for_the_same_number_of_epochs():
    rows = [row("full", 0, 90, 100), row("el2n", 0, 90, 65), row("full", 0, 92, 400, epochs=40)]
    assert "| -2.00 | – | 83.8 | – | – |" in report.targets(rows)
    assert "| 35.0 | ≥ 38: missed |" in report.targets(rows[:2])


def test_rows_from_before_a_flag_did_what_it_now_says(tmp_path):
    old, path = row(), tmp_path / "results.jsonl"
    old["args"] = {flag: value for flag, value in old["args"].items() if flag not in report.BEFORE}
    path.write_text(json.dumps(old))
    (old,) = report.read_rows([path])
    names = [line[1] for line in cells([old, row(rescore="untrained")])]
    assert names == ["el2n, rescore all", "el2n, rescore untrained"]
    assert len(cells([old, row(seed=1, rescore="all", draw=False)])) == 1


def test_models_and_cut_data_are_told_apart():
    rows = [row("full", 0, model="a"), row("full", 0, model="b"), row(model="b", keep=0.5)]
    assert [line[1] for line in cells(rows)] == ["full, model a", "full, model b", "el2n, model b"]
    assert cells([row("full"), row(max_train=100)])[1][6] == "–"


def test_full_data_in_the_same_time_is_read_off_between_its_runs():
    full = [row("full", 0, 90, 100), row("full", 0, 80, 50, epochs=5)]
    assert cells([*full, row("el2n", 0, 89, 75)])[2][7] == "+4.00"  # above 85
    assert cells([*full, row("el2n", 0, 89, 40)])[2][7] == "–"  # sooner than any
    assert cells([*full, row("full", 0, 10, 70, lr=9e-4), row("el2n", 0, 89, 75)])[3][7] == "+4.00"  # of the best
    both = [*full, row("full", 1, 90, 100), row("full", 1, 80, 50, epochs=5)]
    assert cells([*both, row("el2n", 0, 89, 48), row("el2n", 1, 89, 52)])[2][7] == "+9.00 ± 0.00"  # the mean is not


def test_full_data_in_the_same_time_has_the_learning_rate_that_is_best_on_dev():
    """Of fewer epochs, as they may want another than that of many, which is what pruning is compared with else."""
    tried = ((85, 60, 1e-4), (82, 70, 2e-4), (86, 65, 4e-4))
    full = [row("full", 0, 90, 100)]
    full += [row("full", 0, frame, 50, epochs=5, lr=lr) | {"dev": {"frame_acc": dev}} for frame, dev, lr in tried]
    assert [line[6] for line in cells(full)] == ["–", "-5.00", "-8.00", "-4.00"]  # all against ten epochs
    last = cells([*full, row("el2n", 0, 89, 75)])[-1]
    assert last[6:8] == ["-1.00", "+3.00"]  # above 86, between 90 and 82
    names = [line[1] for line in cells([*full, row("el2n", 0, 89, 75)])]
    assert names == ["full", "full", "full, lr 0.0002", "full, lr 0.0004", "el2n"]  # most rows are of 1e-4
    two = [*full, row("full", 1, 90, 100), row("el2n", 0, 89, 75), row("el2n", 1, 89, 75)]
    assert cells(two)[-1][7] == "–"  # five epochs were not run with seed 1
    slow = row("full", 0, 89, 120, epochs=5, precision="fp32") | {"dev": {"frame_acc": 99}}
    assert cells([*full, slow, row("el2n", 0, 89, 75)])[-1][7] == "+3.00"  # five of its epochs take as long as twelve


def test_of_learning_rates_the_one_that_most_runs_have_is_named_once_for_all():
    rows = [row("full"), row("full", lr=9e-4), row(), row("full", dataset="e")]
    assert [line[1] for line in cells(rows)] == ["full", "full, lr 0.0009", "el2n", "full"]
    assert "Where no other is said: lr 0.0001 on d. " in report.table(rows)


def test_time_is_counted_in_a_runs_own_epochs_on_everything():
    """On a day when the machine is twice as slow, 120 s are what 60 s are on another: 40 % saved."""
    full = [row("full", 0, 90, 100), row("full", 0, 86, 120, epochs=6), row("full", 0, 80, 50, epochs=5)]
    slow = row("el2n", 0, 89, 120) | {"full_seconds": 200}
    assert cells([*full, slow])[3][7:10] == ["+3.00", "120", "40.0"]  # above 86, of six epochs
    short = row("el2n", 0, 89, 60, epochs=8) | {"full_seconds": 80}  # six epochs' worth of ten
    assert cells([*full, short])[3][7:10] == ["+3.00", "60", "40.0"]


@pytest.mark.parametrize("n", [2, 3, 5, 12])
def test_p_is_that_of_the_paired_t_test(rng, n):
    stats = pytest.importorskip("scipy.stats")
    for shift in (0, 0.3, 1, 3):
        first, second = rng.normal(size=n), rng.normal(size=n) + shift
        got = report.p_value((first - second).tolist())
        assert got == pytest.approx(stats.ttest_rel(first, second).pvalue, abs=2e-4)


def test_only_a_difference_over_seeds_is_called_one():
    assert report.p_value([1.0]) is None and report.p_value([1.0, 1.0]) is None
    assert report.p_value([100 * ((k + 5) / 893) - 100 * (k / 893) for k in (771, 772, 780)]) is None  # five more right
    assert report.difference([1.0]) == "+1.00" and report.difference(None) == "–"
    assert report.difference([-1.0, -1.1, -0.9]).startswith("**-1.00 ± 0.10** (p 0.00")
    assert report.difference([-1.0, 1.2, -0.9]).startswith("-0.23 ± 1.24 (p 0.7")


def test_rows_say_in_which_flags_they_differ():
    assert [line[1] for line in cells([row(), row(lr=2e-4)])] == ["el2n, lr 0.0001", "el2n, lr 0.0002"]
    assert len(cells([row("full"), row("full", seed=1, full_epochs=4)])) == 1  # which does not matter to a full run
    own = [row(cycle=2), row("infobatch", cycle=1), row(selection="static", cycle=4), row(draw=True, cycle=1),
           row(keep=0.2, draw=False, cycle=2)]  # a method's own: not named
    assert [line[1] for line in cells(own)] == ["el2n", "infobatch", "el2n, static", "el2n, drawn", "el2n"]
    off = [row(offset=0.0), row(offset=0.0, stratify=True), row(offset=0.1)]
    assert [line[1] for line in cells(off)] == ["el2n", "el2n, stratify", "el2n, offset 0.1"]
    two = [row(cycle=2), row(cycle=4), row("loss", cycle=2)]  # which differ for el2n alone
    assert [line[1] for line in cells(two)] == ["el2n, cycle 2", "el2n, cycle 4", "loss"]


def test_targets_are_means_over_datasets_and_say_what_is_missed():
    rows = [row("full", 0, 90, 100), row("full", 0, 80, 100, dataset="e"), row("full", 0, 88, 50, epochs=5),
            row("full", 0, 79, 50, epochs=5, dataset="e"), row("el2n", 0, 90.2, 60),
            row("el2n", 0, 79.2, 64, dataset="e"),
            row("el2n", 0, 90, 39, keep=0.2), row("el2n", 0, 90, 9, keep=0.3), row("infobatch", 0, 90, 70),
            row("el2n", 0, 90, 60, selection="static")]  # fmt: skip
    head, _, paper, half, soft, third, claim, fifth = table_of(report.targets(rows))
    assert head[3:5] == ["d", "e"]
    # In the same time: 60 and 64 of 100 s, where full data has 88.4 and 79.28.
    together = report.difference([90.2 - 88.4, 79.2 - 79.28])
    assert half[:5] == ["50 %", "el2n", "10", "+0.20, 40 %", "-0.80, 36 %"]
    assert half[5:] == ["-0.30 ± 0.71 (p 0.656)", "≥ −0.2: missed", "38.0", "≥ 38: met", together]
    assert fifth[3:] == ["+0.00, 61 %", "–", "+0.00", "≥ −0.5: met", "61.0", "≥ 60: met", "–"]  # under 50 s
    assert third[6:] == ["–", "91.0", "–", "–"]
    assert soft[:2] == ["r = 50 %", "infobatch"] and soft[6:] == ["–", "30.0", "–", "+1.20"]
    assert (paper[:2], claim[:2]) == (["50 %", "the paper"], ["20 %", "the paper"]) and "up to 66" in claim


def test_targets_mix_no_machines_and_say_another_number_of_seeds():
    rows = [row(method, seed, frame, dataset=dataset) for dataset, frame in (("d", 91), ("e", 92)) for seed in (0, 1)
            for method, frame in (("full", 90), ("el2n", frame))]  # fmt: skip
    rows += [one | {"environment": {**one["environment"], "cpu": "another"}} for one in (row("full"), row(frame=80))]
    first, second = table_of(report.targets(rows))[3:]
    assert first[1:5] == ["el2n, on a processor", "10", "+1.00, 0 %", "+2.00, 0 %"]
    assert second[1:5] == ["el2n, on another", "10", "-10.00, 0 % (n 1)", "–"]


def test_what_is_far_below_full_data_does_not_flatten_the_picture(monkeypatch, tmp_path):
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(report, "save_picture", lambda fig, _: drawn.append(fig))
    report.figure([row("full", 0, 90, 100), row("full", 0, 80, 50, epochs=5), row("el2n", 0, 88, 60),
                   row("random", 0, 10, 60)], tmp_path / "figure")  # fmt: skip
    axes, = drawn[0].axes
    assert 70 < axes.get_ylim()[0] < 80 and {text.get_text() for text in axes.texts} == {"50 %", "50 % (at 10.0)"}


def test_page_and_picture_are_the_same_whenever_they_are_made(tmp_path):
    pytest.importorskip("matplotlib")
    new = {"selection": "dynamic", "rescore": "untrained", "full_end": 0, "stratify": False, "class_floor": 0}
    rows = [row("full", 0, 90, 100, **new), row("full", 0, 80, 50, epochs=5, **new), row("full", 1, 91, 100, **new),
            row("full", 1, 91, 150, lr=9e-4), row("el2n", 0, 91, 60, **new), row("el2n", 1, 90, 70, **new),
            row("infobatch", 1, 92, 80, **new | {"rescore": "none"}), row("full", 0, 9, 9, dataset="e")]  # fmt: skip
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("one", "two"):
        assert report.main([str(tmp_path / "results.jsonl"), "--to", str(tmp_path / name)]) == 0
    made = {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()}
    assert set(made) == {"results.md", "figure.svg", "figure.png"}
    assert report.table(rows) in made["results.md"].decode()
    for name in ("figure.svg", "figure.png"):
        assert made[name] == (tmp_path / "two" / name).read_bytes()
    assert made["figure.png"].startswith(b"\x89PNG") and b"full data, fewer epochs" in made["figure.svg"]
    for drawn in (b"<!-- el2n -->", b"<!-- infobatch -->", b"r = 50 %", b"e (n = 1)"):
        assert drawn in made["figure.svg"]


def test_without_matplotlib_there_is_the_page_and_a_word_about_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "results.jsonl").write_text(json.dumps(row("full")))
    assert report.main([str(tmp_path / "results.jsonl"), "--to", str(tmp_path / "to")]) == 0
    assert "without pictures, which need matplotlib: pip install" in capsys.readouterr().out
    assert "figure.svg" not in (tmp_path / "to" / "results.md").read_text()
    assert [path.name for path in (tmp_path / "to").iterdir()] == ["results.md"]


@pytest.fixture
def pruned(tiny, tmp_path):
    """The folder of a small run on demo that has pruned."""
    made = train.run(train.parse(["--model", tiny, "--max-train", "300", "--epochs", "4", "--full-epochs", "1",
                                  "--no-model", "--out", str(tmp_path / "runs")]))  # fmt: skip
    return Path(made["folder"])


def test_the_highest_scores_are_shown_in_words(pruned, tmp_path, capsys):
    assert report.main([str(pruned), "--errors", "3"]) == 0
    lines = capsys.readouterr().out.splitlines()
    with np.load(pruned / "rounds" / "epoch-004.npz") as scored:
        best = np.argsort(-scored["scores"], kind="stable")[:3]
    examples = demo.generate()["train"]
    assert [int(line.split("|")[1]) for line in lines[4:]] == best.tolist() and "before epoch 4" in lines[0]
    for line, i in zip(lines[4:], best):
        assert line.split("|")[3].strip() == examples.labels[i]
        for word, tag in zip(examples.texts[i], examples.tags[i]):
            assert (word if tag == "O" else f"[{word}: {tag}]") in line


def test_what_was_kept_is_drawn(pruned, tmp_path):
    pytest.importorskip("matplotlib")
    assert report.main([str(pruned), "--to", str(tmp_path / "to")]) == 0
    assert {path.name for path in (tmp_path / "to").iterdir()} == {"likely_errors.md", "kept.svg", "kept.png"}


def test_a_run_without_scores_or_with_other_data_is_refused_in_one_line(pruned, capsys):
    config = json.loads((pruned / "config.json").read_text())
    config["args"]["max_train"] = 200
    (pruned / "config.json").write_text(json.dumps(config))
    assert report.main([str(pruned)]) == 2
    assert "has scores of 300 examples, and demo has 200: the data has changed" in capsys.readouterr().err
    (pruned / "rounds" / "epoch-004.npz").write_bytes(b"PK damaged")
    assert report.main([str(pruned)]) == 2
    assert "epoch-004.npz: no scores of a run" in capsys.readouterr().err
    shutil.rmtree(pruned / "rounds")
    assert report.main([str(pruned)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_without_a_test_split_dev_is_reported_and_said():
    """And both dev sets of MNLI."""
    mnli = row(dataset="mnli")
    del mnli["test"]
    mnli |= {"dev": {"accuracy": 80.0}, "dev_mismatched": {"accuracy": 81.0}}
    assert cells([mnli])[0][5] == "accuracy 80.00, accuracy (mismatched) 81.00"
    assert "On test (on dev: mnli) after the last epoch" in report.table([row(), mnli])
    assert "On test after the last epoch" in report.table([row()])


def test_machines_are_not_mixed():
    other = copy.deepcopy(row())
    other["environment"]["cpu"] = "another"
    assert len(cells([row(), other])) == 2
    assert cells([row("full", 0, 90, 100), other])[1][9] == "–"


def test_a_seed_that_was_run_twice_counts_once():
    (only,) = cells([row(frame=10), row(frame=90)])
    assert only[4] == "1" and "frame_acc 90.00" in only[5]


def test_lines_that_are_no_rows_are_skipped_and_said(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([json.dumps(row()), "{}", "5", json.dumps(row())[:50],
                               '{"args": {}, "test": {}, "seconds": {}, "environment": {}}']))
    assert report.main([str(path)]) == 0
    captured = capsys.readouterr()
    assert "| d | el2n |" in captured.out
    assert [line.split(":")[-2] for line in captured.err.splitlines()] == ["2", "3", "4", "5"]


@pytest.mark.parametrize("change", [
    {"test": {"frame_acc": float("nan")}}, {"test": {"frame_acc": 10**400}}, {"test": {"frame_acc": "90"}},
    {"seconds": {"total": 0}}, {"seconds": {"total": float("inf")}}, {"full_seconds": "100"}, {"full_seconds": -1},
    {"args": row()["args"] | {"epochs": 0}},
])  # fmt: skip
def test_rows_with_impossible_figures_are_skipped_and_said(tmp_path, capsys, change):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, [row(), {**row(seed=1), **change}, row(seed=2)])))
    assert [kept["args"]["seed"] for kept in report.read_rows([path])] == [0, 2]
    assert capsys.readouterr().err == f"warning: {path}:2: not a whole row; skipped\n"


def test_rows_with_other_metrics_are_not_mixed():
    other = {**row(seed=1), "test": {"accuracy": 80.0}}
    assert len(cells([row(), other])) == 2
    assert cells([row("full", 0, 90, 100), {**row(), "test": {"accuracy": 80.0}}])[1][9] == "–"


def test_a_torn_line_does_not_swallow_the_next_row(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    report.append_line(path, row(seed=0))
    path.write_bytes(path.read_bytes() + json.dumps(row(seed=1)).encode()[:-20])  # the machine went down
    report.append_line(path, row(seed=2))
    assert [kept["args"]["seed"] for kept in report.read_rows([path])] == [0, 2]
    assert ":2: not a whole row; skipped" in capsys.readouterr().err


def test_a_row_that_fits_only_in_part_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "results.jsonl"
    report.append_line(path, row())
    before, real = path.read_bytes(), open

    class AlmostFull:
        def __init__(self, *args, **options):
            self.file = real(*args, **options)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, line):
            return self.file.write(line[:10])

    monkeypatch.setattr("builtins.open", AlmostFull)
    with pytest.raises(OSError, match=r"results.jsonl: no space left for a whole line; none was added"):
        report.append_line(path, row())
    monkeypatch.undo()
    assert path.read_bytes() == before


def test_a_file_is_there_whole_or_as_it_was(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(KeyboardInterrupt), report.whole_file(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
    with report.whole_file(path) as file:
        file.write(b"after")
        assert path.read_text() == "before"
    assert path.read_text() == "after" and list(tmp_path.iterdir()) == [path]


def test_a_file_without_rows_is_said_in_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    assert report.main([str(tmp_path / "empty.jsonl")]) == 2
    assert capsys.readouterr().err == f"report.py: error: no rows in {tmp_path}/empty.jsonl; train.py adds one a run\n"


def test_a_file_that_is_absent_is_said_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "nope.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("changes", ["", " M train.py"])
def test_environment_says_whether_the_code_was_changed(monkeypatch, changes):
    monkeypatch.setattr(report.subprocess, "run",
                        lambda *_, **__: type("Result", (), {"returncode": 0, "stdout": changes}))
    assert report.environment("cpu")["dirty"] is bool(changes)


def test_the_readme_counts_the_lines_of_every_file():
    readme = (report.CHECKOUT / "README.md").read_text(encoding="utf-8")
    said = re.findall(r"^(\S+\.py) .*?(\d+)(?: lines)?$", readme, re.M)
    files = [*report.CHECKOUT.glob("*.py"), *report.CHECKOUT.glob("data/*.py")]
    count = {str(path.relative_to(report.CHECKOUT)): len(path.read_text("utf-8").splitlines()) for path in files}
    assert {name: int(lines) for name, lines in said} == count
    method = sum(count[f"{name}.py"] for name in ("train", "scoring", "pruning", "models"))
    assert f"is {method} lines, everything {sum(count.values()):,}." in readme


@pytest.mark.parametrize(("file", "folder"), [("main", "results"), ("forty", "results/forty")])
def test_page_and_readme_are_those_of_the_committed_rows(file, folder):
    """`python report.py results/main.jsonl --to results` would change nothing."""
    rows = report.read_rows([report.CHECKOUT / "results" / f"{file}.jsonl"])
    command = f"python report.py results/{file}.jsonl --to {folder}"
    assert report.page(rows, command) == (report.CHECKOUT / folder / "results.md").read_text(encoding="utf-8")
    assert report.targets(rows) in (report.CHECKOUT / "README.md").read_text(encoding="utf-8")
