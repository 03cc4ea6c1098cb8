"""What runs leave and what they show: times, log lines, scores, checkpoints, the closing summary; and over many runs,
tables and pictures.

    python report.py runs/results.jsonl              the table; with --to DIR, a page and the picture, too
    python report.py runs/<folder of a run>          the examples with the highest scores: likely label errors
"""

import argparse
import hashlib
import importlib.util
import io
import json
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from data import DataError, demo, read
from data.encoding import one_line
from data.parallel import from_first, lock, rank

CHECKOUT = Path(__file__).resolve().parent


class RunError(RuntimeError):
    """A run that cannot start or go on. The message is one line."""


class Clock:
    """Seconds by phase: `with clock("train"): …`. Waits for the device, so that work is billed to its phase."""

    def __init__(self, device):
        self.device, self.seconds, self.laps = torch.device(device), {}, {}

    def now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase):
        start = self.now()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start

    def add(self, seconds):
        """Count seconds by phase of an earlier part of this run, too."""
        for phase, s in seconds.items():
            self.seconds[phase] = s + self.seconds.get(phase, 0.0)

    def lap(self):
        """Seconds by phase since the last lap, without the phases that had none."""
        lap = {phase: round(s - self.laps.get(phase, 0.0), 4) for phase, s in self.seconds.items()}
        self.laps = dict(self.seconds)
        return {phase: s for phase, s in lap.items() if s > 0}


def progress(epoch, epochs, kept, n):
    """A bar that counts examples; none where standard error is no terminal."""
    return tqdm(total=kept, unit="ex", desc=f"epoch {epoch + 1}/{epochs}, {kept} of {n}", leave=False,
                disable=True if rank() else None)


# ---- a run's folder: one run at a time, files whole or not there


def flags(args):
    """What config.json keeps of the flags: all that make a run what it is, as a dict."""
    return {name: value for name, value in vars(args).items() if name not in ("resume", "folder")}


def new_folder(args):
    """A new folder for this run under --out, with its config.json. Returns the folder, what is in that file, and the
    open file, a lock; OSError where a folder cannot be made or results.jsonl not written."""
    out = Path(args.out)
    dataset = Path(args.dataset).name[:40]  # of a folder of the user's, the last part
    name = f"{dataset}-{args.method}-{args.keep:g}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        open(out / "results.jsonl", "a").close()
        for suffix in ["", *(f"-{i}" for i in range(2, 100))]:  # runs of the same second
            with suppress(FileExistsError):
                folder = out / (name + suffix)
                folder.mkdir()
                sync(out)
                facts = {"folder": str(folder), "args": flags(args), "environment": environment(args.device)}
                config = open(folder / "config.json.part", "x")  # noqa: SIM115 (it stays open)
                lock(config)
                json.dump(facts, config, indent=1)
                config.flush()
                args.folder = None if rank() else folder
                publish(Path(config.name), folder / "config.json")
                return folder, facts, config
    except OSError as error:
        where = error.filename or out
        raise OSError(f"--out {out}: {error.strerror} ({where}); name a folder that can be written") from None
    raise OSError(f"--out {out}: too many runs named {name}")


def read_config(folder):
    """A run's config.json, {"args": {flag: value}, "environment": {…}, …}. RunError where there is none."""
    try:
        facts = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
        if not (isinstance(facts["args"], dict) and isinstance(facts["environment"], dict)):
            raise TypeError("flags and environment were expected")
        facts["args"] = BEFORE | facts["args"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RunError(f"{folder}: no run's folder, its config.json cannot be read ({one_line(error)})") from None
    return facts


def command_line(folder):
    """The flags of a run as a list of arguments, to be checked like a user's."""
    given = read_config(folder)["args"].items()
    return [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}") for name, value in given
            if value is not None and value is not False]  # fmt: skip


def recorded_in(out):
    """Yield (folder, row) for each run in `out` that has a row in its results.jsonl."""
    path = out / "results.jsonl"
    for row in read_rows([path]) if path.exists() else []:
        yield out / Path(str(row.get("folder"))).name, row


def recorded(folder):
    """A run's row in results.jsonl, or None."""
    return next((row for owner, row in recorded_in(folder.parent) if owner.name == folder.name), None)


def finished(folder, row):
    """The row of a run that is done, its model saved; else None. row: what `recorded` has of it."""
    return row if row and (row["args"].get("no_model") or (folder / "model").is_dir()) else None


def same_run(saved, args):
    """Whether a run with the flags `saved` trains as one with `args` would."""
    return settings(saved) == settings(flags(args)) and saved.get("seed") == args.seed


