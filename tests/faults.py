"""Break runs in every way that we can think of, go on with them, and compare with runs that nothing happened to.

    python tests/faults.py > results/faults.md      all of it, several minutes
    python tests/faults.py --short                  a little of everything, as CI does
    python tests/faults.py --only kill_9 --short    one of them

Prints a Markdown table: fault, times injected, outcome, anything lost. Exit status 1 where something was. Runs are
children forked from this process, which has done the slow imports, with one thread each; a tiny model, real code.
"""

import argparse
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}  # threads do not survive a fork
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import numpy as np
import test_fuzz
import torch
from conftest import tiny_bert

import report
import train

SECONDS = 60  # longer than any of these runs takes: then it hangs


class Lab:
    """Where runs are made: a scratch folder, a tiny model, a random generator, and the run that nothing happens to."""

    def __init__(self, scratch, short):
        self.scratch, self.short, self.rng = Path(scratch), short, np.random.default_rng(0)
        self.count = 0
        # A child, as building the model would start threads here.
        assert self.wait(self.start(lambda: tiny_bert(self.model()) and 0))[0] == 0
        begun = time.perf_counter()
        self.reference = self.done(self.command(self.out()))
        self.seconds = time.perf_counter() - begun

    def model(self):
        folder = self.scratch / "tiny"
        folder.mkdir(exist_ok=True)
        return folder

    def out(self):
        """A new folder for runs."""
        self.count += 1
        return self.scratch / f"out-{self.count}"

    def times(self, few, many):
        return few if self.short else many

    def command(self, out, *flags):
        return ["--model", str(self.model()), "--max-train", "240", "--epochs", "5", "--full-epochs", "1", "--cycle",
                "1", "--batch-size", "8", "--lr", "3e-3", "--precision", "fp32", "--device", "cpu", "--out", str(out),
                *flags]

    def start(self, function, **environment):
        """Fork a child that calls function() and exits with what it returns; its output goes to a file. Returns its
        number, or process id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        status = 99  # a traceback
        try:
            log = os.open(self.scratch / f"log-{os.getpid()}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.environ.update(environment)
            torch.set_num_threads(1)
            signal.signal(signal.SIGTERM, train.terminated)
            status = function()
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def wait(self, pid):
        """(exit status, or minus the signal that killed it; the lines it printed that were for standard error)."""
        ends = time.monotonic() + SECONDS
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > ends:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise AssertionError(f"a run hangs: {SECONDS} s and no end")
            time.sleep(0.005)
        lines = (self.scratch / f"log-{pid}").read_text().splitlines()
        assert "Traceback (most recent call last):" not in lines, "\n".join(lines)
        return os.waitstatus_to_exitcode(ended[1]), [line for line in lines if line.startswith("train.py:")]

    def done(self, command):
        """Let a run come to its end. Returns its folder."""
        status, errors = self.wait(self.start(lambda: train.main(command)))
        assert status == 0, errors
        return only_folder(command[command.index("--out") + 1] if "--out" in command else Path(command[1]).parent)

    def resume(self, out):
        """The same command again, or the run's folder, whichever chance has it, to the end."""
        folders = [config.parent for config in out.glob("*/config.json")]
        by_name = folders and self.rng.random() < 0.5
        return self.done(["--resume", str(folders[0])] if by_name else self.command(out, "--resume", "auto"))

    def kill_later(self, command, number=signal.SIGKILL):
        """Start a run and send it a signal at a random moment. Returns what `wait` does."""
        pid = self.start(lambda: train.main(command))
        time.sleep(self.rng.random() * self.seconds)
        os.kill(pid, number)
        return self.wait(pid)

    def stopped(self, *flags, epoch=3):
        """A run that was killed after it had saved the checkpoint of this epoch. Returns its folder."""

        def go():
            save = report.save_checkpoint

            def save_and_die(folder, state):
                save(folder, state)
                if len(state["log"]) == epoch:
                    os.kill(os.getpid(), signal.SIGKILL)

            report.save_checkpoint = save_and_die
            return train.main(self.command(out, *flags))

        out = self.out()
        assert self.wait(self.start(go))[0] == -signal.SIGKILL
        return only_folder(out)

    def assert_same(self, folder, reference=None):
        """A run ended as if nothing had happened to it: weights, scores, masks, metrics, log, one row, no leftovers."""
        reference = reference or self.reference
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
        assert files == sorted(str(path.relative_to(reference)) for path in reference.rglob("*")), files
        for name in files:
            if name.endswith(".safetensors"):
                assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
            if name.endswith(".npz"):
                with np.load(folder / name) as ours, np.load(reference / name) as theirs:
                    assert all(np.array_equal(ours[key], theirs[key]) for key in ("scores", "importance", "keep")), name
        (row,), (wanted,) = (report.read_rows([run.parent / "results.jsonl"]) for run in (folder, reference))
        same = ("test", "dev", "curve", "steps", "examples_seen", "tokens_seen", "scoring_rounds")
        assert all(row[key] == wanted[key] for key in same)
        log, wanted = ([json.loads(line) for line in (run / "epochs.jsonl").read_text().splitlines()]
                       for run in (folder, reference))
        clock = sum(line["seconds"].get(phase, 0) for line in log for phase in ("train", "score", "select"))
        assert abs(row["seconds"]["total"] - clock) < 0.01, (row["seconds"], clock)  # without the work that was lost
        assert [line | {"seconds": 0} for line in log] == [line | {"seconds": 0} for line in wanted]


