"""Downloads, from a server on this machine: what arrives is checked and whole, or is not there at all."""

import hashlib
import io
import multiprocessing
import re
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import make_raw, one_line

import data
import data.__main__
from data import DATASETS, FILES, DataError, download

PAYLOAD = bytes(range(256)) * 2000


class Server(ThreadingHTTPServer):
    """Answers a path with the bytes or the status that `answers` has for it, or a list of them, one for each request.

    Status 206: PAYLOAD, of which only half comes.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.delay = {}, [], 0
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        """Say nothing when a client has hung up."""

    def file(self, path, *answers, right=PAYLOAD, member=""):
        """Return a File at one address of this server for each answer. right: what its sha256 is of."""
        urls = []
        for i, answer in enumerate(answers):
            self.answers[f"/{i}/{path}"] = answer
            urls.append(f"{self.address}/{i}/{path}{'#' if member else ''}{member}")
        return download.File(path, hashlib.sha256(right).hexdigest(), urls)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        time.sleep(self.server.delay)
        answer = self.server.answers[self.path]
        answer = answer.pop(0) if isinstance(answer, list) else answer
        body = answer if isinstance(answer, bytes) else PAYLOAD
        self.send_response(answer if answer in (404, 500) else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if answer == 206 else body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def fetch(folder, files, check=lambda _: None):
    download.fetch("mine", folder, files, check)


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


@pytest.mark.parametrize("answer", [404, 500, 206, PAYLOAD[:-1] + b"x", b""])
def test_a_transfer_that_fails_leaves_nothing_and_says_what_to_do(server, tmp_path, answer):
    """A broken or changed file never looks like data. The message names the address, the files and the folder."""
    with one_line(DataError, rf"{server.address}/0/b.txt .*first.txt, b.txt into {tmp_path} .*--data-dir"):
        fetch(tmp_path, [server.file("first.txt", b"fine", right=b"fine"), server.file("b.txt", answer)])
    assert left(tmp_path) == [] and server.requests.count("/0/b.txt") == download.ROUNDS


@pytest.mark.parametrize("answers", [[[206, PAYLOAD]], [[500, PAYLOAD]], [404, PAYLOAD], [b"changed", PAYLOAD]])
def test_a_failed_transfer_is_tried_again_and_elsewhere(server, tmp_path, answers):
    """A connection that breaks is tried again. Where an address is gone or has something else, the second is used."""
    fetch(tmp_path, [server.file("b.txt", *answers)])
    assert (tmp_path / "b.txt").read_bytes() == PAYLOAD and len(server.requests) == 2


def test_offline_and_silent_servers_are_given_up(server, tmp_path, monkeypatch):
    """A run on a machine without a network ends in one line, and soon."""
    with one_line(DataError, r"127.0.0.1:9/x .*refused"):
        fetch(tmp_path, [download.File("x", "", ["http://127.0.0.1:9/x"])])
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.delay = 0.5
    with one_line(DataError, "timed out"):
        fetch(tmp_path, [server.file("b.txt", PAYLOAD)])


@pytest.mark.parametrize("kind", [zipped, tarred])
def test_of_an_archive_only_named_members_are_taken(server, tmp_path, kind):
    """Others, `../` among them, are not unpacked. The archive is fetched once for all its members."""
    body = kind({"../evil.txt": b"evil", "/tmp/evil-absolute.txt": b"evil", "d/one.txt": b"1", "two": b"2"})
    files = [server.file("x", body, right=body, member="d/one.txt")._replace(path="one.txt"),
             server.file("x", body, right=body, member="two")._replace(path="d/two.txt")]  # fmt: skip
    fetch(tmp_path / "mine", files)
    assert left(tmp_path) == ["mine/d/two.txt", "mine/one.txt"] and server.requests == ["/0/x"]
    assert not Path("/tmp/evil-absolute.txt").exists()


@pytest.mark.parametrize("body", [
    b"no archive", zipped({"other": b""}), tarred({"other": b""}), tarred({"m.txt": PAYLOAD})[:500],
    zipped({"m.txt": PAYLOAD}).replace(b"\1\2\3\4", b"\1\2\3\3", 1),
])  # fmt: skip
def test_an_archive_without_an_intact_member_is_refused(server, tmp_path, body):
    """Also where its hash is right."""
    with one_line(DataError, r"m\.txt"):
        fetch(tmp_path, [server.file("m.txt", body, right=body, member="m.txt")])
    assert left(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/nope", __file__])
def test_a_folder_that_cannot_be_written_is_said_in_one_line(server, folder):
    """No traceback, and no transfer."""
    with one_line(DataError, folder):
        fetch(folder, [server.file("b.txt", PAYLOAD)])
    assert server.requests == []


def test_only_what_is_not_there_is_fetched(server, tmp_path):
    """Folders are made, and a user's own copy stays. Nothing but the files is left."""
    files = [server.file("a.txt", PAYLOAD), server.file("c/b.txt", b"theirs", right=b"theirs")]
    (tmp_path / "a.txt").write_text("my own")
    for _ in range(2):
        fetch(tmp_path, files)
    assert [(tmp_path / name).read_text() for name in left(tmp_path)] == ["my own", "theirs"]
    assert left(tmp_path) == ["a.txt", "c/b.txt"] and server.requests.count("/0/c/b.txt") == 1


