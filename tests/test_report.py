"""The table compares only what is comparable, and damaged rows neither stop it nor slip through."""

import copy
import json
import re

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


def test_without_a_test_split_dev_is_reported_and_said():
    """And both dev sets of MNLI."""
    mnli = row(dataset="mnli")
    del mnli["test"]
    mnli |= {"dev": {"accuracy": 80.0}, "dev_mismatched": {"accuracy": 81.0}}
    assert cells([mnli])[0][4] == "accuracy 80.00, accuracy (mismatched) 81.00"
    assert "On test (on dev: mnli) after the last epoch" in report.table([row(), mnli])
    assert "On test after the last epoch" in report.table([row()])


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


@pytest.mark.parametrize("change", [
    {"test": {"frame_acc": float("nan")}}, {"test": {"frame_acc": 10**400}}, {"test": {"frame_acc": "90"}},
    {"seconds": {"total": 0}}, {"seconds": {"total": float("inf")}},
])  # fmt: skip
def test_rows_with_impossible_figures_are_skipped_and_said(tmp_path, capsys, change):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, [row(), {**row(seed=1), **change}, row(seed=2)])))
    assert [kept["args"]["seed"] for kept in report.read_rows([path])] == [0, 2]
    assert capsys.readouterr().err == f"warning: {path}:2: not a whole row; skipped\n"


def test_rows_with_other_metrics_are_not_mixed():
    other = {**row(seed=1), "test": {"accuracy": 80.0}}
    assert len(cells([row(), other])) == 2
    assert cells([row("full", 0, 90, 100), {**row(), "test": {"accuracy": 80.0}}])[1][7] == "–"


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


def test_the_readme_shows_the_table_of_the_committed_rows():
    rows = report.read_rows([report.CHECKOUT / "results" / "main.jsonl"])
    assert report.table(rows) in (report.CHECKOUT / "README.md").read_text(encoding="utf-8")
