"""Fixtures: a tiny BERT with random weights, so that whole runs take seconds, and raw data where it is at hand."""

import json
import os
from itertools import count, cycle, islice
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network
os.environ |= dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
os.environ["no_proxy"] = "127.0.0.1,localhost"

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from data import DATASETS, demo, download, load, load_tokenizer
from metrics import spans
from models import build_model

download.PAUSE = 0  # no test waits before another attempt

SHARED = Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")


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
    samples = demo.generate()["train"]
    rows = zip(samples.texts, samples.tags, samples.labels)
    splits = {split: list(islice(rows, n)) for split, n in ROWS[name].items()}
    write = {"snips": snips_files, "atis": atis_files, "mtop": mtop_files, "slurp": slurp_files}.get(name, glue_files)
    for file, lines in write(name, splits).items():
        path = root / DATASETS[name].folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(("\n".join(lines) + "\n").encode())
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
