"""Read raw files into lists of text. A file that is wrong is refused with its name and line.

A reader takes the folder of its dataset. It returns {"train": samples, "dev": samples, "test": samples}, without dev or
test where the dataset has none. The last section reads a user's own folder.
"""

import csv
import json
import os
import re
from pathlib import Path

from errors import UserError, expect

from .samples import Sample, without_breaks

# ---- files to rows


def read_lines(path):
    """Return the lines of a UTF-8 text file, without line ends. Raises UserError: missing, blank or not UTF-8."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a file of the dataset was expected here") from None
    except UnicodeDecodeError as error:
        number, byte = error.object[: error.start].count(b"\n") + 1, error.object[error.start]
        raise UserError(f"{path}:{number}: byte 0x{byte:02x} is not UTF-8; save the file as UTF-8") from None
    expect(text.strip(), path, "the file is empty; one sample a line was expected")
    # Not str.splitlines(): it would also cut at U+2028 and other characters that occur inside utterances.
    return [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]


def numbered(path):
    """Return [("file:line", line)] of a text file."""
    return [(f"{path}:{number}", line) for number, line in enumerate(read_lines(path), 1)]


def read_table(path, header=None):
    """Return [("file:line", {column: cell})] of a table: .csv with commas and quoting, others with tabs and without.

    header: names of the columns, for a file that does not begin with them.
    """
    is_csv = Path(path).suffix == ".csv"
    rows = read_csv(path) if is_csv else [(where, line.split("\t")) for where, line in numbered(path)]
    header = header or rows.pop(0)[1]
    expect(rows, path, "no row below the header; one sample a row was expected")
    named = {name for name in header if header.count(name) == 1}  # an export may have several columns without a name
    for where, cells in rows:
        advice = "; put a cell with commas in quotes" if is_csv else ""
        expect(len(cells) == len(header), where, f"{len(cells)} columns; {len(header)} were expected{advice}")
    return [(where, {name: cell for name, cell in zip(header, cells) if name in named}) for where, cells in rows]


def read_csv(path):
    """Return [("file:line", cells)] of a CSV file. A row that has several lines is named by the first."""
    csv.field_size_limit(2**31 - 1)  # a cell may hold a whole document
    reader = csv.reader([line + "\n" for line in read_lines(path)], strict=True, skipinitialspace=True)
    rows, first = [], 1
    try:
        for cells in reader:
            if cells:  # a blank line is no row
                rows.append((f"{path}:{first}", cells))
            first = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{first}: {error}, in the row that begins here; put the whole cell in quotes, "
                        "and double the quotes in it") from None
    return rows


def read_objects(path):
    """Return [("file:line", dict)] of a file with a JSON object a line."""
    return [(where, read_json(line, where)) for where, line in numbered(path)]


def read_json(text, where):
    """Return a JSON object as a dict."""
    try:
        fields = json.loads(text)
        json.dumps(fields, ensure_ascii=False).encode()  # fails at half a surrogate pair, which no tokenizer takes
    except (ValueError, RecursionError):
        fields = None
    expect(isinstance(fields, dict), where, f"{text[:40]!r}; a JSON object was expected")
    return fields


def pick(row, where, names, kind=str):
    """Return the cells of some columns. Raises UserError unless each is there once, and of type `kind`."""
    for name in names:
        others = ", ".join(map(repr, row))[:200]
        expect(name in row, where, f"no column {name!r}, or several; the columns are {others}")
        right = isinstance(row[name], kind)
        expect(right, where, f"{name} is {row[name]!r:.40}; {'a list' if kind is list else 'text'} was expected")
    return [row[name] for name in names]


def line_up(pattern, columns):
    """Return [("files:line", …)] of the lines of parallel files."""
    counts = " / ".join(str(len(lines)) for lines in columns)
    expect(len(set(map(len, columns))) == 1, pattern, f"{counts} lines; line i of each must be the same utterance")
    return [(f"{pattern}:{number}", *lines) for number, lines in enumerate(zip(*columns), 1)]


# ---- rows to samples


def pick_label(row, where, name="label", known=None):
    """Return the label of a row as text. known: labels that may occur, None for any."""
    label = str(*pick(row, where, [name], (str, int))).strip()
    expect(label in known if known else label, where, f"label {label[:40]!r}; {known or 'any text'} was expected")
    return label


def labelled(rows, texts, label="label", known=None):
    """Return samples for classification from [(where, {column: cell})]. A line break in a text becomes a blank.

    texts: names of the one or two text columns. label: name of the label column. known: as for `pick_label`.
    """
    samples = []
    for i, (where, row) in enumerate(rows):
        cells = tuple(map(without_breaks, pick(row, where, texts)))
        expect("".join(cells).strip(), where, f"no text in {' or '.join(texts)}")
        text = cells if len(cells) > 1 else cells[0]
        samples.append(Sample(text, pick_label(row, where, label, known), row=i))
    return samples


def tagged(rows):
    """Return samples with slots from [(where, words, tags, label)]. An I-name may follow any tag."""
    for where, words, tags, label in rows:
        expect(words, where, "no words; remove this sample")
        for word in words:
            expect(isinstance(word, str) and word, where, f"{str(word)[:40]!r}; a word was expected")
            blanks = ", ".join(f"U+{ord(letter):04X}" for letter in word if letter.isspace())
            expect(not blanks, where, f"{word[:40]!r} has the white space {blanks} within a word; replace it")
        expect(len(words) == len(tags), where, f"{len(words)} words but {len(tags)} tags; one tag a word was expected")
        for tag in tags:
            right = isinstance(tag, str) and re.fullmatch(r"O|[BI]-\S+", tag)
            expect(right, where, f"tag {str(tag)[:40]!r} is not of the form O, B-name or I-name")
        expect(label.strip() and "\t" not in label, where, f"label {label[:40]!r}; one label was expected")
    return [Sample(words, label.strip(), tags, row) for row, (_, words, tags, label) in enumerate(rows)]


def bio(name, n):
    """Return the tags of one slot of n words."""
    return [f"{'I' if i else 'B'}-{name}" for i in range(n)]


# ---- intent and slots


def read_parallel(folder):
    """Read one split in JointBERT's layout, line by line: `seq.in` (words), `seq.out` (tags) and `label` (intent)."""
    names = ("seq.in", "seq.out", "label")
    rows = line_up(f"{folder}/{{{','.join(names)}}}", [read_lines(Path(folder) / name) for name in names])
    # Not str.split(): it would also cut at U+00A0 and other white space, and then words and tags would differ.
    cut = re.compile(r"[^ \t]+").findall
    return tagged([(where, cut(words), cut(tags), label) for where, words, tags, label in rows])


