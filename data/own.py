"""Read a user's own data: a folder with a train split, and with or without dev and test."""

import re
from pathlib import Path

from .readers import labelled, pick, pick_label, read_objects, read_parallel, read_table, tagged
from .samples import expect

SPLITS = {"train": "train", "dev": "dev", "val": "dev", "valid": "dev", "validation": "dev", "test": "test"}
KINDS = ("a folder with seq.in, seq.out and label; or a .tsv, .csv or .jsonl file with text (or text_a and text_b) and "
         "label; or a .jsonl file with words, tags and label")  # fmt: skip


def read_own(folder):
    """Return the splits of a user's folder. Raises DataError where one is wrong, or of a kind that is not read."""
    splits = {}
    for path in sorted(Path(folder).iterdir()):
        name, dot, ending = path.name.lower().partition(".")
        if name in SPLITS:
            split, kind = SPLITS[name], dot + ending
            expect(kind in ("", ".tsv", ".csv", ".jsonl"), path, f"{kind} is not read; use {KINDS}")
            expect(path.name == split + kind, path, f"rename it to {split + kind}")
            expect(split not in splits, path, f"a second {split} split; remove one")
            splits[split] = read_file(path) if kind else read_parallel(path)
    expect("train" in splits, folder, f"no train split; add {KINDS}, named train")
    forms = {(samples.tags is None, samples.pairs) for samples in splits.values()}
    expect(len(forms) == 1, folder, f"{', '.join(splits)} must be all of words and tags, all of texts, or all of pairs")
    return {split: splits[split] for split in ("train", "dev", "test") if split in splits}


def has_tags(folder):
    """Return whether a user's folder has words and tags. Its train split shows it, by its name or first line."""
    path = Path(folder) / "train.jsonl"
    return (Path(folder) / "train").is_dir() or (path.is_file() and "words" in read_objects(path)[0][1])


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
        refuse_swallowed_rows(rows, set(samples.labels))
    return samples


def refuse_swallowed_rows(rows, labels):
    """Refuse a cell of several lines in which a label stands as in a row of its own: a stray quote opened the cell."""
    names = "|".join(map(re.escape, labels))
    row_end = re.compile(rf", *({names}) *[,\n]|\n *({names}) *,")
    for where, row in rows:
        swallowed = any("\n" in cell and row_end.search(cell) for cell in row.values())
        expect(not swallowed, where, "a quote that opens in this row runs over other rows; remove it or double it")
