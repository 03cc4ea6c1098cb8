"""The command line: what is refused, and that every flag changes a run."""

import copy
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT, data_folder, log_of, only_folder, refused, rounds_of, write

import bench
import flags
import report
import runs
import train
from data import __main__ as downloads
from data import load
from models import build_model

BAD = [
    "--dataset nope", "--method nope", "--keep 0", "--keep 1", "--keep nan", "--keep half", "--epochs 0",
    "--epochs 2.5", "--full-epochs 0", "--epochs 10 --full-epochs 10", "--epochs 10 --full-epochs 5 --full-end 5",
    "--epochs 10 --selection static --full-end 10", "--full-end -1", "--cycle 0", "--batch-size 0",
    "--offset 0.6", "--offset -0.1", "--ema 0", "--std-weight -1", "--lr 0", "--lr inf", "--clip 0", "--clip inf",
    "--seed -1", "--max-length 2", "--max-train 0", "--save-every 0", "--device meta", "--device nope", "--ep 3",
    "--keep 0.2 --method full", "--std-weight 2 --ema 1", "--epochs 2 --method infobatch",
]  # fmt: skip


@pytest.mark.parametrize("line", BAD)
def test_flags_that_make_no_sense_are_refused_by_name_in_one_line(line, capsys):
    assert line.split()[0] in refused(capsys, line.split())


@pytest.mark.parametrize("main", [bench.main, report.main, downloads.main])
def test_the_other_programs_refuse_a_wrong_flag_in_one_line_too(main, capsys):
    with pytest.raises(SystemExit) as refusal:
        main(["demo", "--nope"])
    error = capsys.readouterr().err
    assert refusal.value.code == 2 and "--nope" in error and error.count("\n") == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("command", ["-m data", "report.py results/base.jsonl"])
def test_a_program_that_cannot_print_says_so_in_one_line(command):
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, *command.split()], cwd=ROOT, env=buffered, stdout=full,
                              stderr=subprocess.PIPE)  # fmt: skip
    assert done.returncode == 2 and done.stderr.count(b"\n") == 1


def test_the_help_can_be_printed():
    """A % in a help text would be an error."""
    assert "--keep" in flags.parser("").format_help()


@pytest.mark.parametrize(("line", "wanted"), [
    ("", (10, 2e-4, 0.5, 2, 2, 0.8, 1.0, "all")), ("--dataset mtop", (10, 2e-4, 0.5, 2, 2, 0.8, 1.0, "all")),
    ("--sample", (10, 2e-4, 0.5, 2, 1, 1.0, 0.0, "none")),
    ("--selection static", (10, 2e-4, 0.5, 2, 2, 1.0, 0.0, "all")),
    # The paper does not smooth scores of classification.
    ("--dataset rte", (10, 1e-4, 0.5, 2, 2, 1.0, 0.0, "all")),
    ("--dataset sst2", (10, 1e-4, 0.5, 2, 2, 1.0, 0.0, "all")),
])  # fmt: skip
def test_the_defaults_are_those_of_the_readme(line, wanted):
    args = flags.parse(line.split(), "")
    got = args.epochs, args.lr, args.keep, args.full_epochs, args.cycle, args.ema, args.std_weight, args.rescore
    assert got == wanted


def run_all(*flags, **environment):
    """Return the commands that run_all.sh lists."""
    listed = subprocess.run(["bash", ROOT / "run_all.sh", "--list", *flags], capture_output=True, text=True, check=True,
                            env={"PATH": "/usr/bin:/bin", **environment})  # fmt: skip
    return [line.split() for line in listed.stdout.splitlines()]


@pytest.mark.parametrize("environment", [{}, {"SMOKE": "1"}, {"PAPER": "1"}])
def test_run_all_lists_commands_that_are_valid_and_differ(environment):
    commands = run_all(**environment)
    assert all(command[:2] == ["python", "train.py"] for command in commands)
    assert len({str(flags.parse(command[2:], "")) for command in commands}) == len(commands) > 2