def reopen(args):
    """The run that --resume means; auto: of those in --out with the same settings and seed, one that has its row in
    results.jsonl, or the newest.

    Returns (folder, what is in its config.json, that file open: a lock) or None where a new run is to start; and the
    row of a run that needs nothing more, or None, in all processes. RunError where it cannot be gone on with.
    """
    folder, out = Path(args.resume) if args.resume else None, Path(args.out)
    if args.resume == "auto":
        for owner, row in recorded_in(out):
            if same_run(row["args"], args) and (args.no_model or (owner / "model").is_dir()):
                if finished(owner, row):  # else it can still be gone on with, to save its model
                    remove_checkpoints(owner)  # where the run was killed just before it would have done so
                return None, from_first(row)
        same = []
        for config in out.glob("*/config.json"):
            try:
                saved = read_config(config.parent)["args"]
                if same_run(saved, args) and saved.get("no_model") == args.no_model:
                    same.append((config.stat().st_mtime_ns, config.parent))
            except RunError as error:
                print(f"warning: {error}; passed over", file=sys.stderr)
        folder = max(same)[-1] if same else None
        if not folder:
            print(f"no run with these flags in {args.out}/ yet: a new one starts", flush=True)
    if not folder:
        return None, from_first(None)
    facts, config = read_config(folder), open(folder / "config.json", "r+")  # noqa: SIM115 (it stays open)
    try:
        lock(config)
    except BlockingIOError:
        raise RunError(f"{folder}: in use by a run that is going on; wait for its end, or end it first") from None
    args.folder = None if rank() else folder
    log = folder / "epochs.jsonl"  # a line is there before its checkpoint, but never two
    epochs = log.read_bytes().count(b"\n") if log.exists() and not (folder / "checkpoint.pt").exists() else 0
    row = recorded(folder)  # read now that the folder is locked: its run may have ended since
    if not row and (epochs > facts["args"].get("save_every", args.save_every) or (folder / "model").is_dir()):
        raise RunError(f"{folder}: has run, but has no row in {folder.parent / 'results.jsonl'} and no checkpoint; "
                       "were they moved? Without --resume it starts anew, in another folder")
    done, here = finished(folder, row), environment(args.device)
    changed = [name for name in here if here[name] != facts["environment"].get(name)]
    if changed and not done:
        print(f"warning: {folder}: began in another environment ({', '.join(changed)}); what comes out may differ from "
              "an uninterrupted run", file=sys.stderr)
    if done:
        remove_checkpoints(folder)  # where the run was killed just before it would have done so
    return (folder, facts | {"folder": str(folder), "args": flags(args)}, config), from_first(done)


def going_on(args):
    """What to say behind an error: how the run can be resumed; nothing where it had not begun."""
    if args is None or args.folder is None:
        return ""
    processes = os.environ.get("WORLD_SIZE", "1")
    launcher = "python" if processes == "1" else f"torchrun --nproc_per_node={processes}"
    script = CHECKOUT / "train.py" if Path.cwd() != CHECKOUT else "train.py"
    return f"; to go on: {launcher} {shlex.quote(str(script))} --resume {shlex.quote(str(args.folder))}"


def check_space(folder, weights):
    """OSError where the disk of `folder`, which need not exist, has no room for two checkpoints, or for another one: in
    each, these weights and two averages of them."""
    folder, there = Path(folder).absolute(), Path(folder) / "checkpoint.pt"
    size = 6 * sum(weight.nbytes for weight in weights) - (there.stat().st_size if there.exists() else 0)
    free = shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    if free < size and rank() == 0:
        raise OSError(f"--out {folder}: {free / 1e6:.0f} MB are free on this disk, and checkpoints take "
                      f"{size / 1e6:.0f} MB; make room, or name another folder")


def sync(path):
    """Have a file, or the names in a folder, on the disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def publish(part, path):
    """Give what was written under a temporary name, a file or a folder of files, its own when all is on the disk."""
    for file in part.iterdir() if part.is_dir() else [part]:
        sync(file)
    os.replace(part, path)
    sync(path.parent)  # the name, too


@contextmanager
def whole_file(path):
    """`with whole_file(path) as file: …`: the file is there with all that is written to it, or as it was before."""
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "wb") as file:
            yield file
        publish(part, path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}; it is left as it was") from None
    finally:
        part.unlink(missing_ok=True)


def append_line(path, fields):
    """One line of JSON, whole or not at all, whatever other processes append at the same time."""
    line = json.dumps(fields).encode() + b"\n"
    with open(path, "a+b", buffering=0) as file:
        lock(file, wait=True)
        size = file.seek(0, os.SEEK_END)
        if size and os.pread(file.fileno(), 1, size - 1) != b"\n":
            line = b"\n" + line  # or a line that a crash cut off would swallow this one
        try:
            written = file.write(line)
        except OSError as error:
            raise OSError(f"{path}: {error.strerror}; no line was added") from None
        if written != len(line):
            file.truncate(size)
            raise OSError(f"{path}: no space left for a whole line; none was added")
        os.fsync(file.fileno())  # the checkpoint is removed after this


def save_checkpoint(folder, state):
    """checkpoint.pt: 32 bytes, the SHA-256 of the rest; then `state`, as torch.save writes it.

    state: a nested dict of NumPy arrays and plain values. Only the first of several processes writes.
    """
    if rank() == 0:
        body = io.BytesIO()
        torch.save(converted(state, np.ndarray, torch.from_numpy), body)
        with whole_file(folder / "checkpoint.pt") as file:
            file.write(hashlib.sha256(body.getbuffer()).digest())
            file.write(body.getbuffer())


def load_checkpoint(folder, identity):
    """What the first process' `save_checkpoint` wrote, in all processes; None where it has written nothing. RunError
    where the file is damaged, or its "identity" is not that of this run."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return from_first(None)
    try:
        raw = memoryview(path.read_bytes())
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:
            raise ValueError("the checksum is wrong")
        state = converted(torch.load(io.BytesIO(raw[32:]), weights_only=True), torch.Tensor, torch.Tensor.numpy)
        saved = BEFORE | state["identity"]
        other = [name for name in identity if saved.get(name) != identity[name]]
    except Exception:  # whatever foreign bytes make torch.load raise; it would go on to advise weights_only=False
        raise RunError(f"{path}: damaged, or no checkpoint of this program; the run has to start anew, without "
                       "--resume") from None
    if other:
        raise RunError(f"{path}: of another run, with other {', '.join(other)}; this one has to start anew, without "
                       "--resume")
    return from_first(state)


def converted(tree, kind, function):
    """A nested dict with `function` of each value of that kind."""
    if isinstance(tree, dict):
        return {name: converted(value, kind, function) for name, value in tree.items()}
    return function(tree) if isinstance(tree, kind) else tree


