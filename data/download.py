"""Download raw datasets from the addresses in sources.txt. A file gets its name only after a check."""

import hashlib
import os
import shutil
import socket
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from filelock import FileLock
from torch.hub import download_url_to_file

from errors import UserError, expect, one_line

ROUNDS = 2  # how often every address is tried
TIMEOUT = 30  # seconds without a byte
PAUSE = 2  # seconds after an attempt that failed


class File(NamedTuple):
    """A file of a dataset and where it comes from."""

    path: str  # where the reader looks for it, in the dataset's folder
    sha256: str  # of the file, or of the archive that holds it
    urls: list[str]  # addresses with the same bytes; for a file in an archive, "url#its name there"


def read_sources():
    """Return {dataset: [File, …]} from sources.txt."""
    sources = {}
    for line in Path(__file__).with_name("sources.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            name, path, sha256, *urls = line.split()
            sources.setdefault(name, []).append(File(path, sha256, urls))
    return sources


def absent(folder, files):
    """Return those of `files` that are not in `folder`."""
    return [file for file in files if not os.path.isfile(Path(folder, file.path))]


def fetch(name, source, folder, files):
    """Download the files of a dataset where `folder` lacks one. Files that exist are not replaced.

    source: a data.Source, whose reader must find the official number of rows. Processes that fetch at once wait for
    each other. Raises UserError that says what to put where by hand.
    """
    paths, timeout = ", ".join(file.path for file in files), socket.getdefaulttimeout()
    if not absent(folder, files):
        return
    try:
        socket.setdefaulttimeout(TIMEOUT)
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".download.lock"), TemporaryDirectory(prefix=".download-", dir=folder) as scratch:
            for old in set(folder.glob(".download-*")) - {Path(scratch)}:  # of a process that was killed
                shutil.rmtree(old, ignore_errors=True)
            if missing := absent(folder, files):  # none, if another process had the lock before
                print(f"{name}: downloading {paths} to {folder} (licence: {source.licence})", flush=True)
                for sha256 in dict.fromkeys(file.sha256 for file in files):
                    download([file for file in files if file.sha256 == sha256], Path(scratch))
                rows = tuple(map(len, source.reader(Path(scratch)).values()))
                expect(rows == source.rows, "the download", f"{rows} rows, officially {source.rows}")
            for file in missing:
                (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(scratch) / file.path, folder / file.path)
    except (UserError, OSError) as error:
        raise UserError(f"{name}: {one_line(error)}; put {paths} into {folder} by hand, or set DATA_DIR to the "
                        "folder that has all datasets") from None
    finally:
        socket.setdefaulttimeout(timeout)


def download(files, scratch):
    """Download one file, or several files of one archive, into the folder `scratch`. Raises UserError."""
    got, wanted, failures = scratch / ".part", files[0].sha256, {}
    for url in files[0].urls * ROUNDS:
        try:
            download_url_to_file(url, str(got), progress=sys.stderr.isatty())
            found = hashlib.sha256(got.read_bytes()).hexdigest()
            if found != wanted and "/glue/data/" in url and "#" in url:  # it was zipped again: `fetch` counts the rows
                print(f"warning: {url} has sha256 {found}, not {wanted}", file=sys.stderr)
            else:
                expect(found == wanted, "sha256", f"{found}, not {wanted}: it was changed, or damaged on the way")
            for file in files:
                target, member = scratch / file.path, file.urls[0].partition("#")[2]
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(unpack(got, member) if member else got.read_bytes())
            return
        except Exception as error:  # whatever a network or a damaged archive makes the libraries raise
            failures[url] = one_line(error)
            time.sleep(PAUSE)
    raise UserError("; ".join(f"{url} could not be fetched ({reason})" for url, reason in failures.items()))


def unpack(archive, member):
    """Return the bytes of one member of a zip or tar archive. No other is unpacked, so none can leave the folder."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            return opened.read(member)
    with tarfile.open(archive) as opened:
        return opened.extractfile(member).read()
