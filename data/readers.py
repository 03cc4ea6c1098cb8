"""Read raw dataset files into plain Python lists, and refuse anything that is off, naming file and line.

A reader takes the folder of its dataset and returns `{"train": Examples, "dev": Examples, "test": Examples}`, without
dev or test where there is none.
"""

import csv
import json
import re
from collections.abc import Iterator
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

    def __len__(self):
        return len(self.labels)

    @property
    def pairs(self):
        """Whether the texts are pairs of strings."""
        return self.tags is None and isinstance(self.texts[0], tuple)

    def take(self, indices):
        """The examples of these indices, in their order."""
        columns = (self.texts, self.labels, self.tags)
        return Examples(*(column and [column[i] for i in indices] for column in columns))


# ---- what several readers need


def read_lines(path) -> Iterator[str]:
    """The lines of a UTF-8 text file, Unix or Windows line ends, without them. DataError: absent, empty, not UTF-8."""
    blank = True
    try:
        with open(path, "rb") as file:
            # Not str.splitlines(): it would also cut at U+2028 and other characters that occur inside utterances.
            for number, raw in enumerate(file, 1):
                try:
                    line = raw.decode("utf-8-sig" if number == 1 else "utf-8")  # without the byte-order mark
                except UnicodeDecodeError as error:
                    where, byte = f"{path}:{number}", error.object[error.start]
                    raise DataError(f"{where}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
                line = line.removesuffix("\n").removesuffix("\r")
                blank = blank and not line.strip()
                yield line
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}; a file of the dataset was expected here") from None
    if blank:
        raise DataError(f"{path}: the file is empty; one example a line was expected")


def read_cells(path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells) of each row of a table: comma-separated with "quotes" where the name ends in .csv, else
    tab-separated without quoting. A row is one line: else a stray quote would swallow the rows after it."""
    commas = Path(path).suffix == ".csv"
    for number, line in enumerate(read_lines(path), 1):
        try:
            cells = next(csv.reader([line], strict=True, skipinitialspace=True), [""]) if commas else line.split("\t")
        except csv.Error as error:
            raise DataError(f"{path}:{number}: {error}; a whole row a line was expected (no line ends within cells), a "
                            "cell in quotes as a whole, and quotes within it doubled") from None
        yield number, cells


def read_table(path, texts, label="label", known=None, header=None):
    """Labelled texts, or pairs of texts, from a table whose columns are addressed by name.

    texts: names of the text columns; label: name of the label's; known: which labels there may be, or None
    for any; header: the names of the columns where the file itself does not begin with them.
    """
    rows = read_cells(path)
    header = header or next(rows)[1]
    for name in (*texts, label):
        if header.count(name) != 1:
            listed = ", ".join(map(repr, header))[:200]
            raise DataError(f"{path}:1: one column named {name!r} was expected among the columns {listed}")
    columns, label_column = [header.index(name) for name in texts], header.index(label)
    examples = Examples([], [])
    for number, cells in rows:
        if not "".join(cells).strip() and len(cells) < 2:
            raise DataError(f"{path}:{number}: an empty line; remove it")
        if len(cells) != len(header):
            raise DataError(f"{path}:{number}: {len(cells)} columns, but {len(header)} names for them were given")
        found = tuple(cells[i] for i in columns)
        if not any(text.strip() for text in found):
            raise DataError(f"{path}:{number}: no text in column {' or '.join(texts)}")
        gold = cells[label_column].strip()
        if not gold or (known and gold not in known):
            right = f"one of {', '.join(known)}" if known else "any text"
            raise DataError(f"{path}:{number}: label {gold!r}; {right} was expected in column {label!r}")
        examples.texts.append(found if len(found) > 1 else found[0])
        examples.labels.append(gold)
    if not len(examples):
        raise DataError(f"{path}: no row below the header; one example a line was expected")
    return examples


def read_json(text, types, where):
    """The values of a JSON object's fields. types: {field: type}; where: "file:line"."""
    try:
        fields = json.loads(text)
        values = [fields[name] for name in types]
        json.dumps(values, ensure_ascii=False).encode()  # fails at half a surrogate pair, which no tokenizer takes
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        values = None
    if values is None or not all(isinstance(value, kind) for value, kind in zip(values, types.values())):
        raise DataError(f"{where}: {text[:40]!r}; a JSON object with {', '.join(types)} was expected")
    return values


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


def bio(name, n):
    """The tags of one slot of n words."""
    return [f"{'I' if i else 'B'}-{name}" for i in range(n)]