@pytest.mark.parametrize(("dataset", "tunes", "epochs"), [("snips", False, 40), ("cola", True, 10), ("own", True, 40)])
def test_run_all_chooses_no_rate_on_the_split_that_it_reports(tmp_path, dataset, tunes, epochs):
    """GLUE reports dev, and own data may. In the paper's setting, only GLUE has 10 epochs. Texts have lower rates."""
    write(tmp_path, {"own/train.csv": "text,label\n"})
    name = str(tmp_path / "own") if dataset == "own" else dataset
    trials, paper = run_all(DATASETS=name, SEEDS="0", OUT="runs/mine/"), run_all(DATASETS=name, SEEDS="0", PAPER="1")
    tuned = {("--tune" in one, "runs/mine-tune/" in one[one.index("--out") + 1]) for one in trials}
    assert tuned == {(tunes, tunes)}
    assert max(int(one[one.index("--epochs") + 1]) for one in paper) == epochs
    rates = {float(one[one.index("--lr") + 1]) for one in trials}
    assert rates == ({2e-4, 4e-4} if dataset == "snips" else {1e-4, 2e-4})  # train.py's default and its double


@pytest.mark.parametrize("flag", ["--epochs=3", "--seed", "--lr", "--out", "--dataset", "--keep", "atis"])
def test_run_all_refuses_flags_that_would_make_all_runs_alike(flag):
    with pytest.raises(subprocess.CalledProcessError):
        run_all(flag, "1")


# ---- every flag changes the run, or is refused

MODES = ["full", "random", "el2n", "el2n --sample", "el2n --selection static", "loss",
         "forgetting", "grand", "infobatch"]  # fmt: skip
EFFECTS = {"--keep": "0.7", "--full-epochs": "3", "--cycle": "3", "--full-end": "2", "--selection": "static",
           "--ema": "0.4", "--std-weight": "5", "--offset": "0.2", "--stratify": None,
           "--rescore": "none", "--sample": None}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tiny, tokenizer):
    """40 samples and a model, for all runs of `quick`."""
    data = load(str(data_folder(tiny)), tokenizer, max_train=40)
    return data, build_model(tiny, tokenizer, data, seed=0)


@pytest.fixture
def quick(tiny, tokenizer, tmp_path, monkeypatch, loaded):
    """quick(line) → what a run of a few steps does, as a comparable value, or None where its flags are refused."""
    monkeypatch.setattr(train, "load_tokenizer", lambda _: tokenizer)
    monkeypatch.setattr(train, "load", lambda *_: replace(loaded[0]))
    monkeypatch.setattr(train, "build_model", lambda *_: copy.deepcopy(loaded[1]))
    monkeypatch.setattr(runs, "environment", lambda _: {})

    def go(line):
        out = tmp_path / line.replace(" ", "")
        try:
            assert train.main(["--model", tiny, "--dataset", str(data_folder(tiny)), "--epochs", "5", "--batch-size",
                               "10", "--no-model", "--save-every", "9", "--out", str(out), "--method",
                               *line.split()]) == 0  # fmt: skip
        except SystemExit as refusal:
            assert refusal.code == 2
            return None
        selections = [[x.tobytes() for x in arrays.values()] for arrays in rounds_of(only_folder(out)).values()]
        return [(line["kept"], line["loss"]) for line in log_of(only_folder(out))], selections

    return go


@pytest.mark.parametrize("mode", MODES)
def test_a_pruning_flag_changes_the_run_or_is_refused(quick, capsys, mode):
    """A change shows in scores, masks or losses."""
    plain, accepted = quick(mode), set()
    for flag, value in EFFECTS.items():
        if flag in mode:
            continue
        if mode == "el2n --sample" and flag == "--rescore":
            value = "all"  # none is its default
        got = quick(f"{mode} {flag} {value or ''}")
        assert got != plain, f"--method {mode} {flag} does nothing"
        if got:
            accepted.add(flag)
    assert ("--keep" in accepted) == (mode != "full")
    assert all(line.startswith("train.py: error") for line in capsys.readouterr().err.splitlines())