def read_atis(folder):
    """Read ATIS as shipped with Microsoft's CNTK. Each word is a number: of its line in a dictionary, from 0."""

    def look_up(file, kind):
        dictionary = Path(folder) / f"atis.dict.{kind}.csv"
        names = {str(i): name for i, name in enumerate(read_lines(dictionary))}
        expect(all(name.split() == [name] for name in names.values()), dictionary, "one word a line was expected")
        rows = [(where, line.split()) for where, line in numbered(Path(folder) / file)]
        for where, row in rows:
            expect(set(row) <= set(names), where, f"numbers of lines of {dictionary.name} were expected")
        return [[names[cell] for cell in row] for _, row in rows]

    def read(split):
        kinds = {"query": "vocab", "slots": "slots", "intent": "intent"}
        columns = [look_up(f"atis.{split}.{file}.csv", kind) for file, kind in kinds.items()]
        rows = line_up(f"{folder}/atis.{split}.{{{','.join(kinds)}}}.csv", columns)
        for where, words, _, intents in rows:
            expect(words[:1] == ["BOS"] and words[-1:] == ["EOS"], where, "BOS, words and EOS were expected")
            expect(len(intents) == 1, where, f"{len(intents)} intents; one was expected")
        return tagged([(where, words[1:-1], tags[1:-1], *intents) for where, words, tags, intents in rows])

    return {split: read(split) for split in ("train", "test")}


