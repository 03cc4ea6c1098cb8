"""Fixtures and helpers: a tiny BERT, whole runs that take half a second, and raw files as upstream lays them out."""

import json
import multiprocessing
import os
import runpy
import socket
import sys
import time
from contextlib import contextmanager
from functools import cache
from itertools import count
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
os.environ["no_proxy"] = "127.0.0.1,localhost"

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

import train
from data import DATASETS, FILES, demo, download, load, load_tokenizer
from errors import UserError
from models import build_model

download.PAUSE = 0  # no test waits before another attempt
torch.set_num_threads(1)  # in a tiny model, threads would mostly wait for each other

ROOT = Path(__file__).parents[1]
SHARED = Path(os.environ.get("DATA_DIR") or ROOT.parent / "shared" / "data")
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))


@pytest.fixture(autouse=True)
def products_as_they_come():
    """Undo a run's choice of how products are computed, which holds for the whole process."""
    torch.set_float32_matmul_precision("highest")


@pytest.fixture(scope="session")
def raw():
    """Folder of the raw datasets."""
    if not (SHARED / "snips").is_dir():
        pytest.skip(f"no raw data in {SHARED} (set DATA_DIR)")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of a two-layer BERT with random weights and a vocabulary of letters and a few hundred demo words."""
    folder = tmp_path_factory.mktemp("tiny")
    words = sorted({word for sample in demo.generate()["train"][:400] for word in sample.text})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *letters, *("##" + letter for letter in letters), *words]))
    write(folder, {"vocab.txt": vocabulary})
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=128, max_position_embeddings=128)  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def demo_data(tokenizer):
    return load("demo", tokenizer)


@pytest.fixture
def model(tiny, tokenizer, demo_data):
    return build_model(tiny, tokenizer, demo_data, seed=0)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def write(folder, files):
    """Write {name: text, or lines without their ends} into a folder. Returns the folder."""
    for name, content in files.items():
        text = content if isinstance(content, str) else "".join(line + "\n" for line in content)
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    return folder


@contextmanager
def refused_with(message=".", error=UserError):
    """Expect an error of one short line that matches `message`."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


# ---- small runs


@cache
def data_folder(model):
    """Write a little of demo as a dataset of one's own, beside the files of the tiny model. Returns its folder."""
    folder, splits = Path(model) / "data", demo.generate()
    for split, size in (("train", 64), ("dev", 24), ("test", 24)):
        texts, labels, tags, _ = zip(*splits[split][:size])
        write(folder / split, {"seq.in": map(" ".join, texts), "seq.out": map(" ".join, tags), "label": labels})
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


