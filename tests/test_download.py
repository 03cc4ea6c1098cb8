"""Downloads, of files on this machine: what arrives is checked and whole, or is not there at all."""

import hashlib
import io
import re
import socket
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import make_raw, refused_with, write

import data
import data.__main__
from data import DATASETS, FILES, Source, download

PAYLOAD = bytes(range(256)) * 2000


@pytest.fixture
def asked(monkeypatch):
    """The addresses that were asked for."""
    seen, transfer = [], download.download_url_to_file

    def recorded(url, *args, **options):
        seen.append(url)
        transfer(url, *args, **options)

    monkeypatch.setattr(download, "download_url_to_file", recorded)
    return seen


@pytest.fixture
def upstream(tmp_path):
    """upstream(path, answer, …) → a File with an address for each answer: bytes, or None where nothing is.

    right: what its sha256 is of. member: its name in the archive that the answers are.
    """

    def publish(path, *answers, right=PAYLOAD, member=""):
        files = [tmp_path / "upstream" / str(i) / path for i in range(len(answers))]
        for file, answer in zip(files, answers):
            file.parent.mkdir(parents=True, exist_ok=True)
            if answer is not None:
                file.write_bytes(answer)
        urls = [file.as_uri() + (f"#{member}" if member else "") for file in files]
        return download.File(path, hashlib.sha256(right).hexdigest(), urls)

    return publish


@pytest.fixture
def folder(tmp_path):
    """Where the files are put."""
    return tmp_path / "raw"


def fetch(folder, files):
    download.fetch("mine", Source(lambda _: {}, None, (), ""), Path(folder), files)


