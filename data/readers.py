"""Read raw dataset files into plain Python lists, and refuse anything that is off, naming file and line.

A reader takes the folder of its dataset and returns `{"train": Examples, "dev": Examples, "test": Examples}`.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np


class DataError(ValueError):
    """A dataset that cannot be used. The message is one line: what is wrong, where, and what would be right."""


@dataclass
class Examples:
    """One split, as text. For joint intent/slot data `texts[i]` is a list of words and `tags[i]` their BIO tags;
    for classification `texts[i]` is a string or a pair of strings, and `tags` is None."""

    texts: list
    labels: list[str]
    tags: list[list[str]] | None = None

    def take(self, indices):
        """The examples of these indices, in their order."""
        columns = (self.texts, self.labels, self.tags)
        return Examples(*(column and [column[i] for i in indices] for column in columns))


def read_lines(path):
    """The lines of a UTF-8 text file, Unix or Windows line ends, without them. DataError: absent, empty, not UTF-8."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a file of the dataset was expected here") from None
    try:
        text = raw.decode("utf-8-sig")  # a byte-order mark is no part of the first word
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8; save the file as UTF-8") from None
    # Not splitlines(): it would also cut at U+2028 and other characters that occur inside utterances.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(line.strip() for line in lines):
        raise DataError(f"{path}: the file is empty; one utterance a line was expected")
    return lines


def check_same_length(counts):
    """counts: {path: lines} of parallel files."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{path} has {n}" for path, n in counts.items())
        raise DataError(f"files differ in their number of lines: {listed}; line i of each must be the same utterance")


def check_tags(words, tags, where):
    """One tag a word, every tag O, B-x or I-x. `where`: "file:line" of the tags.

    An I-x that continues nothing is left as it is: like conlleval, the metric lets it open a span.
    """
    if len(words) != len(tags):
        raise DataError(f"{where}: {len(words)} words but {len(tags)} tags; one tag a word was expected")
    for tag in tags:
        if tag != "O" and not (tag[:2] in ("B-", "I-") and len(tag) > 2):
            raise DataError(f"{where}: tag {tag!r} is not of the form O, B-name or I-name")


def read_parallel(folder):
    """The layout of SNIPS in JointBERT: `seq.in` (words), `seq.out` (BIO tags) and `label` (intent), line by line."""
    paths = {name: Path(folder) / name for name in ("seq.in", "seq.out", "label")}
    words, tags, labels = (read_lines(path) for path in paths.values())
    check_same_length(dict(zip(paths.values(), map(len, (words, tags, labels)))))
    words, tags, labels = [w.split() for w in words], [t.split() for t in tags], [label.strip() for label in labels]
    for i in range(len(words)):
        for name, column in (("seq.in", words), ("label", labels)):
            if not column[i]:
                raise DataError(f"{paths[name]}:{i + 1}: an empty line; remove this line from all three files")
        check_tags(words[i], tags[i], where=f"{paths['seq.out']}:{i + 1}")
    return Examples(words, labels, tags)


def read_snips(folder):
    return {split: read_parallel(Path(folder) / split) for split in ("train", "dev", "test")}


def read_atis(folder):
    """ATIS as shipped with Microsoft's CNTK: every cell is an index (from 0) into a dictionary file.

    Upstream has no dev split; a fixed tenth of train is held out, so that 4,480 / 498 / 893 utterances remain.
    """
    folder = Path(folder)
    names = {kind: read_lines(folder / f"atis.dict.{kind}.csv") for kind in ("vocab", "slots", "intent")}

    def look_up(kind, cells, where):
        try:
            indices = [int(cell) for cell in cells]
        except ValueError:
            raise DataError(f"{where}: {' '.join(cells)[:40]!r}; indices with blanks between were expected") from None
        if any(not 0 <= i < len(names[kind]) for i in indices):
            raise DataError(f"{where}: an index outside 0..{len(names[kind]) - 1}, the lines of atis.dict.{kind}.csv")
        return [names[kind][i] for i in indices]

    def read(split):
        paths = {kind: folder / f"atis.{split}.{file}.csv"
                 for kind, file in (("vocab", "query"), ("slots", "slots"), ("intent", "intent"))}
        rows = {kind: [line.split() for line in read_lines(path)] for kind, path in paths.items()}
        check_same_length({paths[kind]: len(lines) for kind, lines in rows.items()})
        examples = Examples([], [], [])
        for i in range(len(rows["vocab"])):
            words, tags, labels = (look_up(kind, rows[kind][i], f"{path}:{i + 1}") for kind, path in paths.items())
            if words[:1] != ["BOS"] or words[-1:] != ["EOS"] or len(words) < 3:
                raise DataError(f"{paths['vocab']}:{i + 1}: must start with BOS, end with EOS and have words between")
            if len(labels) != 1:
                raise DataError(f"{paths['intent']}:{i + 1}: one intent was expected, not {len(labels)}")
            check_tags(words, tags, f"{paths['slots']}:{i + 1}")
            examples.texts.append(words[1:-1])
            examples.tags.append(tags[1:-1])
            examples.labels.append(labels[0])
        return examples

    train, dev = hold_out(read("train"), share=0.1)
    return {"train": train, "dev": dev, "test": read("test")}


def hold_out(examples, share, seed=0):
    """Split off round(share·N) examples, at least one, without regard to the run's seed: all runs share the dev set."""
    n = len(examples.labels)
    if n < 2:
        raise DataError("one train example cannot be split into train and dev; two or more were expected")
    held = np.zeros(n, dtype=bool)
    held[np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]] = True
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))
