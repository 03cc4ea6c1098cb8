"""Datasets by name: `load("snips", …)` returns their splits as flat arrays. See encoding.py for what is in them."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from . import demo, download
from .encoding import (
    DEFAULT_MODEL,
    IGNORE,
    LOST,
    Batch,
    ModelError,
    Split,
    batches,
    encode,
    load_tokenizer,
    number_names,
    sorted_batches,
)
from .parallel import rank
from .readers import (
    COLA_HEADER,
    TRAIN_AND_DEV,
    DataError,
    Examples,
    hold_out,
    read_atis,
    read_glue,
    read_massive,
    read_mrpc,
    read_mtop,
    read_own,
    read_snips,
)

__all__ = [
    "DATASETS", "DEFAULT_MODEL", "IGNORE", "LOST", "Batch", "DataError", "Dataset", "Examples", "ModelError", "Split",
    "batches", "encode", "find", "load", "load_tokenizer", "sorted_batches",
]  # fmt: skip


class Source(NamedTuple):
    """A dataset: how to read it, what it officially holds, and where it comes from."""

    reader: Callable  # folder -> {"train": Examples, "dev": …, "test": …}; dev or test may be absent
    folder: str | None  # below --data-dir; None: generated, so the reader takes no folder
    rows: tuple  # of each split, in the reader's order, as published
    labels: int | None  # intents or classes, over all splits; None: no figure is published
    slots: int | None  # slot types, likewise; 0 for classification
    files: list  # data.download.File
    licence: str
    metrics: tuple[str, ...] = ()  # of metrics.CLASSIFICATION, the main one first; none for intent and slots

    @property
    def classifies(self):
        """Whether its task is classification; else, intent and slots."""
        return self.slots == 0


def glue(task, rows, texts, known=("0", "1"), archive=None, metrics=("accuracy",), splits=TRAIN_AND_DEV, **table):
    """The Source of a GLUE task: `archive`.zip has a folder `task` with a .tsv file for each split."""
    reader = partial(read_glue, texts=texts, known=known, splits=splits, **table)
    address = f"{download.FAIR}/glue/data/{archive or task}.zip"
    files = [download.File(f"{file}.tsv", address, member=f"{task}/{file}.tsv") for file in splits.values()]
    return Source(reader, f"glue/{task}", rows, len(known), 0, files, "see GLUE", metrics)


ONE, TWO = ("sentence",), ("sentence1", "sentence2")
ENTAILMENT = ("entailment", "not_entailment")

# To add a dataset: write its reader in readers.py, name it here, and its files in download.py.
DATASETS = {
    "demo": Source(demo.generate, None, (4000, 500, 500), 7, 32, [], "MIT, as this program"),
    "snips": Source(read_snips, "snips", (13084, 700, 700), 7, 39, download.SNIPS, "CC0"),
    "atis": Source(read_atis, "atis", (4978, 893), 26, 83, download.ATIS, "not stated"),
    "mtop": Source(read_mtop, "mtop", (15667, 2235, 4386), None, None, download.MTOP, "CC BY-SA 4.0"),
    "slurp": Source(read_massive, "slurp", (11514, 2033, 2974), 60, 55, download.SLURP, "CC BY 4.0"),
    "cola": glue("CoLA", (8551, 1043), ONE, header=COLA_HEADER, metrics=("matthews", "accuracy")),
    "sst2": glue("SST-2", (67349, 872), ONE),
    "mrpc": Source(read_mrpc, "glue/MRPC", (3668, 408), 2, 0, download.MRPC, "see GLUE", ("accuracy", "f1")),
    "rte": glue("RTE", (2490, 277), TWO, ENTAILMENT),
    "wnli": glue("WNLI", (635, 71), TWO),
    "qnli": glue("QNLI", (104743, 5463), ("question", "sentence"), ENTAILMENT, archive="QNLIv2"),
    "qqp": glue("QQP", (363846, 40430), ("question1", "question2"), archive="QQP-clean", label="is_duplicate",
                metrics=("accuracy", "f1")),
    "mnli": glue("MNLI", (392702, 9815, 9832), TWO, ("contradiction", "entailment", "neutral"), label="gold_label",
                 splits={"train": "train", "dev": "dev_matched", "dev_mismatched": "dev_mismatched"}),
}  # fmt: skip


@dataclass
class Dataset:
    """Encoded splits and the names behind their ids; heads have n_labels and n_tags outputs."""

    name: str
    train: Split
    evaluation: dict[str, Split]  # "dev" and, where there are any, "test" and "dev_mismatched"
    labels: list[str]  # intents, or classes; those that train has come first
    n_labels: int  # how many labels train has
    tags: list[str]  # slot tags, likewise; empty for classification
    n_tags: int
    pairs: bool = False  # whether texts are pairs of strings
    metrics: tuple[str, ...] = ("accuracy",)  # of classification

    @property
    def splits(self):
        """All splits by name, train first."""
        return {"train": self.train, **self.evaluation}

    def to(self, device):
        """Move all arrays to `device`."""
        self.train = self.train.to(device)
        self.evaluation = {name: split.to(device) for name, split in self.evaluation.items()}


def default_folder():
    """$DATA_DIR, or data/raw in this checkout."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parent / "raw")


