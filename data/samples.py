"""Hold a split as text, and the error for data that cannot be used."""

import hashlib
import json
from dataclasses import dataclass

import numpy as np


class DataError(ValueError):
    """A dataset that cannot be used. The message is one line: where, what is wrong, what to do."""


def expect(ok, where, message):
    """Raise DataError unless `ok`. where: a file, or "file:line"."""
    if not ok:
        raise DataError(f"{where}: {message}")


@dataclass
class Samples:
    """One split as text.

    Intent and slots: texts[i] is a list of words, and tags[i] the BIO tag of each. Classification: texts[i] is a string
    or a pair of strings, and `tags` is None.
    """

    texts: list
    labels: list[str]
    tags: list[list[str]] | None = None
    rows: list[int] | None = None  # row of each sample in its file, from 0, not counting a header; default 0 … N-1

    def __post_init__(self):
        if self.rows is None:
            self.rows = list(range(len(self.labels)))

    def __len__(self):
        return len(self.labels)

    @property
    def pairs(self):
        """Whether the texts are pairs of strings."""
        return self.tags is None and isinstance(self.texts[0], tuple)

    def take(self, indices):
        """Return the samples of these indices, in their order."""
        columns = (self.texts, self.labels, self.tags, self.rows)
        return Samples(*(column and [column[i] for i in indices] for column in columns))


def digest(splits):
    """Return a SHA-256 of all texts, labels and tags of {split: Samples}, in hexadecimal."""
    content = [[split, samples.texts, samples.labels, samples.tags] for split, samples in splits.items()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def hold_out(samples, share, seed=0):
    """Split off at most share * N of N samples, at random. Samples of one text stay together.

    Returns (the others, the held-out samples). With two or more samples, at least one is held out.
    """
    groups = {}
    for i, text in enumerate(samples.texts):
        groups.setdefault(str(text), []).append(i)
    groups, held = list(groups.values()), []
    for i in np.random.default_rng(seed).permutation(len(groups)):
        if len(held) + len(groups[i]) <= share * len(samples):
            held += groups[i]
    if not held and len(samples) > 1:  # there are few texts: take one sample, whose text stays in train, too
        held = [len(samples) - 1]
    rest = np.setdiff1d(np.arange(len(samples)), held)
    return samples.take(rest), samples.take(np.sort(held).astype(int))


def subset(samples, n, seed=0):
    """Return n samples, drawn at random, in their order; all where there are fewer."""
    return samples.take(np.sort(np.random.default_rng(seed).permutation(len(samples))[:n]))
