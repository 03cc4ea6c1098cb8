"""Readers take what is right, to the last row, and name what is wrong, with file and line. None ends in a traceback."""

import numpy as np
import pytest
from conftest import RAW, ROWS, TIMES, make_raw, refused_with, write

from data import FILES, encode, find, load
from data.readers import read_own
from errors import UserError, expect
from metrics import spans

# ---- the real files

OFFICIAL = {  # labels, slot types and slots over all splits; of MTOP, no figure is published
    "snips": (7, 39, None), "atis": (26, 83, None), "mtop": None, "slurp": (60, 55, 11344 + 2012 + 2815),
    **dict.fromkeys(("cola", "sst2", "mrpc", "rte", "wnli"), (2, 0, 0)),
}  # fmt: skip


@pytest.mark.parametrize("name", OFFICIAL)
def test_real_files_hold_what_is_official(raw, name):
    """Rows, labels, slot types and slots are the published numbers."""
    source, path = find(name, raw)
    splits = source.reader(path)
    assert tuple(map(len, splits.values())) == source.rows
    samples = [sample for split in splits.values() for sample in split]
    labels, slots = {sample.label for sample in samples}, [s for one in samples for *_, s in spans(one.tags or ())]
    for found, wanted in zip((labels, set(slots), slots), OFFICIAL[name] or ()):
        assert wanted in (None, len(found))


# ---- files of the right shape, which the tests make

ENTAILMENT = ["entailment", "not_entailment"]
LABELS = {"rte": ENTAILMENT, "qnli": ENTAILMENT, "mnli": ["entailment", "neutral"]}


@pytest.mark.parametrize("name", RAW)
def test_every_reader_gives_back_what_was_written(tmp_path, tokenizer, capsys, name):
    """Text, tags and labels of every dataset, whatever the line ends. Unofficial counts are said.

    MTOP counts slots in bytes. Two slots that touch, or have one name, stay two. A row counts from the top of its file.
    """
    make_raw(tmp_path, name)
    assert load(name, tokenizer, tmp_path).train.lengths.min() > 2
    assert "officially" in capsys.readouterr().out
    source, path = find(name, tmp_path)
    splits = source.reader(path)
    assert len(splits) == len(source.rows)
    for split, samples in splits.items():
        texts, tags, labels = map(list, zip(*[(a.split(), b.split(), label) for a, b, label in ROWS]))
        if source.metrics:
            texts, tags = ['"a b', "c"] if name in ("cola", "sst2") else [('"a b', "d"), ("c", "")], None
            labels = LABELS.get(name, ["0", "1"])
        found = [(text, label.removeprefix("IN:"), own) for text, label, own, _ in samples]
        assert found == list(zip(texts, labels, tags or [None] * 2)) * TIMES[split]
    assert name != "slurp" or [sample.row for sample in splits["test"]] == [14, 15, 16, 17]
    for file in FILES[name]:
        (path / file.path).write_bytes(b"\xef\xbb\xbf" + (path / file.path).read_bytes().replace(b"\n", b"\r\n"))
    if name != "mrpc":  # whose file has a byte-order mark already
        assert source.reader(path) == splits


# ---- the user's own data


TABLE = "text\tlabel\na\tx\n"
JOINT = {"train/seq.in": "a b\nc\n", "train/seq.out": "I-x O\nO\n", "train/label": "x\ny\n"}


