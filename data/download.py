"""Fetch raw datasets from where their authors publish them, so that a broken transfer never looks like data."""

import hashlib
import os
import shutil
import tarfile
import time
import zipfile
import zlib
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm import tqdm

from .parallel import lock
from .readers import DataError

MOST = 2**30  # bytes of one file, as it comes or unpacked: more than any of these has
ATTEMPTS = 3
TIMEOUT = 30  # seconds without a byte
PAUSE = 2  # seconds before another attempt


class File(NamedTuple):
    """A file of a dataset and where it comes from."""

    path: str  # where the reader looks for it, in the dataset's folder
    url: str
    sha256: str | None = None  # of what the address holds; None where none is known: then the row counts decide
    member: str | None = None  # its name in the archive that the address holds


def fetch(name, folder, files, check, licence=""):
    """Make sure that `folder` has all `files` of dataset `name`; download them if one is absent.

    check: called with a folder of downloaded files, raises DataError if they are not what they should be. Only then
    are they renamed into `folder`, where no file that exists is replaced. Processes that fetch the same at once wait
    for each other. DataError if anything fails: it says what to put where by hand.
    """
    folder, scratch = Path(folder), Path(folder) / ".download"
    wanted = absent(folder, files)
    if not wanted:
        return
    paths = ", ".join(file.path for file in wanted)
    by_hand = f"get {paths} into {folder} in another way, or name the folder above it with --data-dir or DATA_DIR"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / ".download.lock", "a") as file:
            try:
                lock(file)
            except BlockingIOError:
                print(f"{name}: another process is fetching it; waiting for that", flush=True)
                lock(file, wait=True)
            wanted = absent(folder, files)  # none, where another process had the lock before
            try:
                if wanted:
                    print(f"{name}: fetching {paths} to {folder} (licence: {licence})", flush=True)
                    download(files, scratch)
                    check(scratch)
                for file in wanted:
                    (folder / file.path).parent.mkdir(parents=True, exist_ok=True)
                    os.replace(scratch / file.path, folder / file.path)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except DataError as error:
        raise DataError(f"{name}: {error}; {by_hand}") from None
    except OSError as error:
        raise DataError(f"{name}: {folder} could not be written ({error.strerror or error}); {by_hand}") from None


def absent(folder, files):
    """Those of `files` that `folder` does not have."""
    return [file for file in files if not (Path(folder) / file.path).is_file()]


def download(files, scratch):
    """Download files to a folder of their own, which is emptied first. DataError where a checksum is wrong."""
    shutil.rmtree(scratch, ignore_errors=True)  # what a process that was killed has left
    scratch.mkdir()
    for url in dict.fromkeys(file.url for file in files):
        group, got = [file for file in files if file.url == url], scratch / ".part"
        digest = transfer(url, got)
        if group[0].sha256 not in (None, digest):
            raise DataError(f"{url} has sha256 {digest}, not {group[0].sha256}: it was changed, or damaged on the way")
        for file in group:
            target = scratch / file.path
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.member is None:
                os.replace(got, target)
            else:
                with unpacked(got, file) as source:
                    save(source, target, url)


def transfer(url, path):
    """Fetch an address into a file; a transfer that breaks is begun anew. Returns its sha256 in hexadecimal. A proxy
    that the environment names is used."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with urlopen(Request(url, headers={"User-Agent": "nlu-data-diets"}), timeout=TIMEOUT) as response:
                return save(response, path, url, response.length)
        except (URLError, HTTPException, ConnectionError, TimeoutError) as error:
            final = attempt == ATTEMPTS or (isinstance(error, HTTPError) and error.code < 500 and error.code != 429)
            if final:
                raise DataError(f"{url} could not be fetched ({str(error).strip('<>') or 'no answer'})") from None
            time.sleep(PAUSE)


def save(source, path, url, expected=None):
    """Copy a file object into a file, safely on the disk, with a bar. Returns its sha256 in hexadecimal.

    expected: bytes, if known. ConnectionError where there are fewer, DataError where there are more than MOST.
    """
    digest, size = hashlib.sha256(), 0
    bar = tqdm(total=expected, unit="B", unit_scale=True, desc=url[-40:], leave=False, disable=None)
    with open(path, "wb") as file, bar:
        while chunk := read(source):
            size += len(chunk)
            if size > MOST:
                raise DataError(f"{url} holds more than {MOST} bytes, which no file of ours has")
            file.write(chunk)
            digest.update(chunk)
            bar.update(len(chunk))
        if expected is not None and size < expected:
            raise ConnectionError(f"{size} of {expected} bytes came")
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def read(source):
    """Some bytes; ConnectionError where there are none to be had, so that this is not taken for a disk's error."""
    try:
        return source.read(2**18)
    except OSError as error:
        raise ConnectionError(error) from None


