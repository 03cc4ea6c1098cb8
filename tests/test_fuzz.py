"""Raw files may be damaged or hostile: either they are valid, or one line of ours refuses them."""

import numpy as np
import pytest
from conftest import ROWS, make_raw, write

from data import DataError, encode, find
from data.encoding import number_names
from data.samples import expect

OWN = {  # a user's folders, of every kind: {name: {file: text}}
    "joint": {f"{split}/{file}": text * 8 for split in ("train", "dev", "test")
              for file, text in (("seq.in", "play some jazz \nwake me at 7\n"), ("label", "a\nb\n"),
                                 ("seq.out", "O O B-genre\nO O O B-time\n"))},
    "tsv": {"train.tsv": "text\tlabel\n" + "play it\ton\nstop it\toff\n" * 8, "test.tsv": "text\tlabel\nx\ton\n"},
    "csv": {"train.csv": "label,text_b,text_a\n" + 'on,"play, it",now\noff,"st\nop","the ""it"""\n' * 8},
    "jsonl": {"train.jsonl": '{"words": ["play", "it"], "tags": ["O", "B-x"], "label": "on"}\n' * 8},
}  # fmt: skip

# The files that have one sample a line, and how many other lines each has. A row of .csv may have several lines.
LINES = {
    "snips": ("*/label", 0), "joint": ("*/label", 0), "atis": ("atis.t*.query.csv", 0), "mtop": ("mtop/en/*", 0),
    "slurp": ("1.0/data/*", 0), "mrpc": ("msr*.txt", 1), "cola": ("*.tsv", 0), "jsonl": ("*.jsonl", 0),
}  # fmt: skip

TIMES = 50  # mutations of each dataset
INSERTED = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"\t", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\xc2\x85", b"\xc2\xa0", b"\x1c", b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"null",
    b"true", b'"', b"\\ud800", b"[", b"[" * 3000, b"{}", b",", b"\\", b"B-", b"I-x", b"../../etc/passwd", "٣".encode(),
]  # fmt: skip


def mutate(rng, raw):
    """Return some bytes with a few random changes."""
    for _ in range(rng.integers(1, 4)):
        at, n, lines = int(rng.integers(len(raw) + 1)), int(rng.integers(1, 40)), raw.split(b"\n")
        match rng.integers(6):
            case 0:
                raw = raw[:at]
            case 1:
                raw = raw[:at] + raw[at + n :]
            case 2:
                raw = raw[:at] + rng.bytes(n) + raw[at + n :]
            case 3:
                raw = raw[:at] + INSERTED[rng.integers(len(INSERTED))] + raw[at:]
            case 4:
                raw = b"\n".join(line for i, line in enumerate(lines) if i != at % len(lines))
            case 5:
                raw = b"\n".join(lines[i] for i in rng.permutation(len(lines)))
    return raw


def check(name, source, folder, tokenizer):
    """Read a dataset. What comes out must be valid, and every line must be there."""
    splits = source.reader(folder)
    if name != "csv":
        pattern, others = LINES.get(name, ("*.tsv", 1))
        lines = [path.read_bytes().removesuffix(b"\n").count(b"\n") + 1 - others for path in folder.glob(pattern)]
        assert sum(lines) == sum(map(len, splits.values())), "rows were skipped silently"
    expect(all(map(len, splits.values())), folder, "an empty split, which data.read refuses")
    for samples in splits.values():
        label_ids, _ = number_names(samples.labels, [])
        tag_ids, _ = number_names((tag for tags in samples.tags or () for tag in tags), [])
        split = encode(samples, tokenizer, 128, label_ids, tag_ids)
        assert len(split) == len(samples) == len(samples.rows)
        assert split.lengths.min() >= 2 and len(split.tokens) == split.lengths.sum()


@pytest.mark.parametrize("name", [*ROWS, *OWN])
def test_damaged_input_is_valid_or_refused_in_one_line(tmp_path, tokenizer, name):
    """Mutated files of every dataset and every kind of a user's own give samples, or a DataError of one line."""
    if name in ROWS:
        make_raw(tmp_path, name)
    source, folder = find(name if name in ROWS else str(write(tmp_path / name, OWN[name])), tmp_path)
    check(name, source, folder, tokenizer)
    rng, refused = np.random.default_rng(0), 0
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for _ in range(TIMES):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        path.write_bytes(mutate(rng, whole))
        try:
            check(name, source, folder, tokenizer)
        except DataError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(whole)
    assert refused > TIMES // 10
