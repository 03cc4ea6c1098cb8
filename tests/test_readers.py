"""Readers take what is right, to the last row, and name what is wrong, with file and line."""

import json
import re
from itertools import cycle, islice
from pathlib import Path

import pytest
from conftest import GLUE, LABELS, ROWS, glue_texts, make_raw

import train
from data import DATASETS, DataError, load, read, unofficial
from data.readers import mtop_tags, read_massive, read_own, read_parallel
from metrics import spans

# ---- the real files


@pytest.mark.parametrize("name", [name for name in DATASETS if name not in ("demo", "qnli", "qqp", "mnli")])
def test_real_files_hold_what_is_official(raw, tokenizer, name):
    source = DATASETS[name]
    splits = source.reader(raw / source.folder)
    assert unofficial(source, splits) == ""
    assert tuple(map(len, splits.values())) == source.rows
    data = load(name, tokenizer, raw)
    assert list(data.splits)[:2] == ["train", "dev"]
    assert [split.lost for split in data.splits.values()] == [0] * len(data.splits)


def test_qnli_dev_has_its_official_rows(raw):
    source = DATASETS["qnli"]
    assert len(source.reader(raw / source.folder, splits={"dev": "dev"})["dev"]) == source.rows[1]


def test_atis_has_no_sentence_boundaries_and_a_dev_set_from_train(raw, tokenizer, capsys):
    splits = read("atis", raw)
    assert [(split, len(examples)) for split, examples in splits.items()] == [
        ("train", 4480), ("dev", 498), ("test", 893)]  # fmt: skip
    assert "498 of its 4978 train examples are held out" in capsys.readouterr().out
    assert splits["test"].texts[0][:3] == ["i", "would", "like"]
    assert not any({"BOS", "EOS"} & set(words) for examples in splits.values() for words in examples.texts)
    data = load("atis", tokenizer, raw)
    assert data.n_labels < len(data.labels)  # test has intents that train does not: they must count as errors
    assert (data.evaluation["test"].labels >= data.n_labels).any()


def test_slurp_has_the_published_number_of_slots(raw):
    splits = read("slurp", raw)
    counts = [[len(spans(tags)) for tags in examples.tags] for examples in splits.values()]
    assert [sum(row) for row in counts] == [11344, 2012, 2815]
    assert [row.count(0) for row in counts] == [3755, 646, 994]


def test_mtop_slots_can_be_rebuilt_from_the_tags(raw):
    """An independent reading: byte offsets of each run of tags, written as upstream does, for all 6,621 rows."""
    splits = read("mtop", raw)
    rows = 0
    for split, file in (("dev", "eval.txt"), ("test", "test.txt")):
        with open(raw / "mtop/mtop/en" / file, encoding="utf-8", newline="\n") as lines:
            for line, tags in zip(lines, splits[split].tags, strict=True):
                _, _, wanted, utterance, _, _, _, tokens = line.rstrip("\n").split("\t")
                found, slots, at = json.loads(tokens), [], 0
                for word, span, tag in zip(found["tokens"], found["tokenSpans"], tags, strict=True):
                    at = utterance.encode().index(word.encode(), at)  # found in the text, not taken from its span
                    if tag[0] == "B":
                        slots.append([at, at, tag[2:]])
                    at += len(word.encode())
                    if tag != "O":
                        slots[-1][1] = at
                    assert at == span["start"] + span["length"]
                assert ",".join(f"{start}:{end}:SL:{name}" for start, end, name in slots) == wanted
                rows += 1
    assert rows == 6621