MTOP_COLUMNS = ("id", "intent", "slots", "utterance", "domain", "locale", "form", "tokens")


def read_mtop(folder):
    """Read MTOP, English."""

    def read(path):
        rows = []
        for where, row in read_table(path, MTOP_COLUMNS):
            expect(row["intent"].startswith("IN:"), where, f"{row['intent'][:40]!r}; an intent IN:… was expected")
            words, spans = pick(read_json(row["tokens"], where), where, ("tokens", "tokenSpans"), list)
            rows.append((where, words, mtop_tags(words, spans, row["slots"], where), row["intent"]))
        return tagged(rows)

    files = {"train": "train.txt", "dev": "eval.txt", "test": "test.txt"}
    return {split: read(Path(folder) / "mtop" / "en" / file) for split, file in files.items()}


def mtop_tags(words, spans, slots, where):
    """Return BIO tags of slots "start:end:SL:NAME,…". spans: [{"start", "length"}] of the words, in UTF-8 bytes."""
    expect(len(words) == len(spans), where, f"{len(words)} tokens but {len(spans)} tokenSpans")
    tags = ["O"] * len(words)
    try:
        ends = [(span["start"], span["start"] + span["length"]) for span in spans]
        for slot in filter(None, slots.split(",")):
            start, end, name = re.fullmatch(r"(\d{1,9}):(\d{1,9}):SL:(\S+)", slot).groups()
            covered = [i for i, (a, b) in enumerate(ends) if a < int(end) and int(start) < b]
            expect({tags[i] for i in covered} == {"O"}, where, f"slot {slot}: no words, or words of another slot")
            tags[covered[0] : covered[-1] + 1] = bio(name, len(covered))
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{where}: slots start:end:SL:NAME and tokenSpans of start and length were expected") from None
    return tags


MARK = re.compile(r"\[([^\[\]:]+) : ([^\[\]]+)\]")


def read_massive(folder):
    """Read MASSIVE, en-US (the paper calls it SLURP): JSON lines with slots marked in the text as [name : words]."""
    rows, partitions, splits = [], [], ("train", "dev", "test")
    for where, row in read_objects(Path(folder) / "1.0" / "data" / "en-US.jsonl"):
        split, intent, utterance, marked = pick(row, where, ("partition", "intent", "utt", "annot_utt"))
        words, tags = [], []
        pieces = [*MARK.split(marked), "", ""]  # text, name, words, text, name, words, …, text
        for text, name, slot in zip(pieces[0::3], pieces[1::3], pieces[2::3]):
            words += text.split() + slot.split()
            tags += ["O"] * len(text.split()) + bio(name.strip(), len(slot.split()))
        expect(words == utterance.split(), where, "annot_utt must be utt with slots as [name : words]")
        expect(split in splits, where, f"partition {split[:40]!r}; train, dev or test was expected")
        rows.append((where, words, tags, intent))
        partitions.append(split)
    samples = tagged(rows)
    return {split: [sample for sample, own in zip(samples, partitions) if own == split] for split in splits}


# ---- classification


TRAIN_AND_DEV = {"train": "train", "dev": "dev"}
COLA_HEADER = ("source", "label", "author's mark", "sentence")  # CoLA's files have no header


def read_glue(folder, texts, known, label="label", header=None, splits=TRAIN_AND_DEV):
    """Read a GLUE task. splits: {split: name of its .tsv file}. See `read_table` and `labelled` for the others."""
    paths = {split: Path(folder) / f"{file}.tsv" for split, file in splits.items()}
    return {split: labelled(read_table(path, header), texts, label, known) for split, path in paths.items()}