@contextmanager
def unpacked(archive, file):
    """One member of a zip or tar archive as a file object. Others are not looked at, so none can leave the folder."""
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as opened, opened.open(file.member) as source:
                yield source
        else:
            with tarfile.open(archive) as opened:
                source = opened.extractfile(file.member)
                if source is None:
                    raise KeyError(file.member)  # a folder, say
                yield source
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError, ConnectionError):
        raise DataError(f"{file.url} is no archive with an intact file {file.member}") from None


JOINTBERT = "https://raw.githubusercontent.com/monologg/JointBERT/00324f60dda4a491b2913bc3065ae93966caea3f/data/snips"
CNTK = ("https://raw.githubusercontent.com/howl-anderson/ATIS_dataset/24ef702b745d6a62194e343f7c147f811ff79c01"
        "/data/raw_data/ms-cntk-atis")  # fmt: skip
FAIR = "https://dl.fbaipublicfiles.com"
MASSIVE = "https://amazon-massive-nlu-dataset.s3.amazonaws.com/amazon-massive-dataset-1.0.tar.gz"


def hashed(address, sums):
    """The files behind an address, from lines of sha256 and path."""
    return [File(path, f"{address}/{path}", sha256) for sha256, path in map(str.split, sums.strip().splitlines())]


SNIPS = hashed(JOINTBERT, """
04ad1e3f2121d83c6478f9a4b17d2dbdc21d06d6127f73cb7af835ed733f9855 train/seq.in
fd5f2121d8055827e5d6b3d3bac30f3d7e94e82a5d437751960cbdd9e1b4f6d3 train/seq.out
bfd7df6cf9dd76c5da5d8b61bc85f90386197bdd3d7510c1d324c051537b962f train/label
64e0f6d8ad8aab3a3828164d7d53731a0993d3ca1aed437ceaca6d3d568d410e dev/seq.in
712e6d34feb8d52d208b820a5f8bae6e6ff990f08374507dfde22de389088319 dev/seq.out
9c1dd041216f647bcfca838aaf1a48eb5781e4404256d31ff07cd38a5436c52f dev/label
c1e341173fcea2951a8ca371956a6f81c76de87b9583c62eb87edd6158fa3a7c test/seq.in
58c07c9097d5e1f78889765c2a535a160f6455b90b3142055c8051847afcca47 test/seq.out
37a26da3ad079bb41c42c85a3a8f827eb47efec4c5917ce5d08f4b2736e4f830 test/label
""")

ATIS = hashed(CNTK, """
81354b8b70610e3ee560f38ee366fc574f0b71e3f4b14c955935b8e4779c865c atis.dict.vocab.csv
9da4302a6a1065dd8742d87338ba842ba9c018623e36c84f431e6620c5cd1fd6 atis.dict.slots.csv
9737db351b2fd5cdc9219c3cf1e4b31468f4d9d049166ec2d4be682cd3d818fd atis.dict.intent.csv
786fe1baab85080d027d10582f99559952cb3e1a9da532a9fc6ce0ae1205372e atis.train.query.csv
fd118158260901ba632ca810907ce0d8431283f0bb80ee95b8c76c29a5b69b05 atis.train.slots.csv
92b1fad4cd17bc8eb90215382f56c8e56e1616bc2b5e2fcac094934649010eff atis.train.intent.csv
e1dc07203dca048ba62d2f5a28fe02da56553dfc95fd0040f5ec115f1ce64440 atis.test.query.csv
eb349ca1bb463b9080d258f5feba7ed03a9a6ce3995f333612aab7ab53e08806 atis.test.slots.csv
401b990ae4b8cc91509f822c8f0d879abc1c2cad386ef215be7cafddc13c5c76 atis.test.intent.csv
""")

MTOP = [File(path, f"{FAIR}/mtop/mtop.zip", "0c086500aed2ed48d3df383c91664b152e4a46e2adef6a635fa16d508ebaec0b", path)
        for path in ("mtop/en/train.txt", "mtop/en/eval.txt", "mtop/en/test.txt")]  # fmt: skip

SLURP = [File("1.0/data/en-US.jsonl", MASSIVE, "7df623fd2d300a4d235d6ee5bd396c9a28258d3a0ccb29abdb054506eba153f8",
              member="1.0/data/en-US.jsonl")]  # fmt: skip

MRPC = [File("msr_paraphrase_train.txt", f"{FAIR}/senteval/senteval_data/msr_paraphrase_train.txt"),
        File("mrpc_dev_ids.tsv", f"{FAIR}/glue/data/mrpc_dev_ids.tsv")]  # fmt: skip