def test_massive_marks_can_be_read_without_a_pattern(raw):
    """A second reading: no mark is in another, so that text and marks take turns between brackets."""
    splits = read("slurp", raw)
    again = {split: [] for split in splits}
    with open(raw / "slurp/1.0/data/en-US.jsonl", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            tags = []
            for turn, part in enumerate(row["annot_utt"].replace("]", "[").split("[")):
                name, colon, words = part.partition(" : ")
                assert bool(colon) == turn % 2
                tags += [f"{'I' if i else 'B'}-{name.strip()}" if colon else "O"
                         for i, _ in enumerate((words if colon else part).split())]  # fmt: skip
            again[row["partition"]].append(tags)
    assert all(again[split] == examples.tags for split, examples in splits.items())


def test_quotes_of_glue_are_text(raw):
    """A quote that opens a cell swallows nothing."""
    splits = read("mrpc", raw)
    lines = (raw / "glue/MRPC/msr_paraphrase_train.txt").read_bytes().decode("utf-8-sig").split("\n")[1:]
    quotes = sum(text.count('"') for examples in splits.values() for pair in examples.texts for text in pair)
    assert quotes == sum(line.count('"') for line in lines) > 1000


# ---- files of the right shape, which the tests make


@pytest.mark.parametrize("name", ROWS)
def test_every_reader_gives_back_what_was_written(tmp_path, capsys, name):
    rows = make_raw(tmp_path, name)
    splits = read(name, tmp_path)
    assert "officially" in capsys.readouterr().err  # the counts differ, which is said, and harmless
    if name == "atis":
        assert [len(splits[split]) for split in ("train", "dev", "test")] == [54, 6, 10]  # a tenth of train
        splits["train"] = DATASETS[name].reader(tmp_path / "atis")["train"]
        del splits["dev"]
    assert splits.keys() == rows.keys()
    for split, examples in splits.items():
        words, tags, labels = map(list, zip(*rows[split]))
        if name in GLUE:
            pairs = [text if isinstance(text, tuple) else (text,) for text in examples.texts]
            assert pairs == [glue_texts(utterance)[: len(pairs[0])] for utterance in words]
            assert examples.labels == list(islice(cycle(LABELS[name]), len(words)))
        else:
            assert examples.texts == words and examples.tags == tags
            assert [label.removeprefix("IN:") for label in examples.labels] == labels


@pytest.mark.parametrize("name", ["demo", *ROWS])
def test_every_dataset_trains(tmp_path, tiny, name):
    """With a tiny model; the metrics are those of the task."""
    if name != "demo":
        make_raw(tmp_path, name)
    row = train.run(train.parse(["--dataset", name, "--data-dir", str(tmp_path), "--model", tiny, "--keep", "0.5",
                                 "--max-train", "512", "--epochs", "3", "--batch-size", "8", "--no-model", "--out",
                                 str(tmp_path / "runs")]))  # fmt: skip
    wanted = {"cola": ["matthews", "accuracy"], "mrpc": ["accuracy", "f1"], "qqp": ["accuracy", "f1"]}
    joint = ["intent_acc", "slot_f1", "frame_acc", "slot_token_acc"]
    for split in set(row["rows"]) - {"train"}:
        assert list(row[split]) == (joint if not DATASETS[name].metrics else wanted.get(name, ["accuracy"]))
    assert ("test" in row) == (not DATASETS[name].metrics)
    assert ("dev_mismatched" in row) == (name == "mnli")


# ---- what readers make of special cases


@pytest.mark.parametrize(("marked", "words", "tags"), [
    ("play jazz", "play jazz", "O O"),
    ("[date : this week]", "this week", "B-date I-date"),
    ("[a : x] [a : y z] w", "x y z w", "B-a B-a I-a O"),  # two adjacent slots of one name stay two
    ("at [ time : five  am ] : now", "at five am : now", "O B-time I-time O O"),
])  # fmt: skip
def test_massive_notation(tmp_path, marked, words, tags):
    row = {"intent": "x", "utt": words, "annot_utt": marked}
    rows = [{**row, "partition": split} for split in ("train", "dev", "test")]
    (tmp_path / "1.0/data").mkdir(parents=True)
    (tmp_path / "1.0/data/en-US.jsonl").write_text("\n".join(map(json.dumps, rows)))
    examples = read_massive(tmp_path)["train"]
    assert examples.texts == [words.split()] and examples.tags == [tags.split()]


def tags_of_mtop(utterance, slots):
    spans, at = [], 0
    for word in utterance.split():
        at = utterance.encode().index(word.encode(), at)
        spans.append({"start": at, "length": len(word.encode())})
        at += len(word.encode())
    return " ".join(mtop_tags(utterance.split(), spans, slots, "here"))


@pytest.mark.parametrize(("utterance", "slots", "tags"), [
    ("call Nicholas and Natasha", "5:13:SL:CONTACT,18:25:SL:CONTACT", "O B-CONTACT O B-CONTACT"),  # one-word slots
    ("café à deux", "6:8:SL:A,9:13:SL:B", "O B-A B-B"),  # bytes, not letters
    ("buy a b c", "4:7:SL:X,8:9:SL:X", "O B-X I-X B-X"),  # adjacent slots of one name
    ("buy a b c", "", "O O O O"),
    ("half-way home", "0:4:SL:X", "B-X O"),  # a slot that ends within a word covers it
    ("a b c", "2:3:SL:Y,0:5:SL:X", "B-X I-X I-X"),  # of slots in one another, the outer one
    ("a b c", "0:3:SL:X,2:5:SL:Y", "B-X I-X B-Y"),  # of slots that overlap, the one that begins first
])  # fmt: skip
def test_mtop_slots(utterance, slots, tags):
    assert tags_of_mtop(utterance, slots) == tags


def test_windows_line_ends_and_byte_order_marks_are_read(tmp_path):
    for name, text in (("seq.in", "\ufeffplay some jazz\r\nplay some soul\r\nstop it now"),
                       ("seq.out", "O O B-genre\r\n" * 3), ("label", "a\r\nb\r\na\r\n")):  # fmt: skip
        (tmp_path / name).write_bytes(text.encode())
    examples = read_parallel(tmp_path)
    assert examples.texts == [["play", "some", "jazz"], ["play", "some", "soul"], ["stop", "it", "now"]]
    assert examples.labels == ["a", "b", "a"] and examples.tags[2] == ["O", "O", "B-genre"]


@pytest.mark.parametrize("name", ROWS)
def test_windows_line_ends_change_nothing(tmp_path, name):
    source = DATASETS[name]
    make_raw(tmp_path, name)
    wanted = source.reader(tmp_path / source.folder)
    for path in (path for path in tmp_path.rglob("*") if path.is_file()):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert source.reader(tmp_path / source.folder) == wanted


def test_an_i_tag_after_nothing_is_kept_for_the_metric_to_open_a_span(tmp_path):
    for name, text in (("seq.in", "a b"), ("seq.out", "I-x O"), ("label", "y")):
        (tmp_path / name).write_text(text)
    assert read_parallel(tmp_path).tags == [["I-x", "O"]]


def test_what_a_user_may_not_expect_is_said(tmp_path, tokenizer, capsys):
    (tmp_path / "train.tsv").write_text("text\tlabel\n" + "play it now please\ton\nplay\ton\n" * 8)
    (tmp_path / "dev.tsv").write_text("text\tlabel\nplay\ton\nplay\tOn\nplay\toff\n")
    load(str(tmp_path), tokenizer, max_length=4)
    assert capsys.readouterr().out.replace(f"{tmp_path}: ", "").splitlines() == [
        "all train examples have the label 'on': there is nothing to tell apart",
        "8 of 16 train examples are cut off after 4 tokens",
        "2 of 3 dev examples have a label that train lacks: they count as errors",
    ]


def test_one_text_of_a_pair_may_be_empty(tmp_path):
    """QQP has such rows."""
    (tmp_path / "train.tsv").write_text("text_a\ttext_b\tlabel\na\t\tx\n\tb\ty\n")
    assert read_own(tmp_path)["train"].texts == [("a", ""), ("", "b")]


def test_a_link_to_nowhere_is_not_taken_for_a_split_that_is_not_there(tmp_path):
    (tmp_path / "train.tsv").write_text(OWN_TABLE)
    (tmp_path / "dev.tsv").symlink_to(tmp_path / "gone")
    with pytest.raises(DataError, match=r"dev.tsv: No such file"):
        read_own(tmp_path)


# ---- the user's own data


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("files", "texts"), [
    ({"train.tsv": "text\tlabel\n\"a\" b\tx\nc\ty\n"}, ['"a" b', "c"]),  # without quoting
    ({"train.csv": 'label,text\nx, "a, ""b"""\ny,c\n'}, ['a, "b"', "c"]),
    ({"train.tsv": "id\ttext_b\tlabel\ttext_a\n1\tb\tx\ta\n2\td\ty\tc\n"}, [("a", "b"), ("c", "d")]),
    ({"train/seq.in": "a b\nc\n", "train/seq.out": "O B-x\nO\n", "train/label": "x\ny\n"}, [["a", "b"], ["c"]]),
])  # fmt: skip
def test_own_data_of_every_kind(tmp_path, files, texts):
    examples = read_own(write(tmp_path, files))["train"]
    assert examples.texts == texts and examples.labels == ["x", "y"]


