"""The command line: what is refused, and that every flag changes a run."""

import copy
import subprocess
from dataclasses import replace
from itertools import pairwise

import pytest
from conftest import ROOT, data_folder, log_of, only_folder, refused, rounds_of, write
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import bench
import flags
import report
import runs
import train
from data import __main__ as downloads
from data import load
from models import build_model
from pruning import make_plan
from scoring import METHODS

BAD = [
    "--dataset nope", "--method nope", "--keep 0", "--keep 1", "--keep nan", "--keep half", "--epochs 0",
    "--epochs 2.5", "--full-epochs 0", "--epochs 10 --full-epochs 10", "--epochs 10 --full-epochs 5 --full-end 5",
    "--epochs 10 --selection static --full-end 10", "--full-end -1", "--class-floor -1", "--cycle 0", "--batch-size 0",
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


def test_the_help_can_be_printed():
    """A % in a help text would be an error."""
    assert "--keep" in flags.parser("").format_help()


def test_learning_rate_and_smoothing_depend_on_the_task():
    """The paper does not smooth scores of classification."""
    args = [flags.parse(["--dataset", name], "") for name in ("demo", "mtop", "rte", "sst2")]
    assert [one.lr for one in args] == [2e-4, 2e-4, 1e-4, 1e-4]
    assert [(one.ema, one.std_weight) for one in args] == [(0.8, 1.0)] * 2 + [(1.0, 0.0)] * 2


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


def test_run_all_chooses_no_rate_on_the_split_that_it_reports(tmp_path):
    """Without a test split that is dev. The runs that choose the rate must not get into the report's folder either."""
    write(tmp_path, {"own/train.csv": "text,label\n"})
    for dataset in ("cola", str(tmp_path / "own")):
        trials = run_all(DATASETS=dataset, SEEDS="0", OUT="runs/mine/")
        assert trials
        assert all("--tune" in trial and "runs/mine-tune/" in trial[trial.index("--out") + 1] for trial in trials)


def test_run_all_trains_own_data_for_40_epochs_in_the_papers_setting(tmp_path):
    """So it does without a test split, too. Only GLUE has 10."""
    write(tmp_path, {"own/train.csv": "text,label\n"})
    for dataset, epochs in ((str(tmp_path / "own"), "40"), ("snips", "40"), ("cola", "10")):
        commands = run_all(DATASETS=dataset, SEEDS="0", PAPER="1")
        assert max((command[command.index("--epochs") + 1] for command in commands), key=int) == epochs


@pytest.mark.parametrize("flag", ["--epochs=3", "--seed", "--lr", "--out"])
def test_run_all_refuses_flags_that_would_make_all_runs_alike(flag):
    with pytest.raises(subprocess.CalledProcessError):
        run_all(flag, "1")


# ---- the learning rate

COUNT = st.integers(1, 12).map(str)
VALUES = {"--epochs": COUNT, "--full-epochs": st.integers(0, 12).map(str), "--full-end": st.integers(0, 5).map(str),
          "--cycle": COUNT, "--selection": st.sampled_from(["static", "dynamic"]), "--sample": st.just(None),
          "--schedule": st.sampled_from(["linear", "constant"])}  # fmt: skip


@settings(max_examples=50)
@given(st.sampled_from(METHODS), st.fixed_dictionaries({}, optional=VALUES), st.integers(1, 5))
def test_the_learning_rate_stays_within_0_and_lr(method, given_flags, steps):
    """In each training it begins at lr. It is constant, or falls with every step."""
    line = [part for flag, value in given_flags.items() for part in (flag, value) if part is not None]
    try:
        args = flags.parse(["--method", method, *line], "")
    except SystemExit:
        assume(False)
    static = args.selection == "static"
    epochs = len(make_plan(args.epochs, args.full_epochs, args.cycle, args.full_end, static))
    rates = [train.learning_rate(args, step / steps) for step in range(epochs * steps)]
    cut = args.full_epochs * steps if static else 0
    for training in (rates[:cut], rates[cut:]):
        assert all(0 < rate <= args.lr for rate in training) and training[:1] in ([], [args.lr])
        falls = args.schedule == "linear"
        assert all(later < rate if falls else later == rate for rate, later in pairwise(training))


# ---- every flag changes the run, or is refused

MODES = ["full", "random", "el2n", "el2n --sample", "el2n --selection static", "loss",
         "forgetting", "grand", "infobatch"]  # fmt: skip
EFFECTS = {"--keep": "0.7", "--full-epochs": "3", "--cycle": "3", "--full-end": "2", "--selection": "static",
           "--ema": "0.4", "--std-weight": "5", "--offset": "0.2", "--stratify": None, "--class-floor": "2",
           "--rescore": "none", "--sample": None}  # fmt: skip


@pytest.fixture(scope="module")
def loaded(tiny, tokenizer):
    """40 samples and a model, for all runs of `quick`."""
    data = load(str(data_folder(tiny)), tokenizer, max_train=40)
    return data, build_model(tiny, tokenizer, data, seed=0)


@pytest.fixture
def quick(tiny, tokenizer, tmp_path, monkeypatch, one_thread, loaded):
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