def identity(args, data, weights):
    """What a checkpoint must share with the run that it is loaded into: flags, examples and shapes of the weights."""
    digest = hashlib.sha256()
    for array in (data.train.tokens, data.train.offsets, data.train.labels, data.train.tags):
        if array is not None:
            digest.update(array.cpu().numpy())
    return {**settings(flags(args)), "method": args.method, "seed": args.seed, "examples": digest.hexdigest(),
            "weights": [list(weight.shape) for weight in weights]}  # fmt: skip


def remove_checkpoints(folder):
    """For when the run has ended well."""
    for path in folder.glob("checkpoint.pt*"):
        path.unlink(missing_ok=True)


# ---- what is written and said along the way


def opening(args, data, folder, log, epochs):
    """Say what is about to be done; of a run that goes on, drop what came after its checkpoint, which has this log."""
    sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    print(f"{args.dataset}: {sizes} examples, {data.n_labels} labels, {data.n_tags} tags; {args.precision} on "
          f"{args.device}; to {folder}/", flush=True)
    if log:
        print(f"resumed after epoch {len(log)} of {epochs}", flush=True)
    with whole_file(folder / "epochs.jsonl") as file:
        file.writelines(json.dumps(line).encode() + b"\n" for line in log)


def log_epoch(folder, line, epochs, n):
    """One line to epochs.jsonl, and one to the screen."""
    append_line(folder / "epochs.jsonl", line)
    seconds = "  ".join(f"{phase} {s:.1f} s" for phase, s in line["seconds"].items())
    print(f"epoch {line['epoch']:>2}/{epochs}  kept {line['kept']}/{n}  loss {line['loss']:.4f}  "
          f"dev {metrics_line(line['dev'])}  |  {seconds}", flush=True)


def save_round(folder, epoch, scores, importance, kept):
    """rounds/epoch-<e>.npz: what was scored and kept before epoch e (from 1), each (N,) in dataset order: scores,
    importance (the smoothed scores) and keep (bool)."""
    (folder / "rounds").mkdir(exist_ok=True)
    mask = np.zeros(len(scores), dtype=bool)
    mask[kept] = True
    with whole_file(folder / "rounds" / f"epoch-{epoch:03}.npz") as file:
        np.savez_compressed(file, scores=scores, importance=importance, keep=mask)


