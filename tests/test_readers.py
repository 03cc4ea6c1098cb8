"""Readers take what is right, to the last row, and name what is wrong, with file and line."""

import json
from functools import cache
from itertools import cycle, islice

import pytest
from conftest import GLUE, LABELS, ROWS, glue_texts, make_raw, one_line, write

from data import FILES, DataError, find, load
from data.own import read_own
from data.readers import mtop_tags, read_massive
from metrics import spans

# ---- the real files

OFFICIAL = {  # labels, slot types and slots over all splits; of MTOP, no figure is published
    "snips": (7, 39, None), "atis": (26, 83, None), "mtop": None, "slurp": (60, 55, 11344 + 2012 + 2815),
    **dict.fromkeys(("cola", "sst2", "mrpc", "rte", "wnli"), (2, 0, 0)),
}  # fmt: skip


@cache
def real(name, raw):
    """Return the splits of a real dataset, as its reader gives them."""
    source, path = find(name, raw)
    return source.reader(path)


@pytest.mark.parametrize("name", OFFICIAL)
def test_real_files_hold_what_is_official(raw, name):
    """Rows, labels, slot types and slots are the published numbers."""
    splits = real(name, raw)
    assert tuple(map(len, splits.values())) == find(name, raw)[0].rows
    labels = {label for samples in splits.values() for label in samples.labels}
    slots = [kind for samples in splits.values() for tags in samples.tags or () for *_, kind in spans(tags)]
    for found, wanted in zip((labels, set(slots), slots), OFFICIAL[name] or ()):
        assert wanted in (None, len(found))


def test_mtop_slots_can_be_rebuilt_from_the_tags(raw):
    """An independent reading: byte offsets of each run of tags, written as upstream does, for all 6,621 rows."""
    splits, rows = real("mtop", raw), 0
    for split, file in (("dev", "eval.txt"), ("test", "test.txt")):
        lines = (raw / "mtop/mtop/en" / file).read_text(encoding="utf-8").removesuffix("\n").split("\n")
        for line, tags in zip(lines, splits[split].tags, strict=True):
            _, _, wanted, utterance, _, _, _, tokens = line.split("\t")
            slots, at = [], 0
            for word, tag in zip(json.loads(tokens)["tokens"], tags, strict=True):
                at = utterance.encode().index(word.encode(), at)  # found in the text, not taken from its span
                if tag[0] == "B":
                    slots.append([at, at, tag[2:]])
                at += len(word.encode())
                if tag != "O":
                    slots[-1][1] = at
            assert ",".join(f"{start}:{end}:SL:{name}" for start, end, name in slots) == wanted
            rows += 1
    assert rows == 6621


# ---- files of the right shape, which the tests make


@pytest.mark.parametrize("name", ROWS)
def test_every_reader_gives_back_what_was_written(tmp_path, tokenizer, capsys, name):
    """Text, tags and labels of every dataset, whatever the line ends. Unofficial counts are said."""
    rows = make_raw(tmp_path, name)
    assert load(name, tokenizer, tmp_path).train.lengths.min() > 2
    assert "officially" in capsys.readouterr().err
    source, path = find(name, tmp_path)
    splits = source.reader(path)
    assert splits.keys() == rows.keys()
    for split, samples in splits.items():
        words, tags, labels = map(list, zip(*rows[split]))
        if name in GLUE:
            pairs = [text if isinstance(text, tuple) else (text,) for text in samples.texts]
            assert pairs == [glue_texts(utterance)[: len(pairs[0])] for utterance in words]
            assert samples.labels == list(islice(cycle(LABELS[name]), len(words)))
        else:
            assert samples.texts == words and samples.tags == tags
            assert [label.removeprefix("IN:") for label in samples.labels] == labels
    for file in FILES[name]:
        (path / file.path).write_bytes(b"\xef\xbb\xbf" + (path / file.path).read_bytes().replace(b"\n", b"\r\n"))
    if name != "mrpc":  # whose file has a byte-order mark already
        assert source.reader(path) == splits


