"""Load datasets by name: load("snips", …) returns their splits as flat arrays, which encoding.py describes."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from distributed import rank

from . import demo, download, own, readers

from .encoding import (  # isort: skip
    DEFAULT_MODEL, IGNORE, LOST, Batch, ModelError, Split, batches, encode, load_tokenizer, number_names, one_line,
    pretrained, sorted_batches,
)  # fmt: skip
from .samples import DataError, Samples, digest, expect, hold_out, subset

__all__ = [
    "DATASETS", "DEFAULT_MODEL", "IGNORE", "LOST", "Batch", "DataError", "Dataset", "ModelError", "Samples", "Split",
    "batches", "default_folder", "demo", "digest", "encode", "find", "load", "load_tokenizer", "one_line", "pretrained",
    "read", "sorted_batches",
]  # fmt: skip


class Source(NamedTuple):
    """A dataset: how to read it, and what it officially holds."""

    reader: Callable  # folder -> {"train": Samples, "dev": …, "test": …}; dev or test may be absent
    folder: str | None  # below --data-dir; None: generated, so the reader takes no folder
    rows: tuple[int, ...]  # of each split, in the reader's order, as published
    licence: str
    metrics: tuple[str, ...] = ()  # of metrics.CLASSIFICATION, the main one first; none for intent and slots

    @property
    def classifies(self):
        """Whether the task is classification; else it is intent and slots."""
        return bool(self.metrics)


def glue(task, rows, texts, known=("0", "1"), metrics=("accuracy",), **options):
    """Return the Source of a GLUE task. options: of `readers.read_glue`."""
    reader = partial(readers.read_glue, texts=texts, known=known, **options)
    return Source(reader, f"glue/{task}", rows, "see GLUE", metrics)


# To add a dataset: write its reader in readers.py, name it here, and list its files in sources.txt.
TWO = ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")
DATASETS = {
    "demo": Source(demo.generate, None, (4000, 500, 500), "MIT, as this program"),
    "snips": Source(own.read_own, "snips", (13084, 700, 700), "CC0"),
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
    """Encoded splits and the names behind their ids. Heads have n_labels and n_tags outputs."""

    name: str
    train: Split
    evaluation: dict[str, Split]  # "dev" and, where there are any, "test" and "dev_mismatched"
    labels: list[str]  # intents or classes; those of train come first
    n_labels: int  # how many labels train has
    tags: list[str]  # slot tags, likewise; empty for classification
    n_tags: int
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
    """Return (Source, folder of its files) of a dataset, by its name or by a folder of the user's. Raises DataError.

    folder: --data-dir, which has the folders of all datasets.
    """
    if name in DATASETS:
        source = DATASETS[name]
        return source, source.folder and Path(folder or default_folder()) / source.folder
    right = f"choose from {', '.join(DATASETS)}, or name your own folder"
    expect(os.path.isdir(name), f"unknown dataset {name!r}", right)
    return Source(own.read_own, name, (), "the user's", () if own.has_tags(name) else ("accuracy",)), Path(name)


def fetch(name, folder=None):
    """Download the files of a dataset that are not on disk. Raises DataError."""
    source, path = find(name, folder)

    def check(downloaded):
        rows = tuple(map(len, source.reader(downloaded).values()))
        expect(rows == source.rows, "the download", f"{rows} rows, officially {source.rows}")

    if name in FILES:
        download.fetch(name, path, FILES[name], check, source.licence)


def read(name, folder=None, max_train=None, tune=False):
    """Return {"train": Samples, "dev": …}, and "test" where there is one. Raises DataError.

    Absent files are downloaded. A split is left out if train has none of its labels. A fixed tenth of train is held out
    where there is no dev split. max_train: keep that many train samples, drawn at random, the same for every seed.
    tune: hold out a tenth of train, and leave out all other splits.
    """
    source, path = find(name, folder)
    fetch(name, folder)
    splits = source.reader(path) if path else source.reader()
    rows = tuple(map(len, splits.values()))
    if name in FILES and rows != source.rows and rank() == 0:
        print(f"warning: {path}: {rows} rows, officially {source.rows}; results will not compare", file=sys.stderr)
    expect(all(rows), path, f"{', '.join(splits)} have {rows} samples; one or more was expected")
    if tune:
        splits = {"train": splits["train"]}
    for split in [s for s in splits if set(splits["train"].labels).isdisjoint(splits[s].labels)]:
        print(f"{name}: {split} is left out, because train has none of its labels")
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
    """Read a dataset, number its labels and tags, and encode it. Returns a Dataset. Raises DataError and ModelError.

    name: of DATASETS, or a folder of the user's. tokenizer: a fast Hugging Face tokenizer. max_length: tokens a sample,
    special ones included. max_train, tune: as for `read`.
    """
    splits = read(name, folder, max_train, tune)
    content = digest(splits)
    train = splits.pop("train")
    label_ids, n_labels = number_names(train.labels, chain.from_iterable(e.labels for e in splits.values()))
    tag_ids, n_tags = {}, 0
    if train.tags is not None:
        others = chain.from_iterable(samples.tags for samples in splits.values())
        tag_ids, n_tags = number_names(chain.from_iterable(train.tags), chain.from_iterable(others))
        expect(len(tag_ids) < 2**15, name, f"{len(tag_ids)} slot tags; fewer than {2**15} were expected")

    def encoded(samples, words=True):
        return encode(samples, tokenizer, max_length, label_ids, tag_ids, words)

    data = Dataset(name, encoded(train, words=False), {split: encoded(samples) for split, samples in splits.items()},
                   list(label_ids), n_labels, list(tag_ids), n_tags, train.pairs, find(name, folder)[0].metrics,
                   content)
    for warning in data_warnings(data, max_length):
        print(f"{name}: {warning}", flush=True)
    return data


def data_warnings(data, max_length):
    """Yield what a user may not expect of a dataset, as text."""
    if data.n_labels == 1 and not data.tags:
        yield f"all train samples have the label {data.labels[0]!r}: there is nothing to tell apart"
    for name, split in data.splits.items():
        unseen = (split.labels >= data.n_labels).sum().item()
        if unseen:
            yield f"{unseen} of {len(split)} {name} samples have a label that train lacks: they count as errors"
        unseen = 0 if split.tags is None else (split.tags >= data.n_tags).sum().item()
        if unseen:
            yield f"{unseen} {name} words have a tag that train lacks: they count as errors"
        if split.truncated:
            yield f"{split.truncated} of {len(split)} {name} samples are cut off after {max_length} tokens"
