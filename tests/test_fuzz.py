"""Whatever is read from outside may be damaged or hostile: either it is valid, or it is refused by one line of ours.

Every dataset's reader is fuzzed on the files that conftest.make_raw writes, and a user's folders of every kind.
A short form of what `tests/faults.py` does at length.
"""

import hashlib
import io
import json
import shutil
import signal
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import make_raw

import report
import train
from data import DATASETS, DataError, ModelError, load, load_tokenizer
from models import NLUModel, load_encoder


class Subject(NamedTuple):
    """Something that is read."""

    write: Callable  # folder → None: a small valid input
    read: Callable  # folder → None: read it, check what comes out, AssertionError where that is wrong
    refusals: tuple = ()  # the errors of ours that may come instead
    mend: Callable = lambda folder: None  # after a file was mutated: make its checksum right


# ---- datasets

OWN = {  # a user's folders, of every kind: {name: {file: text}}
    "own joint": {f"{split}/{file}": text * 8 for split in ("train", "dev", "test")
                  for file, text in (("seq.in", "play some jazz \nwake me at 7\n"), ("label", "a\nb\n"),
                                     ("seq.out", "O O B-genre\nO O O B-time\n"))},
    "own tsv": {"train.tsv": "text\tlabel\n" + "play it\ton\nstop it\toff\n" * 8, "test.tsv": "text\tlabel\nx\ton\n"},
    "own csv": {"train.csv": "label,text_b,text_a\n" + 'on,"play, it",now\noff,stop,"the ""it"""\n' * 8},
}  # fmt: skip
DATASET_FILES = [*(name for name in DATASETS if name != "demo"), *OWN]


def write_dataset(folder, name):
    if name in OWN:
        for file, text in OWN[name].items():
            (folder / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folder / name / file).write_text(text)
    else:
        make_raw(folder, name)


def rows_of(folder, name):
    """How many rows the files of a dataset have, as an editor shows them."""
    where = folder / (name if name in OWN else DATASETS[name].folder)
    files = {"atis": "atis.t*.query.csv", "mrpc": "msr*.txt", "mtop": "mtop/en/*", "slurp": "1.0/data/*"}.get(name)
    paths = where.glob(files or ("*/label" if name in ("snips", "own joint") else "*.?sv"))
    header = (files is None and name not in ("snips", "own joint", "cola")) or name == "mrpc"
    return sum(path.read_bytes().removesuffix(b"\n").count(b"\n") + (0 if header else 1) for path in paths)


def dataset(name, tokenizer):
    def read(folder):
        data = load(str(folder / name) if name in OWN else name, tokenizer, folder)
        splits = data.splits.values()
        assert rows_of(folder, name) == sum(map(len, splits)), "rows were skipped silently"
        for split in splits:
            assert split.labels.min() >= 0 and split.labels.max() < len(data.labels)
            assert split.tags is None or split.tags.max() < len(data.tags)
            assert split.lengths.min() >= 2 and len(split.tokens) == split.lengths.sum()

    return Subject(lambda folder: write_dataset(folder, name), read, (DataError,))


# ---- what runs leave


IDENTITY = {"lr": 1e-3, "weights": [[3, 4], [5]]}
STATE = {"identity": IDENTITY, "step": 7, "kept": np.arange(50), "log": [{"epoch": 1, "loss": 0.5}],
         "seconds": {"train": 1.5}, "smooth": {"mean": np.linspace(0, 1, 50), "variance": None, "alpha": 0.8},
         "optimizer": {"master": np.ones(17, np.float32), "step": np.array(3, np.float32)}}  # fmt: skip


def write_checkpoint(folder):
    report.save_checkpoint(folder, STATE)


def read_checkpoint(folder):
    state = report.load_checkpoint(folder, IDENTITY)
    gone = not (folder / "checkpoint.pt").exists()
    assert repr(state) == repr(None if gone else STATE), "damage was taken for good"


def read_sealed_checkpoint(folder):
    state = report.load_checkpoint(folder, IDENTITY)  # of damage under a right checksum, only this much is promised
    assert state is None or state["identity"] == IDENTITY


def seal(folder):
    """Give a damaged checkpoint the checksum of what it holds."""
    body = (folder / "checkpoint.pt").read_bytes()[32:]
    (folder / "checkpoint.pt").write_bytes(hashlib.sha256(body).digest() + body)


def write_config(folder):
    args = train.parse(["--device", "cpu", "--precision", "fp32"])
    facts = {"folder": str(folder), "args": report.flags(args), "environment": report.environment("cpu")}
    (folder / "config.json").write_text(json.dumps(facts, indent=1))


def read_config(folder):
    args = train.parse(["--resume", str(folder)])
    assert set(vars(args)) == set(vars(train.parse([]))) and args.out == str(folder.parent)


def write_rows(folder):
    args = report.flags(train.parse(["--device", "cpu", "--precision", "fp32"]))
    for seed in range(2):
        for method in ("full", "el2n"):
            report.append_line(folder / "results.jsonl", {
                "folder": f"runs/{method}-{seed}", "args": {**args, "method": method, "seed": seed},
                "environment": report.environment("cpu"), "test": {"intent_acc": 98.5, "frame_acc": 90.25},
                "seconds": {"total": 12.5}})  # fmt: skip


def read_rows(folder):
    path = folder / "results.jsonl"
    errors = io.StringIO()
    with redirect_stderr(errors):
        rows, status = report.read_rows([path]), report.main([str(path)])
    assert status == (0 if rows else 2)
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    assert len(rows) + len(errors.getvalue().splitlines()) // 2 == len(lines), "a line was skipped silently"


