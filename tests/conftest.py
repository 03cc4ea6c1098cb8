"""Fixtures: a tiny BERT with random weights, so that whole runs take seconds, and the raw data where it is at hand."""

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
from models import NLUModel

download.PAUSE = 0  # no test waits before another attempt

SHARED = Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(autouse=True)
def products_as_they_come():
    """A run chooses who computes products for the whole process: the next test starts as PyTorch does."""
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
                        num_attention_heads=2, intermediate_size=128, max_position_embeddings=128)
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
    return NLUModel.build(tiny, tokenizer, demo_data, seed=0)


@pytest.fixture
def one_thread():
    """For tiny models: threads would mostly wait for each other, very long where other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


# ---- raw files of every dataset's shape

GLUE = ("cola", "sst2", "mrpc", "rte", "wnli", "qnli", "qqp", "mnli")
# Rows of each split that make_raw writes. Of ATIS, nothing has a dev split; of GLUE, no test split has labels.
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

    Returns {split: [(words, tags, label), …]}; the labels of GLUE take turns instead.
    """
    examples = demo.generate()["train"]
    rows = zip(examples.texts, examples.tags, examples.labels)
    splits = {split: list(islice(rows, n)) for split, n in ROWS[name].items()}
    write = {"snips": snips_files, "atis": atis_files, "mtop": mtop_files, "slurp": slurp_files}.get(name, glue_files)
    for path, lines in write(name, splits).items():
        path = root / DATASETS[name].folder / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(("\n".join(lines) + "\n").encode())
    return splits


def snips_files(_, splits):
    files = {}
    for split, rows in splits.items():
        words, tags, labels = zip(*rows)
        files |= {f"{split}/seq.in": map(" ".join, words), f"{split}/seq.out": map(" ".join, tags),
                  f"{split}/label": labels}  # fmt: skip
    return files


def atis_files(_, splits):
    rows = [row for split in splits.values() for row in split]
    names = {
        "vocab": sorted({"BOS", "EOS"}.union(*(words for words, _, _ in rows))),
        "slots": sorted({"O"}.union(*(tags for _, tags, _ in rows))),
        "intent": sorted({label for _, _, label in rows}),
    }
    files = {f"atis.dict.{kind}.csv": column for kind, column in names.items()}
    for split, rows in splits.items():
        cells = {"query": [["BOS", *words, "EOS"] for words, _, _ in rows],
                 "slots": [["O", *tags, "O"] for _, tags, _ in rows],
                 "intent": [[label] for _, _, label in rows]}  # fmt: skip
        for kind, column in cells.items():
            known = names["vocab" if kind == "query" else kind]
            files[f"atis.{split}.{kind}.csv"] = [" ".join(str(known.index(x)) for x in row) for row in column]
    return files


def slots_of(tags):
    """[(first word, last word + 1, name)] in order."""
    return sorted(spans(tags))


def mtop_files(_, splits):
    def line(words, tags, label):
        text, starts = " ".join(words), [len(" ".join([*words[:i], ""]).encode()) for i in range(len(words))]
        ends = [start + len(word.encode()) for start, word in zip(starts, words)]
        slots = ",".join(f"{starts[a]}:{ends[b - 1]}:SL:{name}" for a, b, name in slots_of(tags))
        places = [{"start": start, "length": end - start} for start, end in zip(starts, ends)]
        tokens = json.dumps({"tokens": words, "tokenSpans": places}, ensure_ascii=False)
        return "\t".join(["id", f"IN:{label}", slots, text, "domain", "en_XX", f"[IN:{label} ]", tokens])

    files = {"train": "train", "dev": "eval", "test": "test"}
    return {f"mtop/en/{files[split]}.txt": [line(*row) for row in rows] for split, rows in splits.items()}


def slurp_files(_, splits):
    def line(split, words, tags, label):
        marked = list(words)
        for a, b, name in slots_of(tags):
            marked[a] = f"[{name} : {marked[a]}"
            marked[b - 1] += "]"
        return json.dumps({"id": "0", "partition": split, "intent": label, "utt": " ".join(words),
                           "annot_utt": " ".join(marked)})  # fmt: skip

    return {"1.0/data/en-US.jsonl": [line(split, *row) for split, rows in splits.items() for row in rows]}


def glue_texts(words):
    """The one or two texts that glue_files makes of an utterance: the first begins with a quote that is no quoting."""
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