OWN = {  # a user's folders of every kind, and the texts of their two train samples
    "tsv": ({"train.tsv": "text\tlabel\n\"a\" b\tx\nc\ty\n"}, ['"a" b', "c"]),  # without quoting
    "csv": ({"train.csv": 'label,text,,\nx, "a, ""b""",,\ny,c,,\n'}, ['a, "b"', "c"]),  # empty columns
    "csv lines": ({"train.csv": 'text,label\r\n"a, z\r\n\r\nb",x\r\n"c\r\n",y\r\n'}, ["a, z b", "c "]),
    "csv list": ({"train.csv": 'text,label\n"x, y, z\n",x\nc,y\n'}, ["x, y, z ", "c"]),
    "csv list of two": ({"train.csv": 'text,label\n"x, z, y\n",x\nc,y\n'}, ["x, z, y ", "c"]),
    "csv answer": ({"train.csv": 'label,text\nx,"is it?\nx, it is"\ny,b\n'}, ["is it? x, it is", "b"]),
    "tsv pairs": ({"train.tsv": "id\ttext_b\tlabel\ttext_a\n1\tb\tx\ta\n2\t\ty\tc\n"}, [("a", "b"), ("c", "")]),
    "jsonl": ({"train.jsonl": '{"text": "a\\u2028b", "label": "x", "n": null}\n{"label": "y", "text": "c"}'},
              ["a\u2028b", "c"]),
    "jsonl pairs": ({"train.jsonl": '{"text_b": "b", "text_a": "a", "label": "x"}\n'
                                    '{"text_a": "c", "text_b": "", "label": "y"}'}, [("a", "b"), ("c", "")]),
    "jsonl words": ({"train.jsonl": '{"words": ["a", "b"], "tags": ["O", "I-x"], "label": "x"}\n'
                                    '{"words": ["c"], "tags": ["B-x"], "label": "y"}'}, [["a", "b"], ["c"]]),
    "words": (JOINT, [["a", "b"], ["c"]]),
}  # fmt: skip


@pytest.mark.parametrize(("files", "texts"), OWN.values(), ids=OWN)
def test_own_data_of_every_kind(tmp_path, files, texts):
    """Folders of words and tags, and .tsv, .csv and .jsonl files, as spreadsheets and pandas write them."""
    samples = read_own(write(tmp_path, files))["train"]
    assert [sample[:2] for sample in samples] == list(zip(texts, "xy"))
    assert bool(find(str(tmp_path))[0].metrics) == (samples[0].tags is None)


@pytest.mark.parametrize(("files", "message"), [
    ({"dev.tsv": TABLE}, "no train split; .*seq.in"),
    ({"train.tsv": TABLE, "train.csv": "text,label\na,x\n"}, "train.tsv: a second train split"),
    ({"train.tsv": TABLE, "Valid.csv": "text,label\na,x\n"}, "Valid.csv: .* dev.csv"),
    ({"train.tsv": TABLE, "test.json": "{}"}, "test.json: .*jsonl"),
    ({"train.tsv": "sentence\tlabel\na\tx\n"}, "train.tsv:2: .*text.*sentence"),
    ({"train.tsv": "text\ttext_b\tlabel\na\tb\tx\n"}, "train.tsv:2: .*text_a or text_b"),
    ({"train.tsv": "text\ttext\tlabel\na\tb\tx\n"}, "train.tsv:2: .*text.*several"),
    ({"train.tsv": "text\tlabel\n"}, "train.tsv: no row"),
    ({"train.tsv": TABLE + "\tx\n"}, "train.tsv:3: no text"),
    ({"train.tsv": TABLE + "b\t \n"}, "train.tsv:3: label ''"),
    ({"train.tsv": TABLE + "\nb\ty\n"}, "train.tsv:3: 1 columns"),
    ({"train.csv": 'text,label\na,x\n"b" c,y\n'}, "train.csv:3: "),
    ({"train.csv": 'text,label\na,x\n"b,y\nc,y\nd,x\n'}, "train.csv:3: "),  # a quote that never closes
    ({"train.csv": 'text,label\na,x\n"b,y\nc,x\nd",x\ne,x\n'}, "train.csv:3: "),  # closed by a second stray one
    ({"train.csv": 'text, label\na, x\n"b, y\nc, x\nd", x\ne, y\n'}, "train.csv:3: "),  # with blanks at the commas
    ({"train.csv": 'label, text\nx, a\ny, "b\nx, c\ny, d"\nx, e\n'}, "train.csv:3: "),
    ({"train.csv": 'text,label\na, x\n"b, y\nc, x\nd", x\ne, y\n'}, "train.csv:3: "),  # but not in the header
    ({"train.csv": 'label,text\nx,a\ny,"b\n x,c\ny,d"\nx,e\n'}, "train.csv:3: "),
    ({"train.csv": 'text,label\na,x\n"b,y\n c,x\nd",x\ne,x\n'}, "train.csv:3: "),
    ({"train.csv": 'label,text\nx,"a\ny,b\nx,c"\n'}, "train.csv:2: "),
    ({"train.csv": 'text,label\n"a\nb",x\n"c\nd"\n'}, "train.csv:4: 1 columns"),
    ({"train.jsonl": '{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n'}, "train.jsonl:2: text"),
    ({"train.jsonl": '{"text": "a", "label": 1}\n["a", "x"]\n'}, "train.jsonl:2: .*JSON object"),
    ({"train.jsonl": '{"text": "\\ud800", "label": "x"}\n'}, "train.jsonl:1: "),
    ({"train.jsonl": '{"words": ["a b"], "tags": ["O"], "label": "x"}\n'}, r"train.jsonl:1: .*U\+0020"),
    ({"train.jsonl": '{"words": ["a"], "tags": ["O", "O"], "label": "x"}\n'}, "train.jsonl:1: 1 words but 2 tags"),
    ({**JOINT, "train/seq.in": "a b\nc\u00a0d\n"}, r"seq.in.*:2: .*U\+00A0"),
    ({**JOINT, "train/seq.in": "a \u2028\nc\n"}, r"seq.in.*:1: .*U\+2028"),
    ({**JOINT, "train/label": "x\n"}, "2 / 2 / 1 lines"),
    ({"train.tsv": TABLE, **{file.replace("train", "test"): text for file, text in JOINT.items()}}, "must be all"),
    ({"train/seq.in": "a"}, "train/seq.out: No such file"),
])  # fmt: skip
def test_own_data_that_is_off_is_refused_with_file_and_line(tmp_path, files, message):
    with refused_with(message):
        read_own(write(tmp_path, files))