def has_bf16(device):
    """Whether bf16 is in the hardware (on a CPU: AVX512-BF16 or AMX); where it is emulated, it is slower than fp32."""
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # absent from some PyTorch versions
    return torch.device(device).type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def environment(device):
    """What a reader needs to judge a timing: code version, package versions, machine. A dict of plain values."""

    def git(*command):
        try:
            result = subprocess.run(["git", *command], cwd=CHECKOUT, capture_output=True, text=True)
        except OSError:
            return None  # no git on this machine
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    changes = git("status", "--porcelain", "--untracked-files=no")
    on_gpu = torch.device(device).type == "cuda"
    return {
        "git": git("rev-parse", "HEAD"), "dirty": None if changes is None else bool(changes),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": np.__version__, "device": torch.cuda.get_device_name(device) if on_gpu else torch.device(device).type,
        "cpu": processor, "threads": torch.get_num_threads(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }  # fmt: skip


def totals(data, schedule, clock, log):
    """What a run cost and saw, from its clock and the log that `train` returned: the figures of its row."""
    n, kept = len(data.train), [line["kept"] for line in log]
    seconds = dict(clock.seconds, total=sum(clock.seconds.get(phase, 0.0) for phase in ("train", "score", "select")))
    rounds = sum(schedule.prunes_at(epoch) for epoch in range(len(log)))
    # None where no epoch was full: there is nothing to estimate from
    full = [line["seconds"]["train"] for line in log if line["kept"] == n]
    full_epoch = float(np.median(full)) if full else None
    scoring_cost = seconds.get("score", 0.0) / max(rounds, 1) / full_epoch if full else None
    relative = (sum(kept) / n + scoring_cost * rounds) / schedule.epochs if full else None  # the cost model
    return {
        "rows": {name: len(split) for name, split in data.splits.items()}, "pairs": data.pairs,
        "seconds": {phase: round(s, 3) for phase, s in seconds.items()},
        "steps": log[-1]["step"], "pruned_epochs": sum(size < n for size in kept),
        "examples_seen": sum(kept), "examples_full": n * schedule.epochs,
        "tokens_seen": sum(line["tokens"] for line in log),
        "tokens_full": int(data.train.lengths.sum()) * schedule.epochs,
        "scoring_rounds": rounds, "scoring_cost": full and round(scoring_cost, 4),
        "full_seconds": full and round(full_epoch * schedule.epochs, 3),  # estimated from the epochs that were full
        "model_time": full and round(relative, 4),
        "epoch_seconds": [line["seconds"]["train"] for line in log], "epoch_kept": kept,
        "curve": [line["dev"] for line in log],
    }  # fmt: skip


def reported(row):
    """The metrics that a run is judged by: those on test, or on dev where there is no test split."""
    further = {f"{name} (mismatched)": value for name, value in row.get("dev_mismatched", {}).items()}  # MNLI's
    return {**(row["test"] if "test" in row else row["dev"]), **further}


def metrics_line(metrics):
    """Metrics in percent, as text."""
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def machine(row):
    """Name of the processor that did the work."""
    return row["environment"]["cpu" if row["environment"]["device"] == "cpu" else "device"]


def summary(row):
    """What a person wants to know when a run ends. row: a row of results.jsonl. Returns lines of text."""
    args, seconds, folder, rounds = row["args"], row["seconds"], Path(row["folder"]), row["scoring_rounds"]
    evaluated = [split for split in ("test", "dev", "dev_mismatched") if split in row]
    when = "(after the last epoch)" if "test" in row else "(after the last epoch; there is no test split)"
    lines = [
        f"{args['dataset']}, {method_of(row)}, kept {kept_share(args)}, seed {args['seed']}, "
        f"{args['precision']} on {machine(row)}",
        *(f"{split:<6} {metrics_line(row[split])}   {when if split == evaluated[0] else ''}".rstrip()
          for split in evaluated),
        f"time   {seconds['total']:.1f} s = train {seconds['train']:.1f} + score {seconds.get('score', 0):.1f} + "
        f"select {seconds.get('select', 0):.2f};  outside it: load {seconds['load']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}, save {seconds['save']:.1f}",
        f"seen   {row['examples_seen']:,} of {row['examples_full']:,} examples "
        f"({row['examples_seen'] / row['examples_full']:.1%}), {row['tokens_seen'] / row['tokens_full']:.1%} of the "
        f"tokens, in {row['steps']:,} steps",
    ]
    if row["pruned_epochs"] and row["full_seconds"]:
        lines += [
            f"saved  {1 - seconds['total'] / row['full_seconds']:.1%} of an estimated {row['full_seconds']:.1f} s for "
            f"{args['epochs']} epochs on everything, at the pace of this run's "
            f"{len(row['curve']) - row['pruned_epochs']} full ones;",
            f"       the cost model says {1 - row['model_time']:.1%}, with {rounds} selection{'s' * (rounds != 1)} at "
            f"{row['scoring_cost']:.2f} epochs each. The same command with --method full measures it.",
        ]
    if args["dataset"] == "demo" and rounds and args["method"] != "random":
        epoch, scored = max(read_round_files(folder).items())
        found, planted = demo.errors_found(scored["scores"])
        lines.append(f"found  {found} of the {planted} wrong annotations planted in demo, among the {planted} highest "
                     f"scores of the last round (epoch-{epoch:03}.npz)")
    if rounds and args["selection"] == "dynamic":
        metric, began, end = main_metric(row), row["curve"][args["full_epochs"] - 1], row["curve"][-1]
        if end[metric] < began[metric]:
            highest = args["method"] in ("el2n", "loss") and not (args["draw"] or args["stratify"])
            advice = "a higher --keep" + ", --draw or --stratify" * highest
            lines.append(f"lost   dev {metric} was {began[metric]:.2f} before anything was pruned: too little is kept, "
                         f"or little but wrong labels; {advice} may help")  # fmt: skip
    lines.append(f"left   {folder}/ with the log, scores and keep-masks; a row in {folder.parent / 'results.jsonl'}")
    if not args["no_model"]:
        where = json.dumps(f"{folder}/model", ensure_ascii=False)
        text = '("…", "…")' if row["pairs"] else '"…"'
        example = f"from models import NLUModel; print(NLUModel.load({where}).predict([{text}]))"
        here = "" if Path.cwd() == CHECKOUT else f"PYTHONPATH={shlex.quote(str(CHECKOUT))} "
        lines.append(f"next   {here}python -c {shlex.quote(example)}")
    return "\n".join(lines)


def read_rows(paths):
    """Rows of result files, in order. A line that is no row (a run was killed while writing) is skipped and said."""
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                row["args"] = BEFORE | row["args"]
                table([row])  # fails where something is missing
                percent = reported(row).values()
                positive = row["seconds"]["total"], row.get("full_seconds") or 1, row["args"]["epochs"]
                if not (all(-100 <= value <= 100 for value in percent) and all(0 < value < 1e9 for value in positive)):
                    raise ValueError("no figures of a run")
                rows.append(row)
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration, OverflowError, RecursionError):
                print(f"warning: {path}:{number}: not a whole row; skipped", file=sys.stderr)
    return rows


# ---- tables and pictures over many runs

# Runs that differ in nothing but these flags are repetitions of one another.
NOT_SETTINGS = {"seed", "out", "no_model", "data_dir", "save_every"}
# A run on everything is the same whatever these are.
PRUNING = {"method", "keep", "full_epochs", "cycle", "full_end", "selection", "rescore", "ema", "std_weight", "offset",
           "draw", "stratify", "class_floor"}  # fmt: skip
# Of these, the usual value is not worth naming where others were tried.
TRAINING = {"lr", "schedule", "clip", "batch_size"}
# What a run did from before these flags.
BEFORE = {"selection": "dynamic", "rescore": "all", "full_end": 0, "draw": False, "stratify": False, "class_floor": 0}


def settings(flags):
    """Those flags that matter to a run, as a dict; of one on everything, without those of pruning."""
    ignored = NOT_SETTINGS | PRUNING if flags.get("method") == "full" else NOT_SETTINGS
    return {flag: value for flag, value in flags.items() if flag not in ignored}


def platform_of(row):
    """What two runs must share to be compared."""
    environment = row["environment"]
    return (machine(row), *(environment[name] for name in ("threads", "torch", "transformers")),
            environment.get("processes", 1))


def task_of(row):
    """What runs share that may be compared; in other flags, such as the number of epochs, they may differ."""
    same = (row["args"].get(flag) for flag in ("dataset", "model", "max_length", "max_train"))
    return platform_of(row), *same, tuple(reported(row))


def main_metric(row):
    """Name of the metric by which methods are compared."""
    return "frame_acc" if "frame_acc" in reported(row) else next(iter(reported(row)))


def accuracy_of(row):
    return reported(row)[main_metric(row)]


def on_dev(row):
    return row["dev"][main_metric(row)]


def seconds_of(row):
    return row["seconds"]["total"]


def cost(row, full):
    """Time of a run in epochs on everything: its own ones, as a machine is faster on some days than on others; where it
    had none, those of `full`, a row on full data."""
    flags = row["args"]
    if flags["method"] == "full":
        return flags["epochs"]
    own = row.get("full_seconds")
    epoch = own / flags["epochs"] if own else seconds_of(full) / full["args"]["epochs"]
    return seconds_of(row) / epoch


