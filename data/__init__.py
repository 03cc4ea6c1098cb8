"""Load datasets by name: load("snips", …) returns their splits as flat arrays, which encoding.py describes."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from errors import expect

from . import demo, download, readers
from .encoding import DEFAULT_MODEL, IGNORE, Batch, Split, batches, encode, load_tokenizer, pretrained, sorted_batches
from .samples import Sample, digest, hold_out, subset, without_breaks


class Source(NamedTuple):
    """A dataset: how to read it, and what it officially holds."""

    reader: Callable  # folder -> {"train": samples, "dev": …, "test": …}; dev or test may be absent
    folder: str | None  # below --data-dir; None: generated
    rows: tuple[int, ...]  # of each split, in the reader's order, as published
    licence: str
    metrics: tuple[str, ...] = ()  # of metrics.CLASSIFICATION, the main one first; none for intent and slots


def glue(task, rows, texts, known=("0", "1"), metrics=("accuracy",), **options):
    """Return the Source of a GLUE task. options: of `readers.read_glue`."""
    reader = partial(readers.read_glue, texts=texts, known=known, **options)
    return Source(reader, f"glue/{task}", rows, "see GLUE", metrics)


# To add a dataset: write its reader in readers.py, name it here, and list its files in sources.txt.
TWO = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
DATASETS = {
    "demo": Source(demo.generate, None, (1000, 250, 250), "MIT, as this program"),
    "snips": Source(readers.read_own, "snips", (13084, 700, 700), "CC0"),
    "atis": Source(readers.read_atis, "atis", (4978, 893), "not stated"),
    "mtop": Source(readers.read_mtop, "mtop", (15667, 2235, 4386), "CC BY-SA 4.0"),
    "slurp": Source(readers.read_massive, "slurp", (11514, 2033, 2974), "CC BY 4.0"),
    "cola": glue("CoLA", (8551, 1043), ("sentence",), metrics=("matthews", "accuracy"), header=readers.COLA_HEADER),
    "sst2": glue("SST-2", (67349, 872), ("sentence",)),
    "mrpc": Source(readers.read_mrpc, "glue/MRPC", (3668, 408), "see GLUE", ("accuracy", "f1")),
    "rte": glue("RTE", (2490, 277), TWO, ENTAILMENT),
    "wnli": glue("WNLI", (635, 71), TWO),
    "qnli": glue("QNLI", (104743, 5463), ("question", "sentence"), ENTAILMENT),
    "qqp": glue("QQP", (363846, 40430), ("question1", "question2"), metrics=("accuracy", "f1"), label="is_duplicate"),
    "mnli": glue("MNLI", (392702, 9815, 9832), TWO, ("contradiction", "entailment", "neutral"), label="gold_label",
                 splits={"train": "train", "dev": "dev_matched", "dev_mismatched": "dev_mismatched"}),
}  # fmt: skip
FILES = download.read_sources()


@dataclass
class Dataset:
    """Encoded splits, and the names behind the ids of labels and tags. All names occur in train."""

    name: str
    train: Split
    evaluation: dict[str, Split]  # "dev" and, where there are any, "test" and "dev_mismatched"
    gold: dict[str, list[Sample]]  # the samples of `evaluation`
    labels: list[str]  # intents or classes
    tags: list[str]  # slot tags; empty for classification
    pairs: bool = False  # whether texts are pairs of strings
    metrics: tuple[str, ...] = ("accuracy",)  # of classification
    digest: str = ""  # of all samples as text

    @property
    def splits(self):
        """All splits by name, train first."""
        return {"train": self.train, **self.evaluation}

    def to(self, device):
        """Move all arrays to `device`."""
        self.train = self.train.to(device)
        self.evaluation = {name: split.to(device) for name, split in self.evaluation.items()}


def default_folder():
    """Return $DATA_DIR, or data/raw in this checkout."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parent / "raw")


