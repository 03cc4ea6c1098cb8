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
from itertools import count, cycle, islice
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
from data import DATASETS, demo, download, load, load_tokenizer
from metrics import spans
from models import build_model

download.PAUSE = 0  # no test waits before another attempt

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
    """Folder of the tiny BERT."""
    return tiny_bert(tmp_path_factory.mktemp("tiny"))


def tiny_bert(folder):
    """Write a two-layer BERT with random weights and a vocabulary of letters and a few hundred demo words."""
    texts = demo.generate()["train"].texts
    letters = sorted({letter for words in texts for word in words for letter in word})
    words = sorted({word for words in texts[:1500] for word in words})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *letters, *("##" + letter for letter in letters), *words]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
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
def one_thread():
    """Use one thread: in a tiny model, threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@cache
def demo_rows(split, size):
    """Return the first (words, tags, label) of a split of demo, as a list."""
    samples = demo.generate()[split]
    return list(islice(zip(samples.texts, samples.tags, samples.labels), size))


@contextmanager
def one_line(error, message="."):
    """Expect an error of one short line that matches `message`."""
    with pytest.raises(error, match=message) as caught:
        yield
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


# ---- small runs


@cache
def data_folder(model):
    """Write a little of demo as a dataset of one's own, beside the files of the tiny model. Returns its folder."""
    splits = {split: demo_rows(split, size) for split, size in (("train", 64), ("dev", 24), ("test", 24))}
    return write(Path(model) / "data", snips_files("snips", splits))


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


def free_port():
    """Return the number of a port that nobody uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


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

GLUE = ("cola", "sst2", "mrpc", "rte", "wnli", "qnli", "qqp", "mnli")
# Rows of each split that make_raw writes. ATIS has no dev split, and GLUE no test split with labels.
ROWS = {name: {"train": 60, "dev": 10, "test": 10} for name in ("snips", "atis", "mtop", "slurp")}
ROWS |= {name: {"train": 60, "dev": 10} for name in GLUE}
ROWS["mnli"]["dev_mismatched"] = 10
del ROWS["atis"]["dev"]

LABELS = dict.fromkeys(GLUE, ("0", "1")) | dict.fromkeys(("rte", "qnli"), ("entailment", "not_entailment"))
LABELS["mnli"] = ("contradiction", "entailment", "neutral")

# The columns of GLUE's tables, and what glue_files puts there: texts a and b, the label y, ids i and j, or nothing.
COLUMNS = {
    "cola": "source:-|label:y|mark:-|sentence:a",
    "sst2": "sentence:a|label:y",
    "mrpc": "Quality:y|#1 ID:i|#2 ID:j|#1 String:a|#2 String:b",
    "rte": "index:i|sentence1:a|sentence2:b|label:y",
    "wnli": "index:i|sentence1:a|sentence2:b|label:y",
    "qnli": "index:i|question:a|sentence:b|label:y",
    "qqp": "id:i|qid1:i|qid2:j|question1:a|question2:b|is_duplicate:y",
    "mnli": "index:i|genre:-|sentence1_parse:-|sentence1:a|sentence2:b|label1:-|gold_label:y",
}


def make_raw(root, name):
    """Write small raw files of dataset `name` below `root`, as upstream lays them out, of demo's utterances.

    Returns {split: [(words, tags, label), …]}. In GLUE, the labels take turns instead.
    """
    rows = iter(demo_rows("train", 100))
    splits = {split: list(islice(rows, n)) for split, n in ROWS[name].items()}
    make = {"snips": snips_files, "atis": atis_files, "mtop": mtop_files, "slurp": slurp_files}.get(name, glue_files)
    write(root / DATASETS[name].folder, make(name, splits))
    return splits


def snips_files(_, splits):
    files = {}
    for split, rows in splits.items():
        words, tags, labels = zip(*rows)
        files[f"{split}/seq.in"] = map(" ".join, words)
        files[f"{split}/seq.out"] = map(" ".join, tags)
        files[f"{split}/label"] = labels
    return files


def atis_files(_, splits):
    columns, files = {"vocab": "query", "slots": "slots", "intent": "intent"}, {}
    framed = {split: [(["BOS", *words, "EOS"], ["O", *tags, "O"], [label]) for words, tags, label in rows]
              for split, rows in splits.items()}  # fmt: skip
    for i, (kind, column) in enumerate(columns.items()):
        known = sorted({name for rows in framed.values() for row in rows for name in row[i]})
        files[f"atis.dict.{kind}.csv"] = known
        for split, rows in framed.items():
            files[f"atis.{split}.{column}.csv"] = [" ".join(str(known.index(name)) for name in row[i]) for row in rows]
    return files


def mtop_files(_, splits):
    def line(words, tags, label):
        starts = [len(" ".join([*words[:i], ""]).encode()) for i in range(len(words))]
        ends = [start + len(word.encode()) for start, word in zip(starts, words)]
        slots = ",".join(f"{starts[a]}:{ends[b - 1]}:SL:{name}" for a, b, name in sorted(spans(tags)))
        places = [{"start": start, "length": end - start} for start, end in zip(starts, ends)]
        tokens = json.dumps({"tokens": words, "tokenSpans": places}, ensure_ascii=False)
        return "\t".join(["id", f"IN:{label}", slots, " ".join(words), "domain", "en_XX", f"[IN:{label} ]", tokens])

    files = {"train": "train", "dev": "eval", "test": "test"}
    return {f"mtop/en/{files[split]}.txt": [line(*row) for row in rows] for split, rows in splits.items()}


def slurp_files(_, splits):
    def line(split, words, tags, label):
        marked = list(words)
        for a, b, name in spans(tags):
            marked[a] = f"[{name} : {marked[a]}"
            marked[b - 1] += "]"
        row = {"partition": split, "intent": label, "utt": " ".join(words), "annot_utt": " ".join(marked)}
        return json.dumps({"id": "0", **row})

    return {"1.0/data/en-US.jsonl": [line(split, *row) for split, rows in splits.items() for row in rows]}


def glue_texts(words):
    """Return the two texts that glue_files makes of an utterance. The first begins with a quote that is text."""
    return '"' + " ".join(words), " ".join(words[1:]) or "x"


def glue_files(name, splits):
    header, kinds = zip(*(column.split(":") for column in COLUMNS[name].split("|")))
    number, tables = count(1000), {}
    for split, rows in splits.items():
        tables[split] = []
        for (words, _, _), label in zip(rows, cycle(LABELS[name])):
            cells = {"-": "-", "y": label, "i": str(next(number)), "j": str(next(number))}
            cells |= dict(zip("ab", glue_texts(words)))
            tables[split].append("\t".join(cells[kind] for kind in kinds))
    head = [] if name == "cola" else ["\t".join(header)]
    if name == "mrpc":
        ids = ["\t".join(row.split("\t")[1:3]) for row in tables["dev"]]
        table = ["\ufeff" + head[0], *tables["dev"], *tables["train"]]
        return {"msr_paraphrase_train.txt": table, "mrpc_dev_ids.tsv": ids}
    file = {"dev": "dev_matched"} if name == "mnli" else {}
    return {f"{file.get(split, split)}.tsv": [*head, *table] for split, table in tables.items()}