OWN_TABLE = "text\tlabel\n" + "play it\ton\nstop it\toff\n" * 30


@pytest.mark.parametrize(("splits", "rows"), [
    (["train", "dev", "test"], {"train": 60, "dev": 60, "test": 60}),
    (["train", "test"], {"train": 54, "dev": 6, "test": 60}),
    (["train", "dev"], {"train": 60, "dev": 60}),
    (["train"], {"train": 54, "dev": 6}),
])  # fmt: skip
def test_own_data_trains_with_whichever_splits_there_are(tmp_path, tiny, capsys, splits, rows):
    """Without dev, a part of train is held out; without test, what is reported is dev's, and said to be so."""
    write(tmp_path / "mine", {f"{split}.tsv": OWN_TABLE for split in splits})
    status = train.main(["--dataset", str(tmp_path / "mine"), "--model", tiny, "--epochs", "3", "--batch-size", "8",
                         "--no-model", "--out", str(tmp_path / "runs")])  # fmt: skip
    assert status == 0
    said = capsys.readouterr().out
    assert "have a label that train lacks" not in said and "are cut off" not in said
    row = json.loads((tmp_path / "runs/results.jsonl").read_text())
    assert row["rows"] == rows
    assert ("6 of its 60 train examples are held out" in said) == ("dev" not in splits)
    assert ("there is no test split" in said) == ("test" not in splits)
    assert Path(row["folder"]).name.startswith("mine-el2n-0.5-seed0")


