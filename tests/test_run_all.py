"""The script behind all results: its commands are valid, what is done is not done again, however it was stopped."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from train import parse

ROOT = Path(__file__).parents[1]


def script(*flags, **settings):
    path = f"{Path(os.sys.executable).parent}:{os.environ['PATH']}"  # `python` is the one that runs the tests
    return subprocess.Popen(["bash", str(ROOT / "run_all.sh"), *flags], stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, env={**os.environ, "PATH": path, **settings},
                            start_new_session=True)  # fmt: skip


def listed(*flags, **settings):
    return script("--list", *flags, **settings).communicate(timeout=60)[0].splitlines()


@pytest.mark.parametrize("settings", [{}, {"SMOKE": "1"}, {"PAPER": "1"}, {"EPOCHS": "40"},
                                      {"METHODS": "full grand", "EPOCHS": "3"}, {"DATASETS": "mnli"}])
@pytest.mark.parametrize("flags", [(), ("--lr", "1e-3")])
def test_it_lists_commands_that_are_valid_and_differ(settings, flags):
    commands = listed("--batch-size", "16", *flags, **settings)
    parsed = [vars(parse(command.split()[2:])) for command in commands]
    configurations = {json.dumps(config, sort_keys=True, default=str) for config in parsed}
    assert all(command.startswith("python train.py ") for command in commands)
    assert len(configurations) == len(commands) > 2
    assert all(config["resume"] == "auto" and config["batch_size"] == 16 for config in parsed)


def test_settings_choose_what_is_run():
    commands = listed(DATASETS="atis", METHODS="el2n full", KEEPS="0.4", SEEDS="7", EPOCHS="4", MODEL="m", OUT="o")
    wanted = ("--method full --epochs 4", "--method full --epochs 2", "--method full --epochs 2 --lr 4e-4",
              "--method full --epochs 1", "--method full --epochs 1 --lr 4e-4",
              "--method el2n --keep 0.4 --epochs 4", "--method el2n --keep 0.4 --epochs 4 --draw",
              "--method el2n --selection static --keep 0.4 --epochs 4")
    assert commands == [f"python train.py --dataset atis --seed 7 {flags} --model m --no-model --resume auto --out o "
                        for flags in wanted]  # fmt: skip


def test_savings_beyond_the_share():
    fifth, half = ({"DATASETS": "atis", "METHODS": "el2n", "KEEPS": keep, "SEEDS": "0"} for keep in ("0.2", "0.5"))
    assert "--method el2n --keep 0.2 --epochs 6 " in listed(**fifth)[2]
    assert "--method el2n --keep 0.5 --epochs 10 --cycle 4 " in listed(**half)[2]
    assert "--method el2n --keep 0.2 --epochs 10 --stratify " in listed(**fifth)[3]
    assert len(listed(**fifth, EPOCHS="3")) == 4  # 6/10 of 3 epochs would leave none to prune


def test_the_papers_setting():
    settings = {"PAPER": "1", "METHODS": "el2n", "KEEPS": "0.5", "SEEDS": "0"}
    common = {"model": "roberta-base", "lr": 2e-5, "schedule": "constant", "batch_size": 32, "clip": 1 / 32}
    joint = common | {"epochs": 40, "full_epochs": 4, "cycle": 4, "ema": 0.8, "std_weight": 1.0}
    glue = common | {"epochs": 10, "ema": 1.0, "std_weight": 0.0}
    for dataset, wanted in (("snips", joint), ("cola", glue)):
        commands = listed(DATASETS=dataset, **settings)
        dynamic, drawn, static = (vars(parse(command.split()[2:])) for command in commands)
        for config in (dynamic, static):
            assert {name: config[name] for name in wanted} == wanted and config["rescore"] == "all"
        assert drawn["draw"] and all(drawn[name] == wanted[name] for name in (*common, "epochs"))
        assert (drawn["full_epochs"], drawn["cycle"]) == (wanted.get("full_epochs", 2), 1)  # ours: anew every epoch


def test_the_papers_setting_with_other_epochs():
    (joint, *_), (glue, *_) = (
        [vars(parse(command.split()[2:])) for command in listed(PAPER="1", METHODS="el2n", KEEPS="0.5", SEEDS="0",
                                                                DATASETS=dataset, EPOCHS=epochs)]
        for dataset, epochs in (("snips", "20"), ("cola", "40")))  # fmt: skip
    assert (joint["full_epochs"], joint["cycle"], joint["epochs"]) == (4, 4, 20)
    assert (glue["ema"], glue["std_weight"], glue["epochs"]) == (1.0, 0.0, 40)


def test_40_epochs_have_the_papers_schedule():
    commands = listed(DATASETS="atis", METHODS="full el2n", KEEPS="0.5 0.2", SEEDS="0", EPOCHS="40")
    configs = [vars(parse(command.split()[2:])) for command in commands if "--method el2n" in command]
    assert len(configs) == 6 and {config["full_epochs"] for config in configs} == {4}
    assert [config["cycle"] for config in configs] == [4, 1, 4, 1, 4, 4]  # dynamic and drawn, for each share; static


def test_a_method_that_there_is_not_is_refused():
    process = script("--list", METHODS="full el2m")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 2 and said.count("\n") == 1 and "METHODS: el2m is none of" in said


def test_started_again_it_repeats_no_finished_run(tiny, tmp_path):
    """Terminated in its second of three runs, and started again, it ends with one row each, the table and the page."""
    settings = {"DATASETS": "demo", "METHODS": "random infobatch", "KEEPS": "0.5", "SEEDS": "0", "EPOCHS": "3",
                "MODEL": tiny, "OUT": str(tmp_path)}  # fmt: skip
    first = script("--max-train", "200", **settings)
    while not list(tmp_path.glob("demo-random-*/epochs.jsonl"))[1:]:
        assert first.poll() is None
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGTERM)
    first.communicate(timeout=60)
    finished = (tmp_path / "results.jsonl").read_text().splitlines()
    assert first.returncode != 0 and len(finished) in (1, 2)
    second = script("--max-train", "200", **settings)
    said, _ = second.communicate(timeout=120)
    rows = (tmp_path / "results.jsonl").read_text().splitlines()
    assert second.returncode == 0, said
    assert rows[: len(finished)] == finished and len(rows) == 3
    assert said.count("is finished: nothing is left to do") == len(finished)
    assert len({json.dumps({**json.loads(row)["args"], "out": ""}) for row in rows}) == 3
    assert "| demo | infobatch |" in (tmp_path / "report" / "results.md").read_text()


def test_a_run_that_fails_is_counted_and_the_others_go_on(tiny, tmp_path):
    settings = {"DATASETS": "demo", "METHODS": "infobatch", "SEEDS": "-1 0", "EPOCHS": "2", "MODEL": tiny}
    process = script("--max-train", "100", **settings, OUT=str(tmp_path))
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 1 and "--seed -1: must be from 0" in said and "1 run(s) failed" in said
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 1


@pytest.mark.parametrize(("failing", "count"), [("--seed 7", 1), ("report.py", 0), ("--seed", 2), ("", 2)])
def test_whatever_fails_the_runs_that_did_are_counted(tmp_path, failing, count):
    """With a `python` that only notes its arguments, and fails at one run, the report, all runs, or everything."""
    (tmp_path / "python").write_text(f"""#!/bin/sh
echo "$*" >> {tmp_path}/calls
case "$*" in *"{failing}"*) exit 2;; esac
""")
    (tmp_path / "python").chmod(0o755)
    process = script(PATH=f"{tmp_path}:{os.environ['PATH']}", DATASETS="demo", METHODS="infobatch", SEEDS="7 8")
    said, _ = process.communicate(timeout=60)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert ["--seed 7" in calls[0], "--seed 8" in calls[1], calls[2].split()[0]] == [True, True, "report.py"]
    assert said.startswith(f"run_all.sh: {count} run(s) failed") if count else not said
    assert process.returncode == (1 if count else 2)