def test_massive_notation(tmp_path):
    """Slots are what stands in brackets after the colon. Two adjacent slots of one name stay two."""
    rows = [("train", "[a : x] [a : y z] w", "x y z w"), ("dev", "at [ time : five  am ] : now", "at five am : now")]
    rows = [{"partition": split, "intent": "i", "annot_utt": marked, "utt": text} for split, marked, text in rows]
    splits = read_massive(write(tmp_path, {"1.0/data/en-US.jsonl": map(json.dumps, rows)}))
    assert splits["train"].tags == [["B-a", "B-a", "I-a", "O"]]
    assert splits["dev"].tags == [["O", "B-time", "I-time", "O", "O"]] and splits["dev"].rows == [1]


def test_mtop_slots_are_counted_in_bytes():
    """Letters beyond ASCII have several. Two adjacent slots of one name stay two."""
    words, starts = ["café", "à", "deux", "x"], [0, 6, 9, 14]
    spans = [{"start": start, "length": len(word.encode())} for start, word in zip(starts, words)]
    assert mtop_tags(words, spans, "6:13:SL:A,14:15:SL:A", "here") == ["O", "B-A", "I-A", "B-A"]


# ---- the user's own data


TABLE = "text\tlabel\na\tx\n"
JOINT = {"train/seq.in": "a b\nc\n", "train/seq.out": "I-x O\nO\n", "train/label": "x\ny\n"}


@pytest.mark.parametrize(("files", "texts"), [
    ({"train.tsv": "text\tlabel\n\"a\" b\tx\nc\ty\n"}, ['"a" b', "c"]),  # without quoting
    ({"train.csv": 'label,text,,\nx, "a, ""b""",,\ny,c,,\n'}, ['a, "b"', "c"]),  # empty columns
    ({"train.csv": 'text,label\r\n"a, z\r\n\r\nb",x\r\n"c\r\n",y\r\n'}, ["a, z b", "c "]),  # line breaks in cells
    ({"train.tsv": "id\ttext_b\tlabel\ttext_a\n1\tb\tx\ta\n2\t\ty\tc\n"}, [("a", "b"), ("c", "")]),  # QQP has such rows
    ({"train.jsonl": '{"text": "a\\u2028b", "label": "x", "n": null}\n{"label": "y", "text": "c"}'}, ["a\u2028b", "c"]),
    ({"train.jsonl": '{"text_b": "b", "text_a": "a", "label": "x"}\n{"text_a": "c", "text_b": "", "label": "y"}'},
     [("a", "b"), ("c", "")]),
    ({"train.jsonl": '{"words": ["a", "b"], "tags": ["O", "I-x"], "label": "x"}\n'
                     '{"words": ["c"], "tags": ["B-x"], "label": "y"}'}, [["a", "b"], ["c"]]),
    (JOINT, [["a", "b"], ["c"]]),
])  # fmt: skip
def test_own_data_of_every_kind(tmp_path, files, texts):
    """Folders of words and tags, and .tsv, .csv and .jsonl files, as spreadsheets and pandas write them."""
    samples = read_own(write(tmp_path, files))["train"]
    assert samples.texts == texts and samples.labels == ["x", "y"]
    assert find(str(tmp_path))[0].classifies == (samples.tags is None)