def find(name, folder=None):
    """(Source, folder of its files) of a dataset by name, or of a folder of the user's. DataError where it is neither.

    folder: the one above, --data-dir.
    """
    if name in DATASETS:
        source = DATASETS[name]
        return source, source.folder and Path(folder or default_folder()) / source.folder
    if os.path.isdir(name):
        slots = None if os.path.isdir(os.path.join(name, "train")) else 0  # a table has classes, a folder tagged words
        return Source(read_own, name, (), None, slots, [], "the user's", ("accuracy",)), Path(name)
    raise DataError(f"unknown dataset {name!r} (choose from {', '.join(DATASETS)}, or name a folder of your own)")


def fetch(name, folder=None):
    """Download the files of a dataset that are not on disk. DataError where that fails."""
    source, path = find(name, folder)

    def check(downloaded):
        difference = unofficial(source, source.reader(downloaded))
        if difference and not all(file.sha256 for file in source.files):
            raise DataError(f"what was downloaded has {difference}")

    if source.files:
        download.fetch(name, path, source.files, check, source.licence)


def unofficial(source, splits):
    """The numbers in which splits differ from the official ones, as text; "" where there is no difference."""
    tags = {tag for examples in splits.values() for row in examples.tags or () for tag in row}
    counts = {
        f"rows of {', '.join(splits)}": (tuple(map(len, splits.values())), source.rows),
        "labels": (len({label for examples in splits.values() for label in examples.labels}), source.labels),
        "slot types": (len({tag[2:] for tag in tags - {"O"}}), source.slots),
    }
    return "; ".join(f"{got} {what}, officially {wanted}" for what, (got, wanted) in counts.items()
                     if wanted not in (got, None))  # fmt: skip


def read(name, folder=None):
    """The raw text of a dataset, downloaded first where files are absent. DataError: not to be had, or damaged.

    Returns {"train": Examples, "dev": …} and "test" where there is one. Where there is no dev split, a fixed tenth of
    train is held out for it.
    """
    source, path = find(name, folder)
    fetch(name, folder)
    splits = source.reader(path) if path else source.reader()
    if source.files and rank() == 0 and (difference := unofficial(source, splits)):
        print(f"warning: {path}: {difference}; results will not compare with others'", file=sys.stderr)
    if "dev" not in splits:
        published = len(splits["train"])
        if published < 2:
            raise DataError(f"{path}: no dev split, and one train example cannot be split; two or more were expected")
        splits["train"], splits["dev"] = hold_out(splits["train"], share=0.1)
        print(f"{name}: no dev split; {len(splits['dev'])} of its {published} train examples are held out for that")
    return {split: splits[split] for split in ("train", "dev", "dev_mismatched", "test") if split in splits}


def load(name, tokenizer, folder=None, max_length=256, max_train=None):
    """Read a dataset, number its labels and tags, and encode it.

    name: of DATASETS, or a folder of the user's. tokenizer: a fast Hugging Face tokenizer. max_length: tokens an
    example, special ones included. max_train: keep only the first that many train examples. Returns a Dataset.
    DataError as for `read`.
    """
    splits = read(name, folder)
    train = splits.pop("train")
    if max_train is not None:
        train = train.take(range(min(max_train, len(train))))
    label_ids, n_labels = number_names(train.labels, chain.from_iterable(e.labels for e in splits.values()))
    tag_ids, n_tags = {}, 0
    if train.tags is not None:
        others = chain.from_iterable(examples.tags for examples in splits.values())
        tag_ids, n_tags = number_names(chain.from_iterable(train.tags), chain.from_iterable(others))
        if len(tag_ids) >= 2**15:
            raise DataError(f"{name}: {len(tag_ids)} slot tags; fewer than {2**15} were expected")

    def encoded(examples, words=True):
        return encode(examples, tokenizer, max_length, label_ids, tag_ids, words)

    data = Dataset(name, encoded(train, words=False), {split: encoded(examples) for split, examples in splits.items()},
                   list(label_ids), n_labels, list(tag_ids), n_tags, train.pairs, find(name, folder)[0].metrics)
    if rank() == 0:
        for note in oddities(data, max_length):
            print(f"{name}: {note}", flush=True)
    return data


def oddities(data, max_length):
    """Yield what a user may not expect of a dataset that is fit for use, as text."""
    if data.n_labels == 1 and not data.tags:
        yield f"all train examples have the label {data.labels[0]!r}: there is nothing to tell apart"
    for name, split in data.splits.items():
        unseen = (split.labels >= data.n_labels).sum().item()
        if unseen:
            yield f"{unseen} of {len(split)} {name} examples have a label that train lacks: they count as errors"
        if split.cut:
            yield f"{split.cut} of {len(split)} {name} examples are cut off after {max_length} tokens"