@pytest.mark.parametrize(("files", "message"), [
    ({"dev.tsv": "text\tlabel\na\tx\n"}, "no train split; train.tsv or train.csv"),
    ({"train.tsv": "text\tlabel\na\tx\n", "train.csv": "text,label\na,x\n"}, "train.tsv: a second train split; one"),
    ({"train.tsv": "sentence\tlabel\na\tx\n"}, "train.tsv:1: one column named 'text' was expected among .* 'sentence'"),
    ({"train.tsv": "text_a\tlabel\na\tx\n"}, "train.tsv:1: one column named 'text_b' was expected"),
    ({"train.tsv": "text\ttext_b\tlabel\na\tb\tx\n"}, "train.tsv:1: columns text, text_a and text_b; either"),
    ({"train.tsv": "text\tlabel\na\tx\n", "Dev.tsv": "text\tlabel\na\tx\n"}, "Dev.tsv: dev.tsv was expected as"),
    ({"train.tsv": OWN_TABLE, "valid.csv": "text,label\na,x\n"}, "valid.csv: dev.csv was expected as its name"),
    ({"train": "text\tlabel\na\tx\n"}, "train/seq.in: Not a directory"),
    ({"train.tsv": "text\ttext\tlabel\na\tb\tx\n"}, "train.tsv:1: one column named 'text'"),
    ({"train.tsv": "text\tlabel\n"}, "train.tsv: no row below the header"),
    ({"train.tsv": "text\tlabel\na\tx\n\tx\n"}, "train.tsv:3: no text in column text"),
    ({"train.tsv": "text\tlabel\na\tx\nb\t \n"}, "train.tsv:3: label ''; any text"),
    ({"train.csv": 'text,label\na,x\n"b" c,y\n'}, "train.csv:3: .*a whole row a line was expected"),
    ({"train.csv": 'text,label\na,x\n"b,y\nc,y\nfoo",x\n'}, "train.csv:3: .*a whole row a line"),  # not at 5
    ({"train.csv": "text,label\na,x\n\nb,y\n"}, "train.csv:3: an empty line; remove it"),
    ({"train.tsv": "text\tlabel\na\tx\n", "dev.tsv": "text_a\ttext_b\tlabel\na\tb\tx\n"}, "must be all of words"),
    ({"train.tsv": "text\tlabel\na\tx\n", "test/seq.in": "a", "test/seq.out": "O", "test/label": "x"}, "must be all"),
    ({"train/seq.in": "a"}, "train/seq.out: No such file"),
])  # fmt: skip
def test_own_data_that_is_off_is_refused(tmp_path, files, message):
    with pytest.raises(DataError, match=message) as caught:
        read_own(write(tmp_path, files))
    assert "\n" not in str(caught.value)