@pytest.mark.parametrize(("files", "message"), [
    ({"dev.tsv": TABLE}, "no train split; .*seq.in"),
    ({"train.tsv": TABLE, "train.csv": "text,label\na,x\n"}, "train.tsv: a second train split"),
    ({"train.tsv": TABLE, "valid.csv": "text,label\na,x\n"}, "valid.csv: .* dev.csv"),
    ({"train.tsv": TABLE, "Test.tsv": TABLE}, "Test.tsv: .* test.tsv"),
    ({"train.tsv": TABLE, "test.json": "{}"}, "test.json: .*jsonl"),
    ({"train.tsv.gz": "a"}, "train.tsv.gz: .*jsonl"),
    ({"train.tsv": "sentence\tlabel\na\tx\n"}, "train.tsv:2: .*text.*sentence"),
    ({"train.tsv": "text\ttext_b\tlabel\na\tb\tx\n"}, "train.tsv:2: .*text_a or text_b"),
    ({"train.tsv": "text\ttext\tlabel\na\tb\tx\n"}, "train.tsv:2: .*text.*once"),
    ({"train.tsv": "text\tlabel\n"}, "train.tsv: no row"),
    ({"train.tsv": TABLE + "\tx\n"}, "train.tsv:3: no text"),
    ({"train.tsv": TABLE + "b\t \n"}, "train.tsv:3: label ''"),
    ({"train.tsv": TABLE + "\nb\ty\n"}, "train.tsv:3: 1 columns"),
    ({"train.csv": 'text,label\na,x\n"b" c,y\n'}, "train.csv:3: "),
    ({"train.csv": 'text,label\na,x\n"b,y\nc,y\nd,x\n'}, "train.csv:3: "),  # a quote that never closes
    ({"train.csv": 'text,label\na,x\n"b,y\nc,y\n"d",x\n'}, "train.csv:3: "),  # closed by one that opens a cell
    ({"train.csv": 'text,label\na,x\n"b,y\nc,x\nd",x\ne,x\n'}, "train.csv:3: "),  # closed by a second stray one
    ({"train.csv": 'text,label\n"a\nb",x\n"c\nd"\n'}, "train.csv:4: 1 columns"),
    ({"train.jsonl": '{"text": "a", "label": "x"}\n{"text": 5, "label": "x"}\n'}, "train.jsonl:2: text"),
    ({"train.jsonl": '{"text": "a", "label": 1}\n["a", "x"]\n'}, "train.jsonl:2: .*JSON object"),
    ({"train.jsonl": '{"text": "\\ud800", "label": "x"}\n'}, "train.jsonl:1: "),
    ({"train.jsonl": '{"words": ["a b"], "tags": ["O"], "label": "x"}\n'}, r"train.jsonl:1: .*U\+0020"),
    ({"train.jsonl": '{"words": ["a"], "tags": ["O", "O"], "label": "x"}\n'}, "train.jsonl:1: 1 words but 2 tags"),
    ({**JOINT, "train/seq.in": "a b\nc\u00a0d\n"}, r"seq.in.*:2: .*U\+00A0"),
    ({**JOINT, "train/seq.in": "a \u2028\nc\n"}, r"seq.in.*:1: .*U\+2028"),
    ({**JOINT, "train/label": "x\n"}, "2 / 2 / 1 lines"),
    ({"train.tsv": TABLE, "dev.tsv": "text_a\ttext_b\tlabel\na\tb\tx\n"}, "must be all"),
    ({"train.tsv": TABLE, **{file.replace("train", "test"): text for file, text in JOINT.items()}}, "must be all"),
    ({"train/seq.in": "a"}, "train/seq.out: No such file"),
])  # fmt: skip
def test_own_data_that_is_off_is_refused_with_file_and_line(tmp_path, files, message):
    with one_line(DataError, message):
        read_own(write(tmp_path, files))


def test_a_link_to_nowhere_is_not_taken_for_a_split_that_is_not_there(tmp_path):
    """A dev set that cannot be read must not be replaced by a part of train."""
    (write(tmp_path, {"train.tsv": TABLE}) / "dev.tsv").symlink_to(tmp_path / "gone")
    with one_line(DataError, r"dev.tsv: No such file"):
        read_own(tmp_path)


# ---- damaged files