def test_a_file_with_another_name_is_not_passed_over_in_silence(tmp_path, capsys):
    read_own(write(tmp_path, {"train.tsv": TABLE, "eval.csv": "text,label\na,x\n", "README.md": "mine"}))
    assert capsys.readouterr().out.count("warning: ") == 1


def test_a_link_to_nowhere_is_not_taken_for_a_split_that_is_not_there(tmp_path):
    """A dev set that cannot be read must not be replaced by a part of train."""
    (write(tmp_path, {"train.tsv": TABLE}) / "dev.tsv").symlink_to(tmp_path / "gone")
    with refused_with(r"dev.tsv: No such file"):
        read_own(tmp_path)


# ---- damaged files

DAMAGE = (  # of the lines of a file; each is refused
    lambda lines: [b"\xff" + lines[0], *lines[1:]],  # no UTF-8
    lambda lines: [b"", b""],
    lambda lines: [lines[0], b"", *lines[1:]],
    lambda lines: [lines[0], b"x\t" + lines[1], *lines[2:]],
)
INSERTED = [
    b"", b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"\t", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\xc2\x85", b"\xc2\xa0", b"\x1c", b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"null",
    b"true", b'"', b"\\ud800", b"[", b"[" * 3000, b"{}", b",", b"\\", b"B-", b"I-x", b"../../etc/passwd", "٣".encode(),
]  # fmt: skip
CHANGES = 50  # random ones, of each dataset
# The files that have one sample a line, and how many other lines each has. None of .csv, whose rows may have several.
LINES = {
    "snips": ("*/label", 0), "words": ("*/label", 0), "atis": ("atis.t*.query.csv", 0), "mtop": ("mtop/en/*", 0),
    "slurp": ("1.0/data/*", 0), "mrpc": ("msr*.txt", 1), "cola": ("*.tsv", 0), "jsonl": ("*.jsonl", 0),
}  # fmt: skip


def changed(rng, raw):
    """Return some bytes after a few random changes: lines go or change places, or bytes go or are put in."""
    for _ in range(rng.integers(1, 4)):
        lines = raw.split(b"\n")
        if rng.random() < 0.3:
            raw = b"\n".join(lines[i] for i in rng.permutation(len(lines))[rng.integers(2) :])
        else:
            at, n = rng.integers(len(raw) + 1), rng.choice([0, 1, 30, len(raw)])
            raw = raw[:at] + [rng.bytes(n % 40), *INSERTED][rng.integers(len(INSERTED) + 1)] + raw[at + n :]
    return raw