def read_mrpc(folder):
    """Read MRPC. Its dev set is the rows of the train file whose two ids are a line of `mrpc_dev_ids.tsv`."""
    ids = ("#1 ID", "#2 ID")
    rows = read_table(Path(folder) / "msr_paraphrase_train.txt")
    samples = labelled(rows, ("#1 String", "#2 String"), "Quality", ("0", "1"))
    pairs = [tuple(pick(row, where, ids)) for where, row in rows]
    dev = {tuple(row.values()): where for where, row in read_table(Path(folder) / "mrpc_dev_ids.tsv", ids)}
    known = set(pairs)
    for pair, where in dev.items():
        expect(pair in known, where, "no row of msr_paraphrase_train.txt has these two ids")
    return {split: [sample for sample, pair in zip(samples, pairs) if (pair in dev) == (split == "dev")]
            for split in ("train", "dev")}  # fmt: skip


# ---- a user's own folder


SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
KINDS = ("a folder with seq.in, seq.out and label; or a .tsv, .csv or .jsonl file with text (or text_a and text_b) and "
         "label; or a .jsonl file with words, tags and label")  # fmt: skip


def read_own(folder):
    """Return the splits of a user's folder. Raises UserError where one is wrong, or of a kind that is not read."""
    splits = {}
    for path in sorted(Path(folder).iterdir()):
        name, dot, ending = path.name.lower().partition(".")
        if name in SPLITS:
            split, kind = SPLITS[name], dot + ending
            expect(kind in ("", ".tsv", ".csv", ".jsonl"), path, f"{kind} is not read; use {KINDS}")
            expect(path.name == split + kind, path, f"rename it to {split + kind}")
            expect(split not in splits, path, f"a second {split} split; remove one")
            splits[split] = read_file(path) if kind else read_parallel(path)
        elif ending in ("tsv", "csv", "jsonl"):
            print(f"warning: {path} is not read; splits are named train, dev and test")
    expect("train" in splits, folder, f"no train split; add {KINDS}, named train")
    forms = {type(samples[0].text) for samples in splits.values()}
    expect(len(forms) == 1, folder, f"{', '.join(splits)} must be all of words and tags, all of texts, or all of pairs")
    return {split: splits[split] for split in ("train", "dev", "test") if split in splits}


def has_tags(folder):
    """Return whether a user's folder has words and tags. Its train split shows it, by its name or first line."""
    path = Path(folder) / "train.jsonl"
    if os.path.isdir(path.with_suffix("")):
        return True
    return os.path.isfile(path) and "words" in read_json(read_lines(path)[0], f"{path}:1")


def read_file(path):
    """Read one split from a .tsv, .csv or .jsonl file. The columns, or fields, of its first row say what it holds."""
    rows = read_objects(path) if path.suffix == ".jsonl" else read_table(path)
    where, first = rows[0]
    if "words" in first:
        rows = [(where, *pick(row, where, ("words", "tags"), list), pick_label(row, where)) for where, row in rows]
        return tagged(rows)
    pairs = "text_a" in first or "text_b" in first
    expect(not pairs or "text" not in first, where, "columns text and text_a or text_b; remove one kind")
    samples = labelled(rows, ("text_a", "text_b") if pairs else ("text",))
    if path.suffix == ".csv":
        refuse_swallowed_rows(path, rows, {sample.label for sample in samples})
    return samples


def refuse_swallowed_rows(path, rows, labels):
    """Refuse a cell of several lines in which a label stands as in a row of its own: a stray quote opened the cell."""
    columns = list(rows[0][1])
    # Prose has blanks at commas. Rows may have them, too, where they stand in a line without quotes.
    spaced = any(", " in line and '"' not in line for line in read_lines(path))
    before = "\n *" if columns[0] == "label" else ", *" if spaced else ","
    after = "\n" if columns[-1] == "label" else "," if spaced else ",(?! )"
    row_part = re.compile(f"{before}({'|'.join(map(re.escape, labels))}) *{after}")
    for where, row in rows:
        swallowed = any("\n" in cell and row_part.search(cell) for cell in row.values())
        expect(not swallowed, where, "a cell of several lines seems to hold other rows; remove the quote that opens "
               "it, double it, or save the file as .jsonl")