def hold_out(examples, share, seed=0):
    """Split off round(share·N) of N > 1 examples, at least one, whatever the run's seed: all runs share the dev set."""
    n = len(examples)
    held = np.zeros(n, dtype=bool)
    held[np.random.default_rng(seed).permutation(n)[: max(1, round(share * n))]] = True
    return examples.take(np.flatnonzero(~held)), examples.take(np.flatnonzero(held))


# ---- joint intent and slot data


def read_parallel(folder):
    """One split in JointBERT's layout: `seq.in` (words), `seq.out` (BIO tags) and `label` (intent), line by line."""
    paths = {name: Path(folder) / name for name in ("seq.in", "seq.out", "label")}
    words, tags, labels = (list(read_lines(path)) for path in paths.values())
    check_same_length(dict(zip(paths.values(), map(len, (words, tags, labels)))))
    words, tags, labels = [w.split() for w in words], [t.split() for t in tags], [label.strip() for label in labels]
    for i in range(len(words)):
        for name, column in (("seq.in", words), ("label", labels)):
            if not column[i]:
                raise DataError(f"{paths[name]}:{i + 1}: an empty line; remove this line from all three files")
        if "\t" in labels[i]:
            raise DataError(f"{paths['label']}:{i + 1}: a tab in {labels[i][:40]!r}; one label a line was expected")
        check_tags(words[i], tags[i], where=f"{paths['seq.out']}:{i + 1}")
    return Examples(words, labels, tags)


def read_snips(folder):
    return {split: read_parallel(Path(folder) / split) for split in ("train", "dev", "test")}


def read_atis(folder):
    """ATIS as shipped with Microsoft's CNTK: every cell is an index (from 0) into a dictionary file. No dev split."""
    folder = Path(folder)
    names = {kind: list(read_lines(folder / f"atis.dict.{kind}.csv")) for kind in ("vocab", "slots", "intent")}
    for kind, entries in names.items():
        for number, entry in enumerate(entries, 1):
            if entry.split() != [entry]:
                raise DataError(f"{folder}/atis.dict.{kind}.csv:{number}: {entry[:40]!r}; one word was expected")

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

    return {split: read(split) for split in ("train", "test")}


def read_mtop(folder):
    """MTOP, English: tab-separated rows of id, intent, top-level slots, utterance, domain, locale, form and tokens."""

    def read(path):
        examples = Examples([], [], [])
        for number, cells in read_cells(path):
            where = f"{path}:{number}"
            if len(cells) != 8 or not cells[1].startswith("IN:"):
                raise DataError(f"{where}: {len(cells)} columns; 8 with an intent IN:… in the second were expected")
            words, spans = read_json(cells[7], {"tokens": list, "tokenSpans": list}, where)
            examples.texts.append(words)
            examples.labels.append(cells[1])
            examples.tags.append(mtop_tags(words, spans, cells[2], where))
        return examples

    paths = {"train": "train.txt", "dev": "eval.txt", "test": "test.txt"}
    return {split: read(Path(folder) / "mtop" / "en" / file) for split, file in paths.items()}


def mtop_tags(words, spans, slots, where):
    """BIO tags from slots "start:end:SL:NAME,…" and where each word is, [{"start": …, "length": …}, …], in bytes.

    A slot covers the words it overlaps. Where slots overlap, a word belongs to the one that begins first, or is longer.
    """
    try:
        ends = [(span["start"], span["start"] + span["length"]) for span in spans]
        found = [re.fullmatch(r"(\d+):(\d+):SL:(\S+)", slot).groups() for slot in slots.split(",") if slot]
        wanted = sorted(((int(start), int(end), name) for start, end, name in found), key=lambda s: (s[0], -s[1]))
        covered = [[t for t, (a, b) in enumerate(ends) if a < end and start < b] for start, end, _ in wanted]
    except (AttributeError, ValueError, KeyError, TypeError):
        raise DataError(f"{where}: {slots[:40]!r}; slots start:end:SL:NAME,… and tokenSpans of start and length were "
                        "expected") from None
    if not words or len(words) != len(ends) or not all(isinstance(word, str) for word in words) or not all(covered):
        raise DataError(f"{where}: at least one token, a span for every token and a token in every slot were expected")
    tags = ["O"] * len(words)
    for places, (_, _, name) in zip(covered, wanted):
        free = [t for t in places if tags[t] == "O"]
        for t, tag in zip(free, bio(name, len(free))):
            tags[t] = tag
    return tags


MARK = re.compile(r"\[([^\[\]:]+) : ([^\[\]]+)\]")