def only_folder(out):
    folder, = (config.parent for config in Path(out).glob("*/config.json"))
    return folder


def kill_9(lab):
    """`kill -9` at a random moment, every second time again while resuming"""
    kills = 0
    while kills < lab.times(4, 50):
        out = lab.out()
        lab.kill_later(lab.command(out))
        kills += 1
        if kills % 2:
            lab.kill_later(lab.command(out, "--resume", "auto"))
            kills += 1
        lab.assert_same(lab.resume(out))
        shutil.rmtree(out)
    return kills, "resumed; weights, scores, masks, metrics, log and row as of an uninterrupted run, bit for bit"


CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.truncate", "os.rmdir", "fcntl.flock"}


def die_before_change(number, out):
    """In a child: kill this process just before its change number `number` to a file under `out`."""
    seen = 0

    def hook(event, args):
        nonlocal seen
        writes = event == "open" and isinstance(args[1], str) and args[1].strip("rbt") and str(out) in str(args[0])
        if event in CHANGES or writes:
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def kill_9_at_every_change(lab):
    """`kill -9` just before the n-th change to a file or folder, for every n"""
    n = 0
    while True:
        n += lab.times(20, 1)
        out = lab.out()

        def go(n=n, out=out):
            die_before_change(n, out)
            return train.main(lab.command(out))

        status, errors = lab.wait(lab.start(go))
        if status == 0:
            break
        assert status == -signal.SIGKILL, errors
        lab.assert_same(lab.resume(out))
        shutil.rmtree(out)
    return n // lab.times(20, 1) - 1, "resumed; as of an uninterrupted run, bit for bit; the row is there once"


def interrupt(lab):
    """Ctrl-C or SIGTERM at a random moment"""
    times, longest = lab.times(2, 20), 0.0
    for i in range(times):
        out, number = lab.out(), (signal.SIGINT, signal.SIGTERM)[i % 2]
        pid = lab.start(lambda out=out: train.main(lab.command(out)))
        time.sleep(0.1 + lab.rng.random() * lab.seconds * 0.8)
        os.kill(pid, number)
        begun = time.perf_counter()
        status, errors = lab.wait(pid)
        longest = max(longest, time.perf_counter() - begun)
        if status:  # else it had just ended
            assert status == 128 + number and len(errors) == 1 and "interrupted" in errors[0], (status, errors)
            assert not list(out.glob("*/config.json")) or f"--resume {only_folder(out)}" in errors[0], errors
        lab.assert_same(lab.resume(out))
    return times, f"ended within {longest:.1f} s, status 130 or 143, one line that says how to go on; resumed"


