"""Datasets by name: `load("snips", …)` returns three splits as flat arrays. See encoding.py for what is in them."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from . import demo
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
from .parallel import add_up, from_first, rank, share
from .readers import DataError, Examples, read_atis, read_snips

__all__ = [
    "DATASETS", "DEFAULT_MODEL", "IGNORE", "LOST", "Batch", "DataError", "Dataset", "Examples", "ModelError", "Split",
    "add_up", "batches", "encode", "from_first", "load", "load_tokenizer", "rank", "share", "sorted_batches",
]  # fmt: skip


class Source(NamedTuple):
    """Where a dataset comes from."""

    reader: Callable  # folder -> {"train": Examples, "dev": …, "test": …}
    rows: tuple[int, int, int]  # train, dev, test, as published (of ATIS, after dev was held out)
    fetch: str | None  # shell command that puts its files into {folder}; None: generated, so the reader takes no folder


# To add a dataset: write its reader in readers.py and name it here.
DATASETS = {
    "demo": Source(demo.generate, (4000, 500, 500), None),
    "snips": Source(read_snips, (13084, 700, 700),
        "for s in train dev test; do for f in seq.in seq.out label; do curl --create-dirs -fLo {folder}/$s/$f https://"
        "raw.githubusercontent.com/monologg/JointBERT/00324f60dda4a491b2913bc3065ae93966caea3f/data/snips/$s/$f; "
        "done; done"),
    "atis": Source(read_atis, (4480, 498, 893),
        "for f in dict.vocab dict.slots dict.intent train.query train.slots train.intent test.query test.slots "
        "test.intent; do curl --create-dirs -fLo {folder}/atis.$f.csv https://raw.githubusercontent.com/howl-anderson/"
        "ATIS_dataset/24ef702b745d6a62194e343f7c147f811ff79c01/data/raw_data/ms-cntk-atis/atis.$f.csv; done"),
}  # fmt: skip


@dataclass
class Dataset:
    """Three encoded splits and the names behind their ids; heads have n_labels and n_tags outputs."""

    name: str
    train: Split
    dev: Split
    test: Split
    labels: list[str]  # intents, or classes; those that train has come first
    n_labels: int  # how many labels train has
    tags: list[str]  # slot tags, likewise; empty for classification
    n_tags: int


def default_folder():
    """$DATA_DIR, or data/raw in this checkout."""
    return Path(os.environ.get("DATA_DIR") or Path(__file__).parent / "raw")


def read(name, folder=None):
    """The raw text of a dataset: {"train": Examples, "dev": …, "test": …}. DataError where it is absent or damaged."""
    if name not in DATASETS:
        raise DataError(f"unknown dataset {name!r} (choose from {', '.join(DATASETS)})")
    reader, official, fetch = DATASETS[name]
    if fetch is None:
        return reader()
    folder = Path(folder or default_folder()) / name
    if not folder.is_dir():
        raise DataError(f"{name}: no folder {folder}; get the files with `{fetch.format(folder=folder)}`, or say where "
                        "they are with --data-dir (the folder above) or DATA_DIR; --dataset demo needs no files")
    splits = reader(folder)
    rows = tuple(len(examples.labels) for examples in splits.values())
    if rows != official:
        print(f"warning: {folder}: {rows} train, dev and test rows, officially {official}; results will not compare "
              "with others'", file=sys.stderr)
    return splits


def load(name, tokenizer, folder=None, max_length=256, max_train=None):
    """Read a dataset, number its labels and tags, and encode it.

    tokenizer: a fast Hugging Face tokenizer. max_length: tokens an example, special ones included.
    max_train: keep only the first that many train examples. Returns a Dataset. DataError as for `read`.
    """
    splits = read(name, folder)
    train = splits["train"]
    if max_train is not None:
        train = splits["train"] = train.take(range(min(max_train, len(train.labels))))
    label_ids, n_labels = number_names(train.labels, chain(splits["dev"].labels, splits["test"].labels))
    tag_ids, n_tags = {}, 0
    if train.tags is not None:
        others = chain(splits["dev"].tags, splits["test"].tags)
        tag_ids, n_tags = number_names(chain.from_iterable(train.tags), chain.from_iterable(others))
    encoded = {split: encode(examples, tokenizer, max_length, label_ids, tag_ids) for split, examples in splits.items()}
    return Dataset(name, labels=list(label_ids), n_labels=n_labels, tags=list(tag_ids), n_tags=n_tags, **encoded)
