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
from conftest import make_raw

import data
import data.__main__
from data import DATASETS, DataError, download

PAYLOAD = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(PAYLOAD).hexdigest()


class Server(ThreadingHTTPServer):
    """Answers a path with what `answers` holds for it: one answer, or a list of them for one request after another.

    An answer is (status, body, length it claims), or bytes: those, with status 200.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers, self.requests, self.delay = {}, [], 0
        self.address = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def file(self, path, answer, sha256=None, member=None):
        """A File of the dataset at the address `path` of this server."""
        self.answers["/" + path] = answer
        return download.File(path, f"{self.address}/{path}", sha256, member)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.path)
        time.sleep(server.delay)
        answer = server.answers.get(self.path.removeprefix("http://far.invalid"), (404, b"", 0))
        if isinstance(answer, list):
            answer = answer.pop(0)
        status, body, length = answer if isinstance(answer, tuple) else (200, answer, len(answer))
        self.send_response(status)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    server = Server()
    yield server
    server.shutdown()
    server.server_close()


def fetch(folder, files, check=lambda _: None):
    download.fetch("mine", folder, files, check, "a licence")


def left(folder):
    """Names of all files below a folder, but for the lock."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                  if path.is_file() and path.name != ".download.lock")  # fmt: skip


def archive(kind, members):
    """Bytes of a zip or tar.gz archive of {name: bytes}."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as opened:
            for name, content in members.items():
                opened.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                opened.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_file_arrives_whole_and_is_not_fetched_again(server, tmp_path, capsys):
    file = server.file("a/b.txt", PAYLOAD, SHA256)
    for _ in range(2):
        fetch(tmp_path / "new" / "mine", [file])
    assert (tmp_path / "new/mine/a/b.txt").read_bytes() == PAYLOAD
    assert left(tmp_path) == ["new/mine/a/b.txt"] and server.requests == ["/a/b.txt"]
    assert capsys.readouterr().out == f"mine: fetching a/b.txt to {tmp_path}/new/mine (licence: a licence)\n"


@pytest.mark.parametrize(("answer", "message", "requests"), [
    ((404, b"", 0), r"could not be fetched \(HTTP Error 404: Not Found\)", 1),
    ((503, b"", 0), r"could not be fetched \(HTTP Error 503: Service Unavailable\)", 3),
    ((200, PAYLOAD[:-1], len(PAYLOAD)), r"could not be fetched \(511999 of 512000 bytes came\)", 3),
    ((200, b"", len(PAYLOAD)), r"could not be fetched \(0 of 512000 bytes came\)", 3),
    (PAYLOAD[:-1] + b"x", r"has sha256 [0-9a-f]{64}, not 8acfcabd.*changed, or damaged on the way", 1),
    (b"", r"has sha256 e3b0c442", 1),
    ((429, b"", 0), r"could not be fetched \(HTTP Error 429: Too Many Requests\)", 3),
])  # fmt: skip
def test_a_transfer_that_fails_leaves_nothing_and_says_what_to_do(server, tmp_path, answer, message, requests):
    with pytest.raises(DataError, match=message) as caught:
        fetch(tmp_path, [server.file("first.txt", b"fine"), server.file("b.txt", answer, SHA256)])
    assert left(tmp_path) == [] and server.requests.count("/b.txt") == requests
    text = str(caught.value)
    assert "\n" not in text and f"{server.address}/b.txt" in text
    assert f"get first.txt, b.txt into {tmp_path} in another way" in text and "--data-dir or DATA_DIR" in text


def test_a_connection_that_is_cut_is_tried_again(server, tmp_path):
    fetch(tmp_path, [server.file("b.txt", [(200, PAYLOAD[:1000], len(PAYLOAD)), (500, b"", 0), PAYLOAD], SHA256)])
    assert (tmp_path / "b.txt").read_bytes() == PAYLOAD and len(server.requests) == 3


def test_nobody_listens(tmp_path):
    with pytest.raises(DataError, match=r"http://127.0.0.1:9/x could not be fetched \(urlopen error .*refused"):
        fetch(tmp_path, [download.File("x", "http://127.0.0.1:9/x")])
    assert left(tmp_path) == []


def test_a_server_that_falls_silent_is_given_up(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TIMEOUT", 0.1)
    server.delay = 0.5
    with pytest.raises(DataError, match="timed out"):
        fetch(tmp_path, [server.file("b.txt", PAYLOAD)])


def test_a_file_larger_than_any_is_refused(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "MOST", 1000)
    bomb = archive("zip", {"m.txt": b"0" * 1001})
    for file in (server.file("b.txt", PAYLOAD), server.file("c.txt", bomb, member="m.txt")):
        with pytest.raises(DataError, match="holds more than 1000 bytes"):
            fetch(tmp_path, [file])
    assert left(tmp_path) == []


def test_a_proxy_of_the_environment_is_used(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.address)
    monkeypatch.setattr("urllib.request._opener", None)  # made once a process, when the environment is read
    server.file("b.txt", PAYLOAD)
    fetch(tmp_path, [download.File("b.txt", "http://far.invalid/b.txt", SHA256)])
    assert server.requests == ["http://far.invalid/b.txt"] and left(tmp_path) == ["b.txt"]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_of_an_archive_only_named_members_are_taken(server, tmp_path, kind):
    """Others, `../` among them, are not unpacked; the archive is fetched once for all its members."""
    body = archive(kind, {"../evil.txt": b"evil", "/tmp/evil-absolute.txt": b"evil", "d/one.txt": b"1", "two": b"2"})
    files = [server.file("x", body, member="d/one.txt")._replace(path="one.txt"),
             server.file("x", body, member="two")._replace(path="d/two.txt")]  # fmt: skip
    fetch(tmp_path / "mine", files)
    assert left(tmp_path) == ["mine/d/two.txt", "mine/one.txt"] and server.requests == ["/x"]
    assert not Path("/tmp/evil-absolute.txt").exists()


def damaged_zip():
    body = bytearray(archive("zip", {"m.txt": PAYLOAD}))
    body[200] ^= 1
    return bytes(body)


def tar_with(kind):
    buffer, info = io.BytesIO(), tarfile.TarInfo("m.txt")
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(fileobj=buffer, mode="w:gz") as opened:
        opened.addfile(info)
    return buffer.getvalue()


@pytest.mark.parametrize("body", [
    b"", b"no archive", archive("zip", {"other": b""}), archive("tar", {"other": b""}), damaged_zip(),
    archive("tar", {"m.txt": PAYLOAD})[:500], archive("zip", {"m.txt": PAYLOAD})[:-20], tar_with(tarfile.DIRTYPE),
    tar_with(tarfile.SYMTYPE), tar_with(tarfile.LNKTYPE),
])  # fmt: skip
def test_an_archive_without_an_intact_member_is_refused(server, tmp_path, body):
    with pytest.raises(DataError, match=r"is no archive with an intact file m.txt"):
        fetch(tmp_path, [server.file("m.txt", body, member="m.txt")])
    assert left(tmp_path) == []


@pytest.mark.parametrize("folder", ["/proc/nope", __file__])
def test_a_folder_that_cannot_be_written_is_said_in_one_line(server, folder):
    with pytest.raises(DataError, match=f"{folder} could not be written") as caught:
        fetch(folder, [server.file("b.txt", PAYLOAD)])
    assert "\n" not in str(caught.value) and server.requests == []


def test_what_a_killed_process_left_is_no_data_and_is_cleared(server, tmp_path):
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download/.part").write_bytes(b"half")
    (tmp_path / ".download/b.txt").write_bytes(b"not checked yet")
    file = server.file("b.txt", PAYLOAD, SHA256)
    assert download.absent(tmp_path, [file]) == [file]
    fetch(tmp_path, [file])
    assert left(tmp_path) == ["b.txt"] and (tmp_path / "b.txt").read_bytes() == PAYLOAD


def test_files_that_are_there_are_not_replaced(server, tmp_path):
    (tmp_path / "a.txt").write_text("my own")
    fetch(tmp_path, [server.file("a.txt", b"theirs"), server.file("b.txt", b"theirs")])
    assert [(tmp_path / name).read_text() for name in ("a.txt", "b.txt")] == ["my own", "theirs"]


def test_two_processes_fetch_once(server, tmp_path):
    server.delay = 0.3
    file = server.file("b.txt", PAYLOAD, SHA256)
    both = [multiprocessing.get_context("fork").Process(target=fetch, args=(tmp_path, [file])) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(30)
    assert [process.exitcode for process in both] == [0, 0]
    assert server.requests == ["/b.txt"] and (tmp_path / "b.txt").read_bytes() == PAYLOAD


# ---- whole datasets


@pytest.fixture
def published(server, tmp_path, monkeypatch):
    """published(name, rows) puts a small dataset on the server, and its address, checksums and counts in its Source."""

    def publish(name, rows):
        make_raw(tmp_path / "upstream", name)
        source = DATASETS[name]
        content = {file.path: (tmp_path / "upstream" / source.folder / file.path).read_bytes() for file in source.files}
        body, files = archive("zip", {file.member: content[file.path] for file in source.files if file.member}), []
        for file in source.files:
            answer = body if file.member else content[file.path]
            sha256 = file.sha256 and hashlib.sha256(answer).hexdigest()
            at = "archive" if file.member else file.path
            files.append(server.file(at, answer, sha256, file.member)._replace(path=file.path))
        monkeypatch.setitem(DATASETS, name, source._replace(files=files, rows=rows))

    return publish


@pytest.mark.parametrize(("name", "rows"), [("snips", (60, 10, 10)), ("mtop", (60, 10, 10)), ("mrpc", (60, 10)),
                                            ("mnli", (60, 10, 10))])  # fmt: skip
def test_a_dataset_is_fetched_on_first_use(published, server, tmp_path, name, rows):
    published(name, rows)
    for _ in range(2):
        splits = data.read(name, tmp_path / "raw")
    assert tuple(len(examples) for examples in splits.values()) == rows
    assert len(server.requests) == len(set(server.requests))  # once


def test_without_a_checksum_the_official_counts_decide(published, tmp_path):
    published("rte", (61, 10))
    with pytest.raises(DataError, match=r"rte: what was downloaded has \(60, 10\) rows .* officially \(61, 10\)"):
        data.read("rte", tmp_path / "raw")
    assert left(tmp_path / "raw") == []


def test_the_command_lists_and_fetches(published, tmp_path, capsys):
    published("cola", (60, 10))
    where = ["--data-dir", str(tmp_path / "raw")]
    assert data.__main__.main(where) == 0  # as --list
    before = capsys.readouterr().out
    assert all(re.search(rf"^{name} .*\bno$", before, re.M) for name in DATASETS if name != "demo")
    assert re.search(r"^demo .*generated$", before, re.M)
    assert data.__main__.main(["cola", "--list", *where]) == 0
    after = capsys.readouterr().out
    assert re.search(rf"^cola +classification, 2 +60 / 10 .*{tmp_path}/raw/glue/CoLA$", after, re.M)
    (tmp_path / "raw/glue/CoLA/dev.tsv").unlink()
    assert data.__main__.main(where) == 0
    assert re.search(r"^cola .*CoLA, without dev.tsv$", capsys.readouterr().out, re.M)


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    assert data.__main__.main(["nope"]) == 2
    assert "unknown dataset 'nope' (choose from demo, snips" in capsys.readouterr().err


def test_the_table_of_what_the_loader_sees(tmp_path, capsys):
    """The user's own folder, of which all is known: two rows lie in one another's way in no column."""
    for split, tags in (("train", "O B-x I-x"), ("dev", "O O O"), ("test", "B-y B-y O")):
        (tmp_path / split).mkdir()
        for file, line in (("seq.in", "a b \ufffd"), ("seq.out", tags), ("label", split)):
            (tmp_path / split / file).write_text(f"{line}\n" * 2, encoding="utf-8")
    assert data.__main__.main([str(tmp_path), "--check"]) == 0
    head, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[-3:])
    assert dict(zip(head, row)) == {
        "dataset": str(tmp_path), "rows": "2 / 2 / 2 (–)", "labels": "3 (–)", "slot types": "2 (–)", "tags": "4",
        "slots": "2 / 0 / 4", "rows without": "0 / 2 / 0", "words lost": "0 of 18"}  # fmt: skip


@pytest.mark.parametrize("name", ["snips", "atis"])
def test_checksums_are_those_of_the_real_files(raw, name):
    for file in DATASETS[name].files:
        assert hashlib.sha256((raw / name / file.path).read_bytes()).hexdigest() == file.sha256


def test_every_dataset_has_an_address_and_all_but_glue_a_checksum():
    for name, source in DATASETS.items():
        assert all(file.url.startswith("https://") for file in source.files)
        assert all((file.sha256 is None) == source.folder.startswith("glue/") for file in source.files)
        assert bool(source.files) == (name != "demo")