def wrong_loss(lab):
    """NaN loss at a random step"""
    times = lab.times(1, 10)
    for _ in range(times):
        out, bad = lab.out(), int(lab.rng.integers(31, 80))  # an epoch has 30 steps, or 15: after the first

        def go(out=out, bad=bad):
            losses, calls = train.losses, iter(range(1, 1000))
            train.losses = lambda *both: losses(*both) * (float("nan") if next(calls) == bad else 1)
            return train.main(lab.command(out))

        status, errors = lab.wait(lab.start(go))
        assert status == 2 and f"the loss is nan at step {bad} (epoch" in errors[0], errors
        lab.assert_same(lab.resume(out))  # where the fault is not in the run itself
    return times, "stopped at that step, which the message names; the last good checkpoint goes on without the fault"


def no_memory(lab):
    """Memory limit below what a batch needs"""
    times = lab.times(3, 20)
    for _ in range(times):  # what fails first, and what it says, is another thing at every limit
        out, room = lab.out(), int(lab.rng.integers(2**26, 2**28))

        def go(out=out, room=room):
            def limited(*loaded):
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (used + room, used + room))
                return loop(*loaded)

            loop, train.train = train.train, limited
            return train.main([*lab.command(out, "--max-train", "4000"), "--batch-size", "2000"])

        status, errors = lab.wait(lab.start(go))
        wanted = "out of memory; lower --batch-size 2000 or --max-length 256 ("
        assert status == 2 and len(errors) == 1 and wanted in errors[0], (room, errors)
    return times, "one line with the batch size and what to lower"


def damaged_checkpoint(lab):
    """Checkpoint truncated at a random length, or with a bit flipped"""
    folder, times = lab.stopped(), lab.times(6, 60)
    checkpoint = folder / "checkpoint.pt"
    whole = checkpoint.read_bytes()
    cut = lab.times(3, 20)
    for i in range(times):
        damaged = bytearray(whole)
        if i < cut:
            del damaged[int(lab.rng.integers(len(whole))) :]
        else:
            damaged[int(lab.rng.integers(len(whole)))] ^= 1 << int(lab.rng.integers(8))
        checkpoint.write_bytes(damaged)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        status, errors = lab.wait(lab.start(lambda: train.main(["--resume", str(folder)])))
        assert status == 2 and len(errors) == 1 and f"{checkpoint}: damaged" in errors[0], errors
        assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    checkpoint.write_bytes(whole)
    lab.assert_same(lab.resume(folder.parent))
    return f"{cut} + {times - cut}", "refused in one line, nothing overwritten; the whole one goes on"


def foreign_checkpoint(lab):
    """Checkpoint of another run in the folder"""
    folder = lab.stopped()
    flags = (["--seed", "1"], ["--max-train", "239"], ["--lr", "1e-3"], ["--keep", "0.4"])
    for changed in flags:
        other = lab.stopped(*changed, epoch=1)
        shutil.copy(folder / "checkpoint.pt", other)
        status, errors = lab.wait(lab.start(lambda other=other: train.main(["--resume", str(other)])))
        assert status == 2 and f"of another run, with other {changed[0][2:].replace('-', '_')}" in errors[0], errors
    return len(flags), "refused in one line that says what differs"


def await_checkpoint(out):
    """Wait until a run in `out` has left one."""
    deadline = time.monotonic() + SECONDS
    while not list(out.glob("*/checkpoint.pt")):
        assert time.monotonic() < deadline, "no checkpoint appeared"
        time.sleep(0.002)