def left(folder):
    """Return the names of all files below a folder, but for the lock."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and path.name != ".download.lock")  # fmt: skip


def zipped(members):
    """Return the bytes of a zip archive of {name: bytes}."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def tarred(members):
    """Return the bytes of a tar.gz archive of {name: bytes}."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


# ---- files


@pytest.mark.parametrize("answer", [None, PAYLOAD[:9999], PAYLOAD[:-1] + b"x", b""])
def test_a_transfer_that_fails_leaves_nothing_and_says_what_to_do(upstream, asked, folder, answer):
    """A broken or changed file never looks like data. The message names the address, the files and the folder.

    What a killed process left is removed, too.
    """
    write(folder, {".download-killed/first.txt": ""})
    files = [upstream("first.txt", b"fine", right=b"fine"), upstream("b.txt", answer)]
    with refused_with(rf"{files[1].urls[0]} .*first.txt, b.txt into {folder} .*DATA_DIR"):
        fetch(folder, files)
    assert left(folder) == [] and asked.count(files[1].urls[0]) == download.ROUNDS


@pytest.mark.parametrize("answers", [[None], [None, PAYLOAD], [b"changed", PAYLOAD]])
def test_a_failed_transfer_is_tried_again_and_elsewhere(upstream, asked, folder, tmp_path, monkeypatch, answers):
    """What is there a moment later is taken. Where an address is gone or has something else, the second is used."""
    file, first = upstream("b.txt", *answers), tmp_path / "upstream" / "0" / "b.txt"
    monkeypatch.setattr(time, "sleep", lambda _: first.write_bytes(PAYLOAD))  # between two attempts
    fetch(folder, [file])
    assert (folder / "b.txt").read_bytes() == PAYLOAD and asked == (file.urls * 2)[:2]


def test_a_silent_server_is_given_up(folder, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent, refused_with("timed out"):
        fetch(folder, [download.File("x", "", [f"http://127.0.0.1:{silent.getsockname()[1]}/x"])])


@pytest.mark.parametrize("kind", [zipped, tarred])
def test_of_an_archive_only_named_members_are_taken(upstream, asked, folder, kind):
    """Others, `../` among them, are not unpacked. The archive is fetched once for all its members."""
    body = kind({"../evil.txt": b"evil", "/tmp/evil-absolute.txt": b"evil", "d/one.txt": b"1", "two": b"2"})
    fetch(folder, [upstream("x", body, right=body, member="d/one.txt")._replace(path="one.txt"),
                   upstream("x", body, right=body, member="two")._replace(path="d/two.txt")])  # fmt: skip
    assert left(folder) == ["d/two.txt", "one.txt"] and len(asked) == 1
    assert not (folder.parent / "evil.txt").exists() and not Path("/tmp/evil-absolute.txt").exists()
    for broken in (body, body[:60], b"no archive"):  # also where the hash is right
        with refused_with(r"absent\.txt"):
            fetch(folder, [upstream("absent.txt", broken, right=broken, member="absent.txt")])
    assert left(folder) == ["d/two.txt", "one.txt"]


def test_only_what_is_not_there_is_fetched_and_once(upstream, asked, folder, monkeypatch):
    """A user's own copy stays, and nothing but the files is left. Runs that start at once, here threads, each with a
    lock of its own, wait for each other."""
    files = [upstream("a.txt", PAYLOAD), upstream("c/b.txt", b"theirs", right=b"theirs")]
    write(folder, {"a.txt": "my own"})
    transfer = download.download_url_to_file
    monkeypatch.setattr(download, "download_url_to_file", lambda *a, **b: (time.sleep(0.3), transfer(*a, **b)))
    with ThreadPoolExecutor() as pool:
        list(pool.map(fetch, [folder] * 2, [files] * 2))
    assert left(folder) == ["a.txt", "c/b.txt"] and asked.count(files[1].urls[0]) == 1
    assert [(folder / name).read_text() for name in left(folder)] == ["my own", "theirs"]


# ---- whole datasets


@pytest.fixture
def published(upstream, tmp_path, monkeypatch):
    """published(name, rows) puts a small dataset upstream, and its addresses, hashes and counts in `data`."""

    def publish(name, rows, right=None):
        make_raw(tmp_path / "made", name)
        made, files = tmp_path / "made" / DATASETS[name].folder, []
        members = {file.path: file.urls[0].partition("#")[2] for file in FILES[name]}
        body = zipped({member: (made / path).read_bytes() for path, member in members.items() if member})
        for path, member in members.items():
            answer = body if member else (made / path).read_bytes()
            file = upstream("glue/data/x.zip" if member else path, answer, right=right or answer, member=member)
            files.append(file._replace(path=path))
        monkeypatch.setitem(FILES, name, files)
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(rows=rows))

    return publish


@pytest.mark.parametrize(("name", "rows"), [("snips", (8, 6, 4)), ("mtop", (8, 6, 4))])
def test_a_dataset_is_fetched_on_first_use(published, asked, folder, name, rows):
    """Plain files and archives, each fetched once."""
    published(name, rows)
    for _ in range(2):
        splits = data.read(name, folder)
    assert tuple(len(samples) for samples in splits.values()) == rows
    assert len(asked) == len(set(asked)) > 0


def test_glue_archives_that_were_zipped_again_are_accepted_by_their_rows(published, folder, capsys):
    """Another hash is a warning there, but other rows are refused."""
    published("rte", (8, 6), right=b"before")
    assert len(data.read("rte", folder)["train"]) == 8
    assert "warning: " in capsys.readouterr().err
    published("cola", (9, 6), right=b"before")
    with refused_with(r"cola: .*\(8, 6\) .*\(9, 6\)"):
        data.read("cola", folder)
    assert left(folder) == ["glue/RTE/dev.tsv", "glue/RTE/train.tsv"]


def test_the_command_lists_and_fetches(published, folder, monkeypatch, capsys):
    """python -m data shows what is on disk, downloads what is named, and refuses in one line."""
    published("cola", (8, 6))
    monkeypatch.setenv("DATA_DIR", str(folder))
    for names, where in (([], "no"), (["cola"], f"{folder}/glue/CoLA"), ([], f"{folder}/glue/CoLA")):
        assert data.__main__.main(names) == 0
        assert re.search(rf"^cola .* {where}$", capsys.readouterr().out, re.M)
    assert data.__main__.main(["nope"]) == 2
    monkeypatch.setenv("DATA_DIR", __file__)  # in which no folder can be made
    assert data.__main__.main(["mrpc"]) == 2
    monkeypatch.setattr(download, "fetch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert data.__main__.main(["cola"]) == 130
    assert re.fullmatch("(python -m data: error: .*\n){2}python -m data: interrupted\n", capsys.readouterr().err)


def test_every_file_has_an_address_and_its_right_hash(raw):
    """sources.txt has each dataset but demo, which is generated."""
    assert FILES.keys() == DATASETS.keys() - {"demo"}
    for name, files in FILES.items():
        for file in files:
            assert len(file.sha256) == 64 and all(url.startswith("https://") for url in file.urls)
            if name in ("snips", "atis", "mrpc"):  # the others are in archives
                content = (raw / DATASETS[name].folder / file.path).read_bytes()
                assert hashlib.sha256(content).hexdigest() == file.sha256