def find(name, folder=None):
    """Return (Source, folder of its files) of a dataset, by its name or by a folder of the user's. Raises UserError.

    folder: --data-dir, which has the folders of all datasets.
    """
    if name in DATASETS:
        source = DATASETS[name]
        return source, source.folder and Path(folder or default_folder()) / source.folder
    expect(os.path.isdir(name), f"unknown dataset {name!r}", f"choose from {', '.join(DATASETS)}, or your own folder")
    expect(os.access(name, os.R_OK | os.X_OK), name, "this folder cannot be read; change its permissions")
    return Source(readers.read_own, name, (), "the user's", () if readers.has_tags(name) else ("accuracy",)), Path(name)


def read(name, folder=None, max_train=None, tune=False):
    """Return {"train": samples, "dev": …}, and "test" where there is one. Raises UserError.

    Absent files are downloaded. A split is left out if train has none of its labels. A fixed tenth of train is held out
    where there is no dev split. max_train: keep that many train samples, drawn at random, the same for every seed.
    tune: hold out a tenth of train, and leave out all other splits.
    """
    source, path = find(name, folder)
    download.fetch(name, source, path, FILES.get(name, ()))
    splits = source.reader(path)
    rows = tuple(map(len, splits.values()))
    if name in FILES and rows != source.rows:
        print(f"warning: {path}: {rows} rows, officially {source.rows}; results will not compare")
    expect(all(rows), path, f"{', '.join(splits)} have {rows} samples; one or more was expected")
    if tune:
        splits = {"train": splits["train"]}
    known = {sample.label for sample in splits["train"]}
    for split in [s for s in splits if known.isdisjoint(sample.label for sample in splits[s])]:
        print(f"warning: {name}: {split} is left out, because train has none of its labels")
        del splits[split]
    if "dev" not in splits:
        n = len(splits["train"])
        splits["train"], splits["dev"] = hold_out(splits["train"], share=0.1)
        expect(len(splits["dev"]), path, "no dev split, and a single train sample cannot be divided; add samples")
        print(f"{name}: {len(splits['dev'])} of {n} train samples are held out as dev")
    if max_train is not None:
        splits["train"] = subset(splits["train"], max_train)
    return {split: splits[split] for split in ("train", "dev", "dev_mismatched", "test") if split in splits}


def load(name, tokenizer, folder=None, max_length=256, max_train=None, tune=False):
    """Read a dataset, number the labels and tags of train, and encode it. Returns a Dataset. Raises UserError.

    name: of DATASETS, or a folder of the user's. tokenizer: a fast Hugging Face tokenizer. max_length: tokens a sample,
    special ones included. max_train, tune: as for `read`.
    """
    samples = read(name, folder, max_train, tune)
    train = samples["train"]
    labels = sorted({sample.label for sample in train})
    tags = sorted({tag for sample in train for tag in sample.tags or ()})
    label_ids, tag_ids = ({name: i for i, name in enumerate(names)} for names in (labels, tags))
    splits = {split: encode(own, tokenizer, max_length, label_ids, tag_ids) for split, own in samples.items()}
    gold = {split: own for split, own in samples.items() if split != "train"}
    data = Dataset(name, splits.pop("train"), splits, gold, labels, tags, isinstance(train[0].text, tuple),
                   find(name, folder)[0].metrics, digest(samples))  # fmt: skip
    for warning in data_warnings(data, max_length):
        print(f"{name}: {warning}", flush=True)
    return data


def data_warnings(data, max_length):
    """Yield what a user may not expect of a dataset, as text."""
    if len(data.labels) == 1 and not data.tags:
        yield f"all train samples have the label {data.labels[0]!r}: there is nothing to tell apart"
    for name, split in data.splits.items():
        if unseen := (split.labels == len(data.labels)).sum():
            yield f"{unseen} of {len(split)} {name} samples have a label that train lacks: they count as errors"
        if data.tags and (unseen := (split.tags == len(data.tags)).sum()):
            yield f"{unseen} {name} words have a tag that train lacks: they count as errors"
        if split.truncated:
            yield f"{split.truncated} of {len(split)} {name} samples are cut off after {max_length} tokens"