# ---- damaged files

DAMAGE = {
    "bad UTF-8": lambda lines: [lines[0], b"\xff" + lines[1], *lines[2:]],
    "an empty file": lambda lines: [],
    "blank lines only": lambda lines: [b"", b""],
    "a cut line": lambda lines: [*lines[:3], lines[3][: len(lines[3]) // 2], *lines[4:]],
    "an empty line": lambda lines: [*lines[:3], b"", *lines[3:]],
    "a stray tab": lambda lines: [*lines[:3], b"x\t" + lines[3], *lines[4:]],
    "a missing file": None,
}

# Where a line was cut in these, enough is left to be another label, another word, or a shorter text.
UNSEEN = {
    ("snips", "label"), ("atis", "atis.dict.vocab.csv"), ("atis", "atis.dict.slots.csv"),
    ("atis", "atis.dict.intent.csv"), ("cola", "train.tsv"), ("cola", "dev.tsv"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ROWS)
def test_damaged_files_are_refused(tmp_path, name, damage):
    """Every file of every dataset, damaged in every way: one line that says where."""
    source = DATASETS[name]
    make_raw(tmp_path, name)
    for file in source.files:
        path = tmp_path / source.folder / file.path
        intact = path.read_bytes()
        if DAMAGE[damage] is None:
            path.unlink()
        else:
            path.write_bytes(b"\n".join(DAMAGE[damage](intact.removesuffix(b"\n").split(b"\n"))))
        if damage == "a cut line" and (name, Path(file.path).name) in UNSEEN:
            source.reader(tmp_path / source.folder)
        else:
            with pytest.raises(DataError) as caught:
                source.reader(tmp_path / source.folder)
            message, whole = str(caught.value), damage in ("an empty file", "blank lines only", "a missing file")
            assert "\n" not in message and str(path.parent) in message
            assert whole or re.search(r"\w:[0-9]+: |has [0-9]+; line i of each", message), message
        path.write_bytes(intact)


@pytest.mark.parametrize(("name", "file", "old", "new", "message"), [
    ("snips", "train/seq.out", "B-", "b-", r"train/seq.out:\d+: tag 'b-\w+' is not of the form O, B-name or I-name"),
    ("snips", "train/seq.out", "O O", "O", r"train/seq.out:\d+: \d words but \d tags"),
    ("atis", "atis.train.slots.csv", "42 ", "9999 ", r"train.slots.csv:1: an index outside 0..\d+, the lines of"),
    ("atis", "atis.train.query.csv", "0 ", "2 ", r"train.query.csv:1: must start with BOS"),
    ("atis", "atis.train.intent.csv", "\n", " 1\n", r"train.intent.csv:1: one intent was expected, not 2"),
    ("mtop", "mtop/en/eval.txt", "IN:", "", r"eval.txt:1: 8 columns; 8 with an intent IN:"),
    ("mtop", "mtop/en/eval.txt", ":SL:", ":", r"eval.txt:1: .* slots start:end:SL:NAME"),
    ("mtop", "mtop/en/eval.txt", "\"start\": 0", "\"start\": \"0\"", r"eval.txt:1: .*tokenSpans of start and length"),
    ("mtop", "mtop/en/eval.txt", "\"tokens\": [", "\"tokens\": [\"x\", ", r"eval.txt:1: .*a span for every token"),
    ("mtop", "mtop/en/eval.txt", "\"tokens\": [\"", "\"tokens\": [1, \"", r"eval.txt:1: "),
    ("mtop", "mtop/en/eval.txt", "\t9:15:", "\t9999:99999:", r"eval.txt:\d+: .*a token in every slot were expected"),
    ("mtop", "mtop/en/eval.txt", ":SL:", ":XX:", r"eval.txt:1: .* slots start:end:SL:NAME"),
    ("mtop", "mtop/en/eval.txt", "\"tokens\": [\"", "\"tokens\": [\"\\ud800", r"eval.txt:1: .*a JSON object with"),
    ("atis", "atis.test.query.csv", " 1\n", "\n", r"test.query.csv:1: must start with BOS, end with EOS"),
    ("atis", "atis.train.slots.csv", "42 ", "-1 ", r"train.slots.csv:1: an index outside 0..\d+, the lines of"),
    ("slurp", "1.0/data/en-US.jsonl", '"intent": "', '"intent": " ", "x": "', r"jsonl:1: a partition .* an intent"),
    ("slurp", "1.0/data/en-US.jsonl", '"utt": "', '"utt": 5, "x": "', r"en-US.jsonl:1: .*a JSON object"),
    ("slurp", "1.0/data/en-US.jsonl", '"annot_utt": "', '"annot_utt": "[date : ] ', r"en-US.jsonl:1: .*slots as"),
    ("slurp", "1.0/data/en-US.jsonl", '"train"', '"trial"', r"en-US.jsonl:1: a partition train, dev or test"),
    ("slurp", "1.0/data/en-US.jsonl", '"dev"', '"train"', r"en-US.jsonl: no row of partition dev"),
    ("slurp", "1.0/data/en-US.jsonl", " : ", " ", r"en-US.jsonl:1: .*slots as \[name : words\]"),
    ("slurp", "1.0/data/en-US.jsonl", '"utt": "', '"utt": "x ', r"en-US.jsonl:1: .*an annot_utt that is utt"),
    ("slurp", "1.0/data/en-US.jsonl", '"intent"', '"intend"', r"en-US.jsonl:1: .* a JSON object with partition"),
    ("slurp", "1.0/data/en-US.jsonl", "{", "[" * 100_000, r"en-US.jsonl:1: '\[\[.*a JSON object"),
    ("cola", "train.tsv", "\t0\t", "\t2\t", r"train.tsv:1: label '2'; one of 0, 1 was expected in column 'label'"),
    ("rte", "dev.tsv", "\tentailment", "\t1", r"dev.tsv:2: label '1'; one of entailment, not_entailment was expected"),
    ("mnli", "train.tsv", "gold_label", "label", r"train.tsv:1: one column named 'gold_label' was expected among"),
    ("mrpc", "mrpc_dev_ids.tsv", "1120", "9999", r"mrpc_dev_ids.tsv:1: two ids of a row of .*train.txt were expected"),
])  # fmt: skip
def test_wrong_contents_are_refused(tmp_path, name, file, old, new, message):
    source = DATASETS[name]
    make_raw(tmp_path, name)
    path = tmp_path / source.folder / file
    assert old in path.read_text(encoding="utf-8")
    path.write_bytes(path.read_bytes().replace(old.encode(), new.encode()))
    with pytest.raises(DataError, match=message) as caught:
        source.reader(tmp_path / source.folder)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