@dataclass
class Group:
    """Runs that differ in the seed alone, and what each is compared with.

    runs: rows by seed (of a seed that was run twice, the last). full: for each, the row on full data with its seed, or
    None. curves: for each, rows on full data with its seed by number of epochs, one for each that all seeds have.
    """

    runs: list
    full: list
    curves: list

    @property
    def args(self):
        return self.runs[0]["args"]

    @property
    def compared(self):
        """Whether there is a reference for every run, which this one is not itself."""
        return None not in self.full and self.runs != self.full

    def gains(self):
        """Points of the main metric above full data, one a seed."""
        return [accuracy_of(row) - accuracy_of(full) for row, full in zip(self.runs, self.full)]

    def times(self):
        """Time as a share of that on full data, one a seed."""
        return [cost(row, full) / full["args"]["epochs"] for row, full in zip(self.runs, self.full)]

    def curve(self):
        """Full data for fewer epochs: [(time in % of that for the most, mean accuracy, its deviation)], by time."""
        epochs = [row["args"]["epochs"] for row in self.curves[0]]
        accuracy = [[accuracy_of(row) for row in rows] for rows in zip(*self.curves)]
        means, deviations = map(statistics.mean, accuracy), map(deviation, accuracy)
        return list(zip((100 * number / epochs[-1] for number in epochs), means, deviations))

    def equal_time_gains(self):
        """Points above what full data reaches in the same time (the mean over seeds) with fewer epochs, between whose
        numbers a straight line is drawn; one a seed, or None where that is outside a line. For a compared group."""
        gains, spent = [], statistics.mean(cost(row, full) for row, full in zip(self.runs, self.full))
        for row, curve in zip(self.runs, self.curves):
            epochs, accuracy = zip(*((other["args"]["epochs"], accuracy_of(other)) for other in curve))
            if not epochs[0] <= spent <= epochs[-1]:
                return None
            gains.append(accuracy_of(row) - float(np.interp(spent, epochs, accuracy)))
        return gains


def groups(rows):
    """Rows as a list of Group, in the order of their first rows. The reference of a group is full data for the most
    epochs, of that with the flags most like the group's; its curve has for each number of epochs the learning rate that
    is best on dev, as fewer epochs may want another one."""
    repeated = {}
    for row in rows:
        key = task_of(row), row["args"]["method"], json.dumps(settings(row["args"]), sort_keys=True)
        repeated.setdefault(key, {})[row["args"]["seed"]] = row

    def training(by_seed):
        """Flags but the number of epochs, and that."""
        flags = settings(next(iter(by_seed.values()))["args"])
        return flags, flags.pop("epochs")

    def untuned(flags):
        """What the runs of a curve share, so that an epoch takes as long in all."""
        return {flag: value for flag, value in flags.items() if flag not in ("lr", "schedule", "clip")}

    full = {}  # by task
    for (task, method, _), by_seed in repeated.items():
        if method == "full":
            full.setdefault(task, []).append((*training(by_seed), by_seed))

    found = []
    for (task, *_), by_seed in repeated.items():
        same, (flags, _), seeds = full.get(task, []), training(by_seed), sorted(by_seed)
        most_alike = max(same, key=lambda run: (run[1], len(flags.items() & run[0].items())), default=({}, 0, {}))
        candidates = [(epochs, other) for others, epochs, other in same
                      if untuned(others) == untuned(most_alike[0]) and other.keys() >= by_seed.keys()]  # fmt: skip
        candidates.sort(key=lambda run: (run[0], statistics.mean(on_dev(run[1][seed]) for seed in seeds)))
        curve = dict(candidates).values()  # of as many epochs, the last: the best
        found.append(Group([by_seed[seed] for seed in seeds], [most_alike[2].get(seed) for seed in seeds],
                           [[other[seed] for other in curve] for seed in seeds]))  # fmt: skip
    return found


def p_value(differences):
    """Two-sided p of the paired t-test: how probable a mean as far from 0, or farther, would be by chance. None for
    fewer than two differences or where all are equal."""
    n = len(differences)
    if n < 2 or statistics.stdev(differences) < 1e-9:  # equal but for rounding
        return None
    t = statistics.mean(differences) / (statistics.stdev(differences) / n**0.5)
    # With t = √ν·tan θ, Student's density is proportional to cos(θ)^(ν−1), which is easy to integrate.
    theta = np.linspace(-np.pi / 2, np.pi / 2, 20001)
    density = np.cos(theta) ** (n - 2)
    return float(density[np.abs(theta) >= np.arctan(abs(t) / (n - 1) ** 0.5)].sum() / density.sum())


def deviation(values):
    """Standard deviation; 0 of one value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def mean_and_deviation(values, digits=2, sign=""):
    """As text; without a deviation where there is one value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.{digits}f}{spread}"


def difference(values):
    """A mean difference as text: in bold where a paired test over seeds says that it is one (p < 0.05)."""
    if values is None:
        return "–"
    p, text = p_value(values), mean_and_deviation(values, sign="+")
    if p is None:
        return text
    return f"{f'**{text}**' if p < 0.05 else text} (p {'< 0.001' if p < 0.001 else f'{p:.3f}'})"


def described_by(row, flag):
    """Among which runs a flag may tell `row` apart: of pruning, those of its method; else, all. A tuple."""
    own = settings(row["args"])
    return (flag, row["args"]["method"], own.get("selection"), own.get("draw")) if flag in PRUNING else (flag,)


def method_of(row):
    """The method and how it selected, in few words."""
    own = settings(row["args"])
    static, drawn = own.get("selection") == "static", own.get("draw") is True
    return row["args"]["method"] + ", static" * static + ", drawn" * drawn


