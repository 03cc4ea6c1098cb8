"""The table compares only what is comparable, and damaged rows neither stop it nor slip through."""

import copy
import json

import pytest

import report


def row(method="el2n", seed=0, frame=90.0, seconds=60.0, **args):
    return {
        "args": {"dataset": "d", "method": method, "keep": 1.0 if method == "full" else 0.5, "seed": seed, "lr": 1e-4,
                 "full_epochs": 2, "out": "runs", "no_model": True, "data_dir": None, **args},
        "environment": {"device": "cpu", "cpu": "a processor", "threads": 2, "torch": "2", "transformers": "5"},
        "test": {"intent_acc": 99.0, "frame_acc": frame}, "seconds": {"total": seconds},
    }  # fmt: skip


def cells(rows):
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in report.table(rows).splitlines()[2:-2]]


def test_runs_are_compared_with_the_full_run_of_their_seed():
    rows = [row("full", 0, 90, 100), row("full", 1, 92, 200), row("el2n", 0, 91, 60), row("el2n", 1, 91, 100)]
    full, el2n = cells(rows)
    assert full[3:] == ["2", "intent_acc 99.00 ± 0.00, frame_acc 91.00 ± 1.41", "–", "150 ± 71", "–"]
    assert el2n[5:] == ["frame_acc 0.00 ± 1.41", "80 ± 28", "45.0 ± 7.1"]  # +1 and −1; 40 % and 50 %


def test_a_full_run_serves_every_pruning_schedule_but_no_other_training():
    assert cells([row("full", 0, 90, 100), row(full_epochs=4)])[1][7] == "40.0"
    assert cells([row("full", 0, 90, 100), row(lr=2e-4)])[1][7] == "–"
    assert cells([row("full", 0, 90, 100), row(seed=1)])[1][7] == "–"
    assert cells([row("full", 0, 90, 100), row(seed=0), row(seed=1)])[1][7] == "–"  # not of all n seeds


def test_rows_say_in_which_flags_they_differ():
    assert [line[1] for line in cells([row(), row(lr=2e-4)])] == ["el2n, lr 0.0001", "el2n, lr 0.0002"]
    assert len(cells([row("full"), row("full", seed=1, full_epochs=4)])) == 1  # which does not matter to a full run


def test_machines_are_not_mixed():
    other = copy.deepcopy(row())
    other["environment"]["cpu"] = "another"
    assert len(cells([row(), other])) == 2
    assert cells([row("full", 0, 90, 100), other])[1][7] == "–"


def test_a_seed_that_was_run_twice_counts_once():
    (only,) = cells([row(frame=10), row(frame=90)])
    assert only[3] == "1" and "frame_acc 90.00" in only[4]


def test_lines_that_are_no_rows_are_skipped_and_said(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join([json.dumps(row()), "{}", "5", json.dumps(row())[:50],
                               '{"args": {}, "test": {}, "seconds": {}, "environment": {}}']))
    assert report.main([str(path)]) == 0
    captured = capsys.readouterr()
    assert "| d | el2n |" in captured.out
    assert [line.split(":")[-2] for line in captured.err.splitlines()] == ["2", "3", "4", "5"]


def test_a_file_that_is_absent_is_said_in_one_line(tmp_path, capsys):
    assert report.main([str(tmp_path / "nope.jsonl")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("changes", ["", " M train.py"])
def test_environment_says_whether_the_code_was_changed(monkeypatch, changes):
    monkeypatch.setattr(report.subprocess, "run",
                        lambda *_, **__: type("Result", (), {"returncode": 0, "stdout": changes}))
    assert report.environment("cpu")["dirty"] is bool(changes)


def test_the_readme_shows_the_table_of_the_committed_rows():
    rows = report.read_rows([report.CHECKOUT / "results" / "main.jsonl"])
    assert report.table(rows) in (report.CHECKOUT / "README.md").read_text(encoding="utf-8")