def check(name, source, folder, tokenizer):
    """Read a dataset. What comes out must be valid, and every line must be there."""
    splits = source.reader(folder)
    pattern, others = LINES.get(name.split()[0], ("*.tsv", 1))
    lines = [path.read_bytes().removesuffix(b"\n").count(b"\n") + 1 - others for path in folder.glob(pattern)]
    assert not lines or sum(lines) == sum(map(len, splits.values())), "rows were skipped silently"
    expect(all(map(len, splits.values())), folder, "an empty split, which data.read refuses")
    for samples in splits.values():
        split = encode(samples, tokenizer, 128, {}, {})
        assert len(split) == len(samples)
        assert split.lengths.min() >= 2 and len(split.tokens) == split.lengths.sum()


@pytest.mark.parametrize("name", [*RAW, *OWN])
def test_damaged_files_are_valid_or_refused_in_one_line(tmp_path, tokenizer, name):
    """Files of every dataset and every kind of a user's own, damaged in known ways, missing, or changed at random."""
    if name in OWN:
        source, folder = find(str(write(tmp_path, OWN[name][0])))
    else:
        make_raw(tmp_path, name)
        source, folder = find(name, tmp_path)
    check(name, source, folder, tokenizer)
    rng, refused = np.random.default_rng(0), 0
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    for path, raw in files.items() if name in RAW else ():
        for damage in (*DAMAGE, None):
            path.unlink()
            if damage:
                path.write_bytes(b"\n".join(damage(raw.removesuffix(b"\n").split(b"\n"))))
            with refused_with(str(path.parent)):
                source.reader(folder)
            path.write_bytes(raw)
    for path, raw in [list(files.items())[i] for i in rng.integers(len(files), size=CHANGES)]:
        path.write_bytes(changed(rng, raw))
        try:
            check(name, source, folder, tokenizer)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        path.write_bytes(raw)
    assert refused > CHANGES // 10


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), [
    ("snips", "train/seq.out", "B-", "b-", "seq.out.*:1: tag 'b-A'"),
    ("atis", "atis.train.slots.csv", "2 ", "9999 ", "slots.csv:1: "),
    ("atis", "atis.train.query.csv", "0 2 ", "2 ", "query.*:1: BOS"),
    ("atis", "atis.train.intent.csv", "\n", " 1\n", "intent.*:1: 2 intents"),
    ("mtop", "mtop/en/eval.txt", "IN:", "", "eval.txt:1: .*IN:"),
    ("mtop", "mtop/en/eval.txt", ":SL:", ":", "eval.txt:1: slots"),
    ("mtop", "mtop/en/eval.txt", "\"start\": 0", "\"start\": \"0\"", "eval.txt:1: .*tokenSpans"),
    ("mtop", "mtop/en/eval.txt", "\"tokens\": [", "\"tokens\": [\"x\", ", "eval.txt:1: .*tokenSpans"),
    ("mtop", "mtop/en/eval.txt", "\t6:13:", "\t9999:99999:", "eval.txt:1: slot 9999"),
    ("mtop", "mtop/en/eval.txt", "\t6:13:", "\t6:13:SL:x,6:13:", "eval.txt:1: slot 6:13"),
    ("slurp", "1.0/data/en-US.jsonl", '"intent": "', '"intent": " ", "x": "', "jsonl:1: .*label ' '"),
    ("slurp", "1.0/data/en-US.jsonl", '"annot_utt": "', '"annot_utt": "[date : ] ', "jsonl:1: .*name : words"),
    ("slurp", "1.0/data/en-US.jsonl", '"train"', '"trial"', "jsonl:1: partition 'trial'"),
    ("rte", "dev.tsv", "\tentailment", "\t1", "dev.tsv:2: label '1'"),
    ("mrpc", "mrpc_dev_ids.tsv", "50", "99", "mrpc_dev_ids.tsv:.: no row"),
])  # fmt: skip
def test_wrong_contents_are_refused(tmp_path, name, file, old, new, message):
    """What a reader relies on is checked: one short line says where it fails."""
    make_raw(tmp_path, name)
    source, folder = find(name, tmp_path)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    with refused_with(message):
        source.reader(folder)