def differing_flags(rows):
    """Which flags tell rows of one dataset apart and are no columns of a table: {their `described_by`: {dataset: the
    value that most rows have, or None}}."""
    values = {}
    for row in rows:
        for flag, value in settings(row["args"]).items():
            if flag not in ("dataset", "keep", "epochs"):
                among = described_by(row, flag), row["args"]["dataset"]
                values.setdefault(among, Counter())[json.dumps(value)] += 1
    flags = {}
    for (flag, dataset), counts in values.items():
        if len(counts) > 1:
            (usual, most), (_, second) = counts.most_common(2)
            flags.setdefault(flag, {})[dataset] = json.loads(usual) if most > second else None
    return flags


def describe(row, flags):
    """What a run did, in few words. flags: of `differing_flags`, of which those that are off are not named, nor how
    most runs were trained."""
    own, dataset = settings(row["args"]), row["args"]["dataset"]
    named = []
    for flag in sorted(own):
        usual = flags.get(described_by(row, flag))
        if own[flag] and usual and not (flag in TRAINING and usual.get(dataset, own[flag]) == own[flag]):
            named.append(flag.replace("_", "-") + ("" if own[flag] is True else f" {own[flag]}"))
    return ", ".join([method_of(row), *named])


def how_most_trained(flags):
    """The values that `describe` leaves out, as text. flags: of `differing_flags`."""
    said = [f"{flag[0].replace('_', '-')} {value} on {dataset}" for flag, usual in flags.items() if flag[0] in TRAINING
            for dataset, value in usual.items() if value is not None]  # fmt: skip
    return f"Where no other is said: {', '.join(said)}. " if said else ""


def kept_share(args):
    """As text, of InfoBatch the share that it drops below the mean."""
    keep = args["keep"]
    return f"r = {100 * (1 - keep):g} %" if args["method"] == "infobatch" else f"{100 * keep:g} %"


def table(rows):
    """Markdown: metrics, mean ± deviation over seeds, and what was lost and saved against full data for the most
    epochs, with the same seed, on the same machine and versions; and against full data in the same time."""
    flags = differing_flags(rows)
    head = ("dataset", "method", "kept", "epochs", "n", "metrics, %", "against full", "against full in the same time",
            "seconds", "time saved, %")  # fmt: skip
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for group in groups(rows):
        args = group.args
        metrics = {name: [reported(row)[name] for row in group.runs] for name in reported(group.runs[0])}
        lines.append("| " + " | ".join([
            args["dataset"], describe(group.runs[0], flags), kept_share(args), str(args["epochs"]),
            str(len(group.runs)), ", ".join(f"{name} {mean_and_deviation(column)}" for name, column in metrics.items()),
            difference(group.gains()) if group.compared else "–",
            difference(group.equal_time_gains()) if group.compared and args["method"] != "full" else "–",
            mean_and_deviation([seconds_of(row) for row in group.runs], 0),
            mean_and_deviation([100 * (1 - time) for time in group.times()], 1) if group.compared else "–",
        ]) + " |")  # fmt: skip
    text = "{}, {} threads, torch {}, transformers {}, {} process(es)"
    machines = sorted({text.format(*platform_of(row)).replace(", 1 process(es)", "") for row in rows})
    machines = [name.replace(" 1 threads", " 1 thread") for name in machines]
    on_dev = sorted({row["args"]["dataset"] for row in rows if "test" not in row})
    note = (f"On test{' (on dev: ' + ', '.join(on_dev) + ')' if on_dev else ''} after the last epoch: mean ± standard "
            "deviation over n seeds. Differences are of frame_acc, or of the first metric, from full data for the most "
            "epochs, seed by seed; p is of a paired t-test, and those with p < 0.05 are bold. Of full data in the same "
            "time: from runs with fewer epochs, of each number those best on dev, between which a straight line is "
            "drawn (it lies below a curve that flattens). Time is counted in a run's own epochs on everything, as a "
            f"machine is not as fast every day. {how_most_trained(flags)}Machine: {'; '.join(machines)}.")
    return "\n".join([*lines, "", note])


def page(rows, command, picture=True):
    """Markdown: the picture, if there is one, the targets and the table of rows. command: what makes it."""
    parts = ["# Results", f"Made by `{command}`.", *["![accuracy over time](figure.svg)"] * picture, "## The targets",
             targets(rows) or "No dynamic pruning that full data could be compared with.",
             "## All runs", table(rows)]  # fmt: skip
    return "\n\n".join(parts) + "\n"


# The paper's headlines, and what this project is after: {share kept: (points lost at most, saved at 10 epochs at least,
# saved at 40 epochs at least, what the paper loses, and saves)}.
TARGETS = {0.5: (0.2, 38, 44, "0", "up to 41"), 0.2: (0.5, 60, 70, "at most -1", "up to 66")}
MET = {True: "met", False: "missed"}