def live_run(lab):
    """`--resume` of a run that is going on"""
    times = lab.times(1, 5)
    for _ in range(times):
        out = lab.out()
        first = lab.start(lambda out=out: train.main(lab.command(out, "--epochs", "100")))
        await_checkpoint(out)
        for command in (["--resume", str(only_folder(out))], lab.command(out, "--epochs", "100", "--resume", "auto")):
            status, errors = lab.wait(lab.start(lambda command=command: train.main(command)))
            assert status == 2 and "in use by a run that is going on" in errors[0], errors
        os.kill(first, signal.SIGKILL)
        lab.wait(first)
    return 2 * times, "refused in one line"


@contextmanager
def small_disk(lab, size):
    folder = lab.out()
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(mount, check=True, capture_output=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full_disk(lab):
    """Disk that becomes full during a run (a tmpfs), with a random number of bytes left"""
    times = lab.times(2, 20)
    for _ in range(times):
        with small_disk(lab, "24m") as disk:
            pid = lab.start(lambda disk=disk: train.main(lab.command(disk / "runs")))
            await_checkpoint(disk / "runs")
            left = int(10 ** lab.rng.uniform(0, 6))
            with open(disk / "filler", "wb", buffering=0) as filler:
                filler.write(bytes(max(0, shutil.disk_usage(disk).free - left)))
            status, errors = lab.wait(pid)
            assert status in (0, 2) and len(errors) == (status > 0), (status, errors)  # 0: just enough was left
            (disk / "filler").unlink()
            lab.assert_same(lab.resume(disk / "runs"))
    return times, "ended with one line; the last checkpoint is whole and goes on when there is room"


def no_room(lab):
    """Disk without room for two checkpoints, or read-only, at the start"""
    with small_disk(lab, "1m") as disk:
        status, errors = lab.wait(lab.start(lambda: train.main(lab.command(disk / "runs"))))
        assert status == 2 and "checkpoints take" in errors[0] and not list(disk.iterdir()), errors
    with small_disk(lab, "24m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        status, errors = lab.wait(lab.start(lambda: train.main(lab.command(disk / "runs"))))
        assert status == 2 and "Read-only file system" in errors[0], errors
    return 2, "refused in one line before training"


def rows_at_once(lab):
    """Result rows appended by 8 processes at once"""
    path, row = lab.scratch / "at-once.jsonl", report.read_rows([lab.reference.parent / "results.jsonl"])[0]
    path.write_bytes(b'{"args": {"dataset"')  # what a crash left

    def append(process):
        for i in range(25):
            report.append_line(path, {**row, "folder": f"{process}-{i}", "padding": "x" * 7 * process * i})
        return 0

    for pid in [lab.start(lambda process=process: append(process)) for process in range(8)]:
        assert lab.wait(pid)[0] == 0
    rows = quietly(report.read_rows, [path])
    assert sorted(row["folder"] for row in rows) == sorted(f"{process}-{i}" for process in range(8) for i in range(25))
    assert len(path.read_text().splitlines()) == 201
    return len(rows), "all there and whole, after a line that a crash had cut off"


def torn_row(lab):
    """Last row cut off at a random length, another appended"""
    path, row = lab.scratch / "torn.jsonl", report.read_rows([lab.reference.parent / "results.jsonl"])[0]
    times = lab.times(20, 200)
    for _ in range(times):
        path.unlink(missing_ok=True)
        report.append_line(path, row)
        size = path.stat().st_size
        report.append_line(path, row)
        os.truncate(path, size + int(lab.rng.integers(1, size - 1)))
        report.append_line(path, row)
        assert quietly(report.read_rows, [path]) == [row, row]
    return times, "skipped with a warning; the rows before and after it are read"


def quietly(function, *args):
    return test_fuzz.silent(function, *args)[0]


def mutated_inputs(lab):
    """Mutated datasets, checkpoints, model folders, configurations, result files"""
    each = lab.times(30, 3000)
    counts = {}

    def go():
        torch.manual_seed(0)
        for name, subject in test_fuzz.subjects(lab.scratch / "fuzz", lab.model()).items():
            n = each if name != "model folder" else each // 8
            counts[name] = test_fuzz.fuzz(subject, n, np.random.default_rng([1, n]), lab.scratch / "fuzz" / name)
        (lab.scratch / "fuzz.json").write_text(json.dumps(counts))
        return 0

    global SECONDS
    SECONDS = 1000
    assert lab.wait(lab.start(go))[0] == 0
    counts = json.loads((lab.scratch / "fuzz.json").read_text())
    described = "; ".join(f"{name} {valid} of {valid + refused}" for name, (valid, refused) in counts.items())
    return sum(map(sum, counts.values())), f"accepted as valid: {described}; all others refused in one line"


def dying_rank(lab):
    """One of two processes dies, then both go on"""
    def ranks(command):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = str(free.getsockname()[1])
        return [lab.start(lambda: train.main(command), WORLD_SIZE="2", RANK=rank, LOCAL_RANK=rank, MASTER_PORT=port,
                          MASTER_ADDR="localhost", LOCAL_WORLD_SIZE="2") for rank in "01"]

    whole = lab.out()
    assert [lab.wait(pid)[0] for pid in ranks(lab.command(whole))] == [0, 0]
    times = lab.times(1, 6)
    for i in range(times):
        out = lab.out()
        first_and_second = ranks(lab.command(out))
        await_checkpoint(out)
        dies = i % 2
        os.kill(first_and_second[1 - dies], signal.SIGKILL)
        lab.wait(first_and_second[1 - dies])
        status, errors = lab.wait(first_and_second[dies])
        assert status == 2 and "lost another process of this run" in errors[0], (status, errors)
        command = lab.command(out, "--resume", "auto") if dies else ["--resume", str(only_folder(out))]
        assert [lab.wait(pid)[0] for pid in ranks(command)] == [0, 0]
        lab.assert_same(only_folder(out), only_folder(whole))
    return times, "the other one ends with one line; resumed, as of two uninterrupted processes, bit for bit"


FAULTS = (kill_9, kill_9_at_every_change, interrupt, wrong_loss, no_memory, damaged_checkpoint, foreign_checkpoint,
          live_run, full_disk, no_room, rows_at_once, torn_row, mutated_inputs, dying_rank)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--short", action="store_true", help="a little of everything")
    p.add_argument("--only", nargs="+", choices=[fault.__name__ for fault in FAULTS], help="these faults")
    args = p.parse_args(argv)
    torch.set_num_threads(1)
    status = 0
    with tempfile.TemporaryDirectory() as scratch:
        lab = Lab(scratch, args.short)
        print("| fault | times | outcome | lost |\n| --- | --- | --- | --- |", flush=True)
        for fault in FAULTS:
            if args.only and fault.__name__ not in args.only:
                continue
            begun = time.perf_counter()
            try:
                times, outcome = fault(lab)
                lost = "nothing"
            except subprocess.CalledProcessError as error:
                times, outcome, lost = 0, f"left out: {report.one_line(error.stderr or error)}", "–"
            except AssertionError as error:
                times, outcome, lost, status = "–", f"FAILED: {report.one_line(error)}", "?", 1
                print(error, file=sys.stderr)
            print(f"| {fault.__doc__} | {times} | {outcome} | {lost} |", flush=True)
            print(f"{fault.__name__}: {time.perf_counter() - begun:.1f} s", file=sys.stderr, flush=True)
    here = report.environment("cpu")
    changed = ", changed" if here["dirty"] else ""
    print(f"\nCommit {here['git'] or 'unknown'}{changed}; {here['cpu']}, torch {here['torch']}.")
    return status


if __name__ == "__main__":
    sys.exit(main())