def read_massive(folder):
    """MASSIVE, en-US (the paper calls it SLURP): JSON lines, slots marked in the text as [name : words]."""
    path = Path(folder) / "1.0" / "data" / "en-US.jsonl"
    splits = {split: Examples([], [], []) for split in ("train", "dev", "test")}
    names = ("partition", "intent", "utt", "annot_utt")
    for number, line in enumerate(read_lines(path), 1):
        split, intent, utterance, marked = read_json(line, dict.fromkeys(names, str), f"{path}:{number}")
        words, tags = [], []
        for i, part in enumerate(MARK.split(marked)):  # text, name, words, text, name, words, …, text
            if i % 3 == 1:
                slot = part.strip()
                continue
            found = part.split()
            words += found
            tags += bio(slot, len(found)) if i % 3 == 2 and found else ["O"] * len(found)
        right = words and words == utterance.split() and not re.search(r"\[\s*:|:\s*\]", marked)
        if split not in splits or not intent.strip() or not right:
            raise DataError(f"{path}:{number}: a partition train, dev or test, an intent, and an annot_utt that is utt "
                            "with slots as [name : words] were expected")
        splits[split].texts.append(words)
        splits[split].tags.append(tags)
        splits[split].labels.append(intent)
    if not all(len(examples) for examples in splits.values()):
        raise DataError(f"{path}: no row of partition {', '.join(s for s in splits if not len(splits[s]))}")
    return splits


# ---- classification


TRAIN_AND_DEV = {"train": "train", "dev": "dev"}
COLA_HEADER = ("source", "label", "author's mark", "sentence")  # which its files lack


def read_glue(folder, texts, known, label="label", header=None, splits=TRAIN_AND_DEV):
    """A task of GLUE. splits: {split: its .tsv file}; the other arguments are those of read_table."""
    paths = {split: Path(folder) / f"{file}.tsv" for split, file in splits.items()}
    return {split: read_table(path, texts, label, known, header) for split, path in paths.items()}


def read_mrpc(folder):
    """MRPC: the dev set consists of the rows of the train file whose two ids are a line of `mrpc_dev_ids.tsv`."""
    path, dev_path = Path(folder) / "msr_paraphrase_train.txt", Path(folder) / "mrpc_dev_ids.tsv"
    examples = read_table(path, ("#1 ID", "#2 ID", "#1 String", "#2 String"), "Quality", ("0", "1"))
    ids, examples.texts = [row[:2] for row in examples.texts], [row[2:] for row in examples.texts]
    wanted = {tuple(cells): number for number, cells in read_cells(dev_path)}
    if unknown := wanted.keys() - set(ids):
        raise DataError(f"{dev_path}:{min(wanted[pair] for pair in unknown)}: two ids of a row of {path} were expected")
    dev = [i for i, pair in enumerate(ids) if pair in wanted]
    train = [i for i, pair in enumerate(ids) if pair not in wanted]
    return {"train": examples.take(train), "dev": examples.take(dev)}


# ---- the user's own


def read_own(folder):
    """A folder of the user's. Joint intent/slot: train/, dev/ and test/, each with seq.in, seq.out and label.
    Classification: train, dev and test as .tsv or .csv with the columns text (or text_a and text_b) and label."""
    splits, others = {}, dict.fromkeys(("val", "valid", "validation"), "dev")
    for path in sorted(Path(folder).iterdir()):  # of all that is there: a broken link is not taken for no split
        split, kind = path.stem.lower(), path.suffix.lower()
        split = others.get(split, split)
        if split not in ("train", "dev", "test") or kind not in ("", ".tsv", ".csv"):
            continue
        if path.name != split + kind:
            raise DataError(f"{path}: {split + kind} was expected as its name")
        if split in splits:
            raise DataError(f"{path}: a second {split} split; one was expected")
        splits[split] = read_own_table(path) if kind else read_parallel(path)
    if "train" not in splits:
        raise DataError(f"{folder}: no train split; train.tsv or train.csv (columns text, or text_a and text_b, and "
                        "label), or train/ with seq.in, seq.out and label, was expected")
    if len({(examples.tags is None, examples.pairs) for examples in splits.values()}) > 1:
        raise DataError(f"{folder}: {', '.join(splits)} must be all of words and tags, all of texts, or all of pairs")
    return splits


def read_own_table(path):
    """One split with the columns text and label, or text_a, text_b and label."""
    header = next(read_cells(path))[1]
    pairs = "text_a" in header or "text_b" in header
    if pairs and "text" in header:
        raise DataError(f"{path}:1: columns text, text_a and text_b; either the first or the others were expected")
    return read_table(path, ("text_a", "text_b") if pairs else ("text",))