def write_model(source):
    def write(folder):
        shutil.copytree(source, folder / "model")
        model = NLUModel(load_encoder(source), load_tokenizer(source), ["a", "b"], ["O", "B-x"])
        model.save(folder / "model")
        for path in (folder / "model").iterdir():  # the others are transformers' business, and slow to read
            if path.name not in ("labels.json", "heads.safetensors", "model.safetensors"):
                path.chmod(0o444)

    return write


def read_model(folder):
    model = NLUModel.load(folder / "model")
    (label, words), = model.predict(["wake me up"])
    assert label in model.labels and len(model.labels) == 2 and [word for word, _ in words] == ["wake", "me", "up"]
    assert all(isinstance(name, str) for name in (*model.labels, *model.tags))


def subjects(scratch, model):
    """{name: Subject} of all that is read. model: folder of a small encoder."""
    tokenizer = load_tokenizer(model)
    return {
        **{name: dataset(name, tokenizer) for name in DATASET_FILES},
        "checkpoint": Subject(write_checkpoint, read_checkpoint, (report.RunError,)),
        "sealed checkpoint": Subject(write_checkpoint, read_sealed_checkpoint, (report.RunError,), seal),
        "config.json": Subject(write_config, read_config, (report.RunError, SystemExit)),
        "results.jsonl": Subject(write_rows, read_rows),
        "model folder": Subject(write_model(model), read_model, (ModelError,)),
    }


# ---- mutation


def mutate(rng, raw):
    """A few random changes to some bytes; None: the file is gone."""
    if rng.random() < 0.01:
        return None
    for _ in range(rng.integers(1, 4)):
        at, n = int(rng.integers(len(raw) + 1)), int(rng.integers(1, 40))
        lines = raw.split(b"\n")
        line = int(rng.integers(len(lines)))
        match rng.integers(8):
            case 0:
                raw = raw[:at] + bytes(byte ^ 1 << int(rng.integers(8)) for byte in raw[at : at + 1]) + raw[at + 1 :]
            case 1:
                raw = raw[:at]
            case 2:
                raw = raw[:at] + raw[at + n :]
            case 3:
                raw = raw[:at] + rng.bytes(n) + raw[at:]
            case 4:
                raw = raw[:at] + INSERTED[rng.integers(len(INSERTED))] + raw[at:]
            case 5:
                raw = b"\n".join(lines[:line] + lines[line : line + 1] * (1 + n % 4) + lines[line:])
            case 6:
                raw = b"\n".join(lines[:line] + lines[line + 1 :])
            case 7:
                raw = b"\n".join(lines[i] for i in rng.permutation(len(lines)))
    return raw


INSERTED = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\r", b"\r\n", b"\n", b"\n\n", b" ", b"\t", b"\xef\xbb\xbf",
    b"\xe2\x80\xa8", b"\xc2\x85", b"\x1c", b"9" * 30, b"9" * 5000, b"-1", b"1e999", b"NaN", b"-Infinity", b"null",
    b"true", b'"', b"\\ud800", b"[", b"[" * 3000, b"{}", b",", b"\\", b"B-", b"I-x", b"../../etc/passwd",
    "٣".encode(), b"c__builtin__\neval\n",
]  # fmt: skip


class Hang(BaseException):
    """Nobody catches this by accident."""


@contextmanager
def at_most(seconds):
    def ring(*_):
        raise Hang(f"no answer in {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def silent(function, *args):
    """(what a function returns, what it printed to standard error)."""
    errors = io.StringIO()
    with redirect_stdout(io.StringIO()), redirect_stderr(errors):
        return function(*args), errors.getvalue()


def fuzz(subject, times, rng, scratch):
    """Mutate and read. Returns how many inputs were still valid, and how many were refused."""
    folder = Path(scratch)
    folder.mkdir(parents=True)
    subject.write(folder)
    with at_most(60):
        silent(subject.read, folder)  # as it was written, it is valid
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_mode & 0o200]
    counts = [0, 0]
    for number in range(times):
        path = files[rng.integers(len(files))]
        whole = path.read_bytes()
        damaged = mutate(rng, whole)
        path.unlink() if damaged is None else path.write_bytes(damaged)
        try:
            subject.mend(folder) if damaged is not None else None
            with at_most(20):
                silent(subject.read, folder)
            counts[0] += 1
        except subject.refusals as error:
            line = error.__context__ if isinstance(error, SystemExit) else error
            assert "\n" not in str(line) and (str(line) or isinstance(error, SystemExit)), f"{number}: {line}"
            counts[1] += 1
        except FileNotFoundError:
            assert damaged is None  # said by whoever prints it, with the name of the file
            counts[1] += 1
        except BaseException as error:
            kept = folder.with_name(folder.name + "-failed")
            shutil.copytree(folder, kept, dirs_exist_ok=True)
            raise AssertionError(f"input {number}, {path.name} in {kept}: {type(error).__name__}: {error}") from error
        path.write_bytes(whole)
    return counts


@pytest.mark.parametrize("name", [*DATASET_FILES, "checkpoint", "sealed checkpoint", "config.json", "results.jsonl",
                                  "model folder"])
def test_damaged_input_is_valid_or_refused_in_one_line(tiny, tmp_path, one_thread, name):
    torch.manual_seed(0)
    times = 30 if name == "model folder" else 80
    valid, refused = fuzz(subjects(tmp_path, tiny)[name], times, np.random.default_rng(0), tmp_path / "fuzz")
    assert valid + refused == times
    assert refused > times // 10 or name == "results.jsonl"  # of which every line stands alone
