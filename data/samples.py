"""A sample as text. A split is a list of samples."""

import hashlib
import json
import re
from typing import NamedTuple

import numpy as np


class Sample(NamedTuple):
    """One sample. For intent and slots, `text` is a list of words. For classification, it is a string, or a tuple of
    two strings."""

    text: list[str] | str | tuple[str, str]
    label: str
    tags: list[str] | None = None  # the BIO tag of each word; None for classification
    row: int = 0  # in its file, from 0, not counting a header


def without_breaks(text):
    """Return a text on one line: line breaks become a blank."""
    return re.sub("[\r\n]+", " ", text)


def digest(splits):
    """Return a SHA-256 of {split: samples}, in hexadecimal."""
    return hashlib.sha256(json.dumps(splits).encode()).hexdigest()


def hold_out(samples, share):
    """Split off at most share * N of N samples, at random. Samples of one text stay together.

    Returns (the others, the held-out samples). With two or more samples, at least one is held out.
    """
    groups, held = {}, set()
    for i, sample in enumerate(samples):
        groups.setdefault(str(sample.text), []).append(i)
    groups = list(groups.values())
    for i in np.random.default_rng(0).permutation(len(groups)):
        if len(held) + len(groups[i]) <= share * len(samples):
            held.update(groups[i])
    if not held and len(samples) > 1:  # there are few texts: take one sample, whose text stays in train, too
        held = {len(samples) - 1}
    return tuple([sample for i, sample in enumerate(samples) if (i in held) == wanted] for wanted in (False, True))


def subset(samples, n):
    """Return n samples, drawn at random, in their order; all where there are fewer."""
    return [samples[i] for i in np.sort(np.random.default_rng(0).permutation(len(samples))[:n])]