def targets(rows):
    """Markdown: what dynamic pruning reached, by dataset and over all, beside target and paper where TARGETS has the
    share and number of epochs; "" where there is none to compare with full data."""
    flags, same = differing_flags(rows), {}
    for group in groups(rows):
        args, first = group.args, group.runs[0]
        if group.compared and args["method"] != "full" and args["selection"] != "static":
            order = -args["keep"], args["method"] == "infobatch", -args["epochs"], describe(first, flags)
            same.setdefault((*order, group.full[0]["args"]["epochs"], str(platform_of(first))), []).append(group)
    if not same:
        return ""
    everything = list(chain(*same.values()))
    datasets = list(dict.fromkeys(group.args["dataset"] for group in everything))
    usual_n = statistics.mode(len(group.runs) for group in everything)
    several_machines = len({where for *_, where in same}) > 1
    head = ("kept", "method", "epochs", *datasets, "mean", "target", "saved, %", "target", "in the same time")
    lines, claimed = [head, ["---"] * len(head)], set()
    for (*_, name, _, _), alike in sorted(same.items(), key=lambda item: item[0]):
        keep, method = alike[0].args["keep"], alike[0].args["method"]
        if keep in TARGETS and keep not in claimed and method != "infobatch":
            claimed.add(keep)
            *_, loses, saves = TARGETS[keep]
            empty = [""] * (1 + len(datasets))
            lines.append((kept_share(alike[0].args), "the paper", *empty, loses, "", saves, "", ""))
        if several_machines:
            name += f", on {machine(alike[0].runs[0])}"
        lines.append((kept_share(alike[0].args), name, *target_cells(alike, datasets, usual_n)))
    note = (f"By dataset: points of its own metric above full data, and time saved; n = {usual_n} where no other is "
            "said. Mean: over all these runs, as are the tests; not all lines have the same datasets.")
    return "\n".join([*("| " + " | ".join(cells) + " |" for cells in lines), "", note])


def target_cells(alike, datasets, usual_n):
    """The cells of `targets` from the number of epochs on, for Groups that did the same, each on a dataset."""
    args, reference = alike[0].args, alike[0].full[0]["args"]["epochs"]
    by_dataset = {dataset: [] for dataset in datasets}
    for group in alike:
        gain, less, n = statistics.mean(group.gains()), 100 * (1 - statistics.mean(group.times())), len(group.runs)
        by_dataset[group.args["dataset"]].append(f"{gain:+.2f}, {less:.0f} %" + f" (n {n})" * (n != usual_n))
    gains = list(chain(*(group.gains() for group in alike)))
    saved = 100 * (1 - statistics.mean(chain(*(group.times() for group in alike))))
    aims = "–", "–"
    if args["keep"] in TARGETS and args["method"] != "infobatch" and args["epochs"] == reference in (10, 40):
        lost, at_10, at_40, *_ = TARGETS[args["keep"]]
        aim = at_40 if reference == 40 else at_10
        aims = f"≥ −{lost:g}: {MET[statistics.mean(gains) >= -lost]}", f"≥ {aim}: {MET[saved >= aim]}"
    equal_time = [group.equal_time_gains() for group in alike]
    return (str(args["epochs"]), *("; ".join(cell) or "–" for cell in by_dataset.values()), difference(gains), aims[0],
            f"{saved:.1f}", aims[1], difference(None if None in equal_time else list(chain(*equal_time))))  # fmt: skip