DAMAGE = {
    "bad UTF-8": lambda lines: [lines[0], b"\xff" + lines[1], *lines[2:]],
    "blank lines only": lambda lines: [b"", b""],
    "an empty line": lambda lines: [*lines[:3], b"", *lines[3:]],
    "a stray tab": lambda lines: [*lines[:3], b"x\t" + lines[3], *lines[4:]],
}


@pytest.mark.parametrize("name", ROWS)
def test_damaged_files_are_refused(tmp_path, name):
    """Every file of every dataset, damaged in every way or missing: one line that names it, or its folder."""
    make_raw(tmp_path, name)
    source, folder = find(name, tmp_path)
    for path in [folder / file.path for file in FILES[name]]:
        intact = path.read_bytes()
        for damage in (*DAMAGE.values(), None):
            path.unlink()
            if damage:
                path.write_bytes(b"\n".join(damage(intact.removesuffix(b"\n").split(b"\n"))))
            with one_line(DataError, str(path.parent)):
                source.reader(folder)
            path.write_bytes(intact)


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), [
    ("snips", "train/seq.out", "B-", "b-", r"seq.out.*:\d+: tag 'b-\w+'"),
    ("snips", "train/seq.out", "O O", "O", r"seq.out.*:\d+: \d words but \d tags"),
    ("atis", "atis.train.slots.csv", "42 ", "9999 ", "slots.csv:1: "),
    ("atis", "atis.train.query.csv", "0 ", "2 ", "query.*:1: BOS"),
    ("atis", "atis.train.intent.csv", "\n", " 1\n", "intent.*:1: 2 intents"),
    ("mtop", "mtop/en/eval.txt", "IN:", "", "eval.txt:1: .*IN:"),
    ("mtop", "mtop/en/eval.txt", ":SL:", ":", "eval.txt:1: slots"),
    ("mtop", "mtop/en/eval.txt", "\"start\": 0", "\"start\": \"0\"", "eval.txt:1: .*tokenSpans"),
    ("mtop", "mtop/en/eval.txt", "\"tokens\": [", "\"tokens\": [\"x\", ", "eval.txt:1: .*tokenSpans"),
    ("mtop", "mtop/en/eval.txt", "\t9:15:", "\t9999:99999:", r"eval.txt:\d+: slot 9999"),
    ("mtop", "mtop/en/eval.txt", "\t9:15:", "\t9:15:SL:x,9:15:", r"eval.txt:\d+: slot 9:15"),
    ("slurp", "1.0/data/en-US.jsonl", '"intent": "', '"intent": " ", "x": "', "jsonl:1: .*label ' '"),
    ("slurp", "1.0/data/en-US.jsonl", '"utt": "', '"utt": 5, "x": "', "jsonl:1: .*utt"),
    ("slurp", "1.0/data/en-US.jsonl", '"annot_utt": "', '"annot_utt": "[date : ] ', "jsonl:1: .*name : words"),
    ("slurp", "1.0/data/en-US.jsonl", '"train"', '"trial"', "jsonl:1: partition 'trial'"),
    ("cola", "train.tsv", "\t0\t", "\t2\t", "train.tsv:1: label '2'"),
    ("rte", "dev.tsv", "\tentailment", "\t1", "dev.tsv:2: label '1'"),
    ("mnli", "train.tsv", "gold_label", "label", "train.tsv:2: .*gold_label"),
    ("mrpc", "mrpc_dev_ids.tsv", "1120", "9999", "mrpc_dev_ids.tsv:1: no row"),
])  # fmt: skip
def test_wrong_contents_are_refused(tmp_path, name, file, old, new, message):
    """What a reader relies on is checked: one short line says where it fails."""
    make_raw(tmp_path, name)
    source, folder = find(name, tmp_path)
    text = (folder / file).read_text(encoding="utf-8")
    assert old in text
    (folder / file).write_text(text.replace(old, new), encoding="utf-8")
    with one_line(DataError, message):
        source.reader(folder)