def test_two_processes_fetch_once(server, tmp_path):
    """Runs that start at once wait for each other."""
    server.delay = 0.3
    files = [server.file("b.txt", PAYLOAD)]
    both = [multiprocessing.get_context("fork").Process(target=fetch, args=(tmp_path, files)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.requests == ["/0/b.txt"] and (tmp_path / "b.txt").read_bytes() == PAYLOAD


# ---- whole datasets


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """published(name, rows) puts a small dataset on the server, and its address, hashes and counts in `data`."""

    def publish(name, rows, right=None):
        make_raw(tmp_path / "upstream", name)
        folder, files = tmp_path / "upstream" / DATASETS[name].folder, []
        members = {file.path: file.urls[0].partition("#")[2] for file in FILES[name]}
        body = zipped({member: (folder / path).read_bytes() for path, member in members.items() if member})
        for path, member in members.items():
            answer = body if member else (folder / path).read_bytes()
            file = server.file("glue/data/x.zip" if member else path, answer, right=right or answer, member=member)
            files.append(file._replace(path=path))
        monkeypatch.setitem(FILES, name, files)
        monkeypatch.setitem(DATASETS, name, DATASETS[name]._replace(rows=rows))

    return publish


@pytest.mark.parametrize(("name", "rows"), [("snips", (60, 10, 10)), ("mtop", (60, 10, 10)), ("mrpc", (60, 10)),
                                            ("mnli", (60, 10, 10))])  # fmt: skip
def test_a_dataset_is_fetched_on_first_use(published, server, tmp_path, name, rows):
    """Plain files and archives, each fetched once."""
    published(name, rows)
    for _ in range(2):
        splits = data.read(name, tmp_path / "raw")
    assert tuple(len(samples) for samples in splits.values()) == rows
    assert len(server.requests) == len(set(server.requests))


def test_glue_archives_that_were_zipped_again_are_accepted_by_their_rows(published, tmp_path, capsys):
    """Another hash is a warning there, but other rows, or another hash of a plain file, are refused."""
    published("rte", (60, 10), right=b"before")
    assert len(data.read("rte", tmp_path / "raw")["train"]) == 60
    assert "warning: " in capsys.readouterr().err
    published("cola", (61, 10), right=b"before")
    with one_line(DataError, r"cola: .*\(60, 10\) .*\(61, 10\)"):
        data.read("cola", tmp_path / "raw")
    published("mrpc", (60, 10), right=b"before")
    with one_line(DataError, "sha256"):
        data.read("mrpc", tmp_path / "raw")
    assert left(tmp_path / "raw") == ["glue/RTE/dev.tsv", "glue/RTE/train.tsv"]


def test_the_command_lists_and_fetches(published, tmp_path, capsys):
    """python -m data shows what is on disk, downloads what is named, and refuses in one line."""
    published("cola", (60, 10))
    where = ["--data-dir", str(tmp_path / "raw")]
    assert data.__main__.main(where) == 0
    assert re.search(r"^cola .*\bno$", capsys.readouterr().out, re.M)
    assert data.__main__.main(["cola", *where]) == data.__main__.main(where) == 0
    assert re.search(rf"^cola .*{tmp_path}/raw/glue/CoLA$", capsys.readouterr().out, re.M)
    assert data.__main__.main(["nope"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_file_has_an_address_and_its_right_hash(raw):
    """sources.txt has each dataset but demo, which is generated."""
    assert FILES.keys() == DATASETS.keys() - {"demo"}
    for name, files in FILES.items():
        for file in files:
            assert len(file.sha256) == 64 and all(url.startswith("https://") for url in file.urls)
            if name in ("snips", "atis", "mrpc"):  # the others are in archives
                content = (raw / DATASETS[name].folder / file.path).read_bytes()
                assert hashlib.sha256(content).hexdigest() == file.sha256