def figure(rows, path):
    """Draw accuracy over time, a panel a dataset, to path.svg and path.png: means with standard deviations, the line of
    full data for fewer and fewer epochs (of each number those that are best on dev), the band of full data, and the
    Pareto front. Needs a reference for every run that is to be drawn."""
    plt = pyplot()
    flags, panels = differing_flags(rows), {}
    for group in groups(rows):
        if None not in group.full:
            panels.setdefault(task_of(group.runs[0]), []).append(group)
    names = {describe(group.runs[0], flags) for group in chain(*panels.values()) if group.args["method"] != "full"}
    style = {name: {"color": f"C{i % 10}", "marker": "os^Dv<>pP*Xdh8"[i % 14]} for i, name in enumerate(sorted(names))}
    columns = max(1, min(3, math.ceil(len(panels) ** 0.5)))
    lines = max(1, -(-len(panels) // columns))
    fig, axes = plt.subplots(lines, columns, figsize=(6 * columns, 5 * lines), squeeze=False, layout="constrained")
    for ax in axes.flat[len(panels) :]:
        ax.remove()
    for ax, drawn in zip(axes.flat, panels.values()):
        panel(ax, drawn, flags, style)
    save_picture(fig, path)
    plt.close(fig)


def panel(ax, drawn, flags, style):
    """One dataset's Groups, those far below all of full data at the lower edge. style: of markers, by description."""
    points = []
    for group in drawn:
        times, accuracy = [100 * time for time in group.times()], [accuracy_of(row) for row in group.runs]
        points.append((statistics.mean(times), statistics.mean(accuracy), deviation(times), deviation(accuracy)))
    names = [describe(group.runs[0], flags) for group in drawn]
    reference = [group.runs == group.full for group in drawn].index(True)
    _, top, _, band = points[reference]
    ax.axhspan(top - band, top + band, color="0.9", zorder=0)
    ax.axhline(top, color="0.5", lw=0.8, zorder=1)
    x, y, dy = zip(*drawn[reference].curve())
    ax.errorbar(x, y, yerr=dy, color="black", marker=".", capsize=2, lw=1.2, label="full data, fewer epochs", zorder=3)
    front = [point for point in sorted(points) if point[1] > max([y for x, y, *_ in points if x < point[0]], default=0)]
    ax.plot([x for x, *_ in front], [y for _, y, *_ in front], color="goldenrod", lw=5, alpha=0.35, zorder=2,
            label="Pareto front")  # fmt: skip
    edge = min(y) - max(dy) - (max(point[1] for point in points) - min(y)) / 4
    for group, name, (x, y, dx, dy) in zip(drawn, names, points):
        if group.args["method"] != "full":
            label = None if name in ax.get_legend_handles_labels()[1] else name
            text = kept_share(group.args) + f" (at {y:.1f})" * (y < edge)
            y, dy = (y, dy) if y >= edge else (edge, 0)
            ax.errorbar(x, y, xerr=dx, yerr=dy, ls="", capsize=2, lw=0.8, ms=6, zorder=4, label=label, **style[name])
            ax.annotate(text, (x, y), xytext=(4, 4), textcoords="offset points", size=7)
    ax.set_ylim(bottom=edge - (top - edge) / 20)
    counts = sorted({len(group.runs) for group in drawn})
    ax.set(title=f"{drawn[0].args['dataset']} (n = {' to '.join(map(str, sorted({counts[0], counts[-1]})))})",
           xlabel="time, % of full data's", ylabel=f"{main_metric(drawn[0].runs[0])}, %")  # fmt: skip
    ax.legend(fontsize=7, loc="lower right")


def pyplot():
    """matplotlib's, which only pictures need."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "data diets"  # the same rows make the same file
    from matplotlib import pyplot

    return pyplot


def save_picture(fig, path):
    """Write a figure to path.svg and path.png."""
    fig.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    fig.savefig(path.with_suffix(".png"), dpi=110, metadata={"Software": None})


def read_round_files(folder):
    """The rounds of a run's folder as {epoch: {"scores", "importance", "keep"}}. RunError where there are none."""
    rounds = {}
    for path in sorted((folder / "rounds").glob("epoch-*.npz")):
        try:
            with np.load(path) as scored:
                rounds[int(path.stem.removeprefix("epoch-"))] = dict(scored)
        except Exception as error:  # whatever a damaged file makes NumPy raise
            raise RunError(f"{path}: no scores of a run ({one_line(error)})") from None
    if not rounds:
        raise RunError(f"{folder}: has no scores in rounds/; a run that prunes leaves them there")
    return rounds


def kept_picture(folder, path):
    """Draw which examples a run kept, a row a round, those with the highest mean importance on the left, to path.svg
    and path.png."""
    plt, rounds = pyplot(), read_round_files(folder)
    mean = np.mean([np.argsort(np.argsort(scored["importance"])) for scored in rounds.values()], axis=0)
    order = np.argsort(-mean, kind="stable")
    keep = np.array([scored["keep"][order] for scored in rounds.values()])
    columns = min(500, len(order))
    shares = np.array([[part.mean() for part in np.array_split(row, columns)] for row in keep])
    fig, ax = plt.subplots(figsize=(9, 0.5 * len(rounds) + 1.6), layout="constrained")
    image = ax.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, extent=(0, len(order), len(rounds), 0))
    ax.set_yticks(np.arange(len(rounds)) + 0.5, [f"before epoch {epoch}" for epoch in rounds])
    ever = np.any(keep, axis=0).mean()
    ax.set(xlabel="train examples, by falling mean rank of importance",
           title=f"{folder.name}: {keep.mean():.0%} kept a round, {ever:.0%} at least once, "
                 f"{np.all(keep, axis=0).mean():.0%} always")  # fmt: skip
    fig.colorbar(image, label="share kept")
    save_picture(fig, path)
    plt.close(fig)


def likely_errors(folder, count=20):
    """Markdown: the train examples on which a run's scores are highest in the last round, in words, with their labels,
    which may be wrong."""
    args, rounds = read_config(folder)["args"], read_round_files(folder)
    if args["method"] == "random":
        raise RunError(f"{folder}: its scores are random, and say nothing about labels")
    epoch, scored = max(rounds.items())
    examples = read(args["dataset"], args.get("data_dir"))["train"]
    examples = examples.take(range(min(args.get("max_train") or len(examples), len(examples))))
    if len(examples) != len(scored["scores"]):
        raise RunError(f"{folder}: has scores of {len(scored['scores'])} examples, and {args['dataset']} has "
                       f"{len(examples)}: the data has changed")
    lines = [f"The {count} highest scores of {folder.name} before epoch {epoch}; examples of train count from 0.", "",
             "| example | score | label | text, with its slots |", "| --- | --- | --- | --- |"]  # fmt: skip
    for i in np.argsort(-scored["scores"], kind="stable")[:count]:
        text, tags = examples.texts[i], examples.tags and examples.tags[i]
        if tags:
            text = " ".join(word if tag == "O" else f"[{word}: {tag}]" for word, tag in zip(text, tags))
        text = " / ".join(text) if isinstance(text, tuple) else text
        lines.append(f"| {i} | {scored['scores'][i]:.2f} | {examples.labels[i]} | {text.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help="a results.jsonl, or the folder of a run")
    parser.add_argument("--to", metavar="DIR", help="write pages (.md) and pictures (.svg, .png) there, too")
    parser.add_argument("--errors", type=int, default=20, metavar="N", help="examples shown of a run's folder (20)")
    args = parser.parse_args(argv)
    folders = [Path(path) for path in args.paths if Path(path).is_dir()]
    files = [path for path in args.paths if not Path(path).is_dir()]
    to, can_draw = Path(args.to) if args.to else None, importlib.util.find_spec("matplotlib") is not None
    try:
        if to and len(folders) > 1:
            raise RunError("--to takes the folder of one run at a time")
        if to:
            to.mkdir(parents=True, exist_ok=True)
        if files:
            rows = read_rows(files)
            if not rows:
                raise RunError(f"no rows in {', '.join(files)}; train.py adds one a run")
            print("\n\n".join(filter(None, (table(rows), targets(rows)))))
            if to and can_draw:
                figure(rows, to / "figure")
            if to:
                command = f"python report.py {' '.join(files)} --to {args.to}"
                (to / "results.md").write_text(page(rows, command, can_draw), encoding="utf-8")
        for folder in folders:
            print(errors := likely_errors(folder, args.errors))
            if to and can_draw:
                kept_picture(folder, to / "kept")
            if to:
                (to / "likely_errors.md").write_text(f"# Likely label errors\n\n{errors}\n", encoding="utf-8")
    except (OSError, RunError, DataError) as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    if to:
        note = "" if can_draw else "; without pictures, which need matplotlib: pip install -r requirements-dev.txt"
        print(f"\nwritten to {to}/{note}")
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show ±
    sys.exit(main())