def start_two(start, line):
    """Start two processes that share a run, with the variables that torchrun sets."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    return [start(line, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]


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
def command(tiny, tmp_path):
    """command("--keep", 0.3, …) → the arguments of a small run."""
    return lambda *flags, out="runs", model=tiny: small(model, tmp_path / out, *flags)


@pytest.fixture
def run(command):
    """run("--keep", 0.3, …) → the folder of such a run, which has finished."""

    def go(*flags, **where):
        line = command(*flags, **where)
        assert train.main(line) == 0
        return only_folder(line[line.index("--out") + 1])

    return go


@pytest.fixture(scope="session")
def whole(tiny, tmp_path_factory):
    """whole("--keep", 0.3, …) → the folder of such a run, which nothing happened to. It is made once."""

    @cache
    def go(*flags):
        out = tmp_path_factory.mktemp("whole")
        assert train.main(small(tiny, out, *flags)) == 0
        return only_folder(out)

    return go


def run_script(folder, log, arguments, before, environment):
    """Run train.py as a user does, from a folder and with some variables of the environment. log: of its output."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["train.py", *arguments]
    before()
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """start(arguments, RANK="0", …) → a process that runs train.py. It has another hash seed and another folder.

    before: a function that the process calls first.
    """
    folder, logs = tmp_path_factory.mktemp("elsewhere"), tmp_path_factory.mktemp("logs")
    context, numbers = multiprocessing.get_context("forkserver"), count()
    context.set_forkserver_preload(["conftest"])  # the slow imports are done once, for all processes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(map(str, (ROOT, ROOT / "tests"))))
        patch.setenv("PYTHONHASHSEED", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()

    def go(arguments, before=int, **environment):
        log = logs / str(next(numbers))
        process = context.Process(target=run_script, args=(folder, log, arguments, before, environment), daemon=True)
        process.log = log
        process.start()
        return process

    yield go
    assert not list(folder.iterdir()), "a run wrote to the current folder"


def ended(process):
    """Wait for a process. Returns its exit status, or minus the signal that killed it.

    With status 2, 130 or 143 it must have said why in one line, else nothing, and never with a traceback.
    """
    process.join(120)
    assert process.exitcode is not None, "a run hangs"
    log = process.log.read_text()
    lines = sum(line.startswith("train.py:") for line in log.splitlines())
    assert "Traceback" not in log and lines == (process.exitcode in (2, 130, 143)), log
    return process.exitcode


def await_checkpoint(process, out):
    """Wait until a process has saved a checkpoint below `out`."""
    while not list(out.glob("*/checkpoint.pt")):
        assert process.is_alive(), process.log.read_text()
        time.sleep(0.002)


# ---- raw files in every dataset's layout

# Two rows, which every dataset with slots has. A split has them as often as TIMES says.
ROWS = [("café à deux x", "O B-A I-A B-A", "buy"), ("at five am : now", "O B-time I-time O O", "wake")]
TIMES = {"train": 4, "dev": 3, "eval": 3, "dev_matched": 3, "dev_mismatched": 1, "test": 2}
MARKED = ["café [A : à deux] [A : x]", "at [ time : five  am ] : now"]  # the same rows in SLURP's notation


def table(*lines):
    """Return lines with tabs for bars."""
    return [line.replace("|", "\t") for line in lines]


RAW = {  # {dataset: {file: lines}}; of GLUE, a text begins with a quote that is text
    "snips": {f"SPLIT/{file}": lines for file, lines in zip(("seq.in", "seq.out", "label"), zip(*ROWS))},
    "atis": {
        "atis.SPLIT.query.csv": ["0 2 3 4 5 1", "0 6 7 8 9 10 1"],
        "atis.SPLIT.slots.csv": ["0 0 1 2 1 0", "0 0 3 4 0 0 0"],
        "atis.SPLIT.intent.csv": ["0", "1"],
        "atis.dict.vocab.csv": ["BOS", "EOS", "café", "à", "deux", "x", "at", "five", "am", ":", "now"],
        "atis.dict.slots.csv": ["O", "B-A", "I-A", "B-time", "I-time"],
        "atis.dict.intent.csv": ["buy", "wake"],
    },
    "mtop": {"mtop/en/SPLIT.txt": table(
        'id|IN:buy|6:13:SL:A,13:14:SL:A|café à deuxx|-|en_XX|-|{"tokens": ["café", "à", "deux", "x"], "tokenSpans": ['
        '{"start": 0, "length": 5}, {"start": 6, "length": 2}, {"start": 9, "length": 4}, {"start": 13, "length": 1}]}',
        'id|IN:wake|3:10:SL:time|at five am : now|-|en|-|{"tokens": ["at", "five", "am", ":", "now"], "tokenSpans": ['
        '{"start": 0, "length": 2}, {"start": 3, "length": 4}, {"start": 8, "length": 2}, {"start": 11, "length": 1}, '
        '{"start": 13, "length": 3}]}')},
    "slurp": {"1.0/data/en-US.jsonl": [
        json.dumps({"partition": split, "intent": label, "utt": text, "annot_utt": marked})
        for split in ("train", "dev", "test")
        for (text, _, label), marked in [*zip(ROWS, MARKED)] * TIMES[split]]},
    "cola": {"SPLIT.tsv": table('-|0|-|"a b', "-|1|*|c")},
    "sst2": {"SPLIT.tsv": table("sentence|label", '"a b|0', "c|1")},
    "mrpc": {
        "msr_paraphrase_train.txt": table("\ufeffQuality|#1 ID|#2 ID|#1 String|#2 String", *(
            line for i in range(7) for line in (f'0|{i}|50|"a b|d', f"1|{i}|60|c|"))),
        "mrpc_dev_ids.tsv": table(*(f"{i}|{j}" for i in range(3) for j in (50, 60))),
    },
    "rte": {"SPLIT.tsv": table("index|sentence1|sentence2|label", '0|"a b|d|entailment', "1|c||not_entailment")},
    "wnli": {"SPLIT.tsv": table("index|sentence1|sentence2|label", '0|"a b|d|0', "1|c||1")},
    "qnli": {"SPLIT.tsv": table("index|question|sentence|label", '0|"a b|d|entailment', "1|c||not_entailment")},
    "qqp": {"SPLIT.tsv": table("id|qid1|qid2|question1|question2|is_duplicate", '0|1|2|"a b|d|0', "3|4|5|c||1")},
    "mnli": {"SPLIT.tsv": table("index|sentence1_parse|sentence1|sentence2|label1|gold_label",
                                '0|-|"a b|d|-|entailment', "1|-|c||-|neutral")},
}  # fmt: skip


def make_raw(root, name):
    """Write small raw files of dataset `name` below `root`, as upstream lays them out."""
    wanted, files = {file.path for file in FILES[name]}, {}
    for path, lines in RAW[name].items():
        for split, times in TIMES.items() if "SPLIT" in path else [("", 1)]:
            files[path.replace("SPLIT", split)] = [*lines[:-2], *lines[-2:] * times]
    write(root / DATASETS[name].folder, {path: lines for path, lines in files.items() if path in wanted})
