"""Generate the dataset `demo`: requests to a virtual assistant, drawn from a seeded grammar (demo_grammar.txt).

As in real logs, a few patterns are frequent and many are rare. The annotation of 2 % of the train samples is wrong on
purpose. `planted_errors` lists them, so `demo` shows whether a score finds wrong annotation.
"""

import re
from bisect import bisect
from itertools import accumulate
from pathlib import Path

import numpy as np

from .samples import Sample

SIZES = {"train": 1000, "dev": 250, "test": 250}
ERROR_SHARE = 0.02
SEED = 20230605
ZIPF = list(accumulate(1 / k for k in range(1, 100)))  # cumulative weights of up to 99 options
OPENINGS = ["", "please", "hey", "can you", "i would like you to", "ok now", "um"]
CLOSINGS = ["", "please", "thanks", "for me", "right away"]


def read_grammar():
    """Return three tables {name: [option, …]}: patterns of intents, values of slots, and parts of values."""
    text = Path(__file__).with_name("demo_grammar.txt").read_text(encoding="utf-8").strip()
    _, *tables = text.replace("\n    ", " ").split("\n\n")
    pairs = [[line.split(": ") for line in table.splitlines()] for table in tables]
    return [{name: options.split(" | ") for name, options in table} for table in pairs]


PATTERNS, VALUES, PARTS = read_grammar()


def draw(rng, options):
    """Draw one of `options`, the k-th with a probability proportional to 1 / k."""
    return options[bisect(ZIPF, rng.random() * ZIPF[len(options) - 1])]


def fill(rng, text):
    """Replace each {part} of a slot value by one of PARTS."""
    return re.sub(r"\{(\w+)\}", lambda match: draw(rng, PARTS[match[1]]), text)


def utterance(rng, row):
    """Return one utterance as a Sample."""
    intent, words, tags = draw(rng, list(PATTERNS)), [], []

    def add(text, slot=None):
        for i, word in enumerate(text.split()):
            words.append(word)
            tags.append("O" if slot is None else f"{'I' if i else 'B'}-{slot}")

    if rng.random() < 0.25:
        add(draw(rng, OPENINGS))
    for word in draw(rng, PATTERNS[intent]).split():
        slot = word[1:-1] if word.startswith("{") else None
        add(fill(rng, draw(rng, VALUES[slot])) if slot else word, slot)
    if rng.random() < 0.15:
        add(draw(rng, CLOSINGS))
    if rng.random() < 0.03:  # two letters of a word change places, like an error of speech recognition
        i = rng.integers(len(words))
        j = rng.integers(len(words[i]))
        words[i] = words[i][:j] + words[i][j + 1 : j + 2] + words[i][j : j + 1] + words[i][j + 2 :]
    return Sample(words, intent, tags, row)


def planted_errors():
    """Return the indices of the train samples whose annotation is wrong on purpose: (20,) int64, ascending."""
    n = SIZES["train"]
    return np.sort(np.random.default_rng([SEED, 1]).permutation(n)[: round(ERROR_SHARE * n)])


def errors_found(scores):
    """Count the planted errors among the highest scores, (N,). As many scores are looked at as there are errors.

    Returns (found, planted).
    """
    planted = planted_errors()
    top = np.argsort(-scores, kind="stable")[: len(planted)]
    return int(np.isin(planted, top).sum()), len(planted)


def spoil(rng, sample):
    """Return a sample with a wrong annotation: another intent, or another type for all its slots of one type."""
    types = sorted({tag[2:] for tag in sample.tags if tag != "O"})
    if not types or rng.random() < 0.5:
        return sample._replace(label=str(rng.choice([intent for intent in PATTERNS if intent != sample.label])))
    old = str(rng.choice(types))
    new = str(rng.choice([slot for slot in VALUES if slot not in types]))
    return sample._replace(tags=[tag[:2] + new if tag[2:] == old else tag for tag in sample.tags])


def generate(_folder=None):
    """Return {"train": samples, "dev": samples, "test": samples}, the same on every machine."""
    splits = {}
    for number, (split, size) in enumerate(SIZES.items()):
        rng = np.random.default_rng([SEED, 0, number])
        splits[split] = [utterance(rng, row) for row in range(size)]
    rng = np.random.default_rng([SEED, 2])
    for i in planted_errors():
        splits["train"][i] = spoil(rng, splits["train"][i])
    return splits
