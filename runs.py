"""One run: its folder, its clock, its checkpoint, its log, and the summary at its end.

A run's folder is named after its settings, so the same command finds it again. `result.json` in it means: finished.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

import filelock
import numpy as np
import torch
import transformers
from tqdm import tqdm

from data import demo
from distributed import all_reduce_sum, broadcast, rank
from errors import UserError, expect

NOT_SETTINGS = {"seed", "out", "data_dir", "no_model", "save_every", "resume"}  # not in a folder's hash


class Clock:
    """Seconds by phase: `with clock("train"): …`. It waits for the device, so work counts in its own phase."""

    def __init__(self, device):
        self.device, self.seconds = torch.device(device), Counter()

    def now(self):
        """Return the time in seconds, once the device has done its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.seconds[phase] += self.now() - start


class Run:
    """One run in its folder, which stays locked. UserError where the folder has a run already, without `--resume`.

    log: a dict for each epoch that has ended. steps: training steps so far. finished: whether nothing is left to do.
    """

    def __init__(self, args, clock):
        self.args, self.clock, self.log, self.steps = args, clock, [], 0
        settings = {name: value for name, value in vars(args).items() if value and name not in NOT_SETTINGS}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        method = f"{args.method}-{args.keep:g}" if args.keep else args.method
        name = f"{Path(args.dataset).name[:40]}-{method}-seed{args.seed}-{digest}"
        self.folder = Path(args.out) / name
        self.checkpoint, self.result = self.folder / "checkpoint.pt", self.folder / "result.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            self.lock.acquire()
        except filelock.Timeout:
            raise UserError(f"{self.folder}: another process works on this run; wait for its end") from None
        except OSError as error:
            raise UserError(f"--out {args.out}: {error.strerror}; name a folder that can be written") from None
        self.finished = broadcast(self.result.exists())
        has_model = args.no_model or (self.folder / "model").exists()
        expect(has_model or not self.finished, self.folder, "finished without saving its model; remove this folder to "
               "train again")
        state = "a finished run" if self.finished else "an unfinished run (--resume goes on with it)"
        expect(args.resume or not (self.finished or self.checkpoint.exists()), self.folder, f"holds {state} of this "
               "command; remove the folder to start again")
        if self.finished:
            self.checkpoint.unlink(missing_ok=True)  # the run was killed just before it would have done so

    def begin(self, data, weights, epochs):
        """Write config.json and return the state that a checkpoint holds, or None. UserError for a wrong checkpoint.

        weights: before training, (W,) fp32. epochs: the total number.
        """
        self.data, self.epochs, self.environment = data, epochs, environment(self.args.device)
        self.digest = hashlib.sha256(data.digest.encode() + weights.cpu().numpy().tobytes()).hexdigest()
        state = broadcast(self.load_checkpoint() if self.checkpoint.exists() else None)
        sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
        print(f"{self.args.dataset}: {sizes} samples, {len(data.labels)} labels, {len(data.tags)} tags; "
              f"{self.args.precision} on {self.args.device}; writes to {self.folder}/", flush=True)
        if state:
            self.log, self.steps = state["log"], state["steps"]
            self.clock.seconds.update(state["seconds"])  # a Counter adds
            print(f"resumes after epoch {len(self.log)} of {epochs}", flush=True)
            changed = [name for name, value in self.environment.items() if value != state["environment"].get(name)]
            if changed and rank() == 0:
                print(f"warning: the environment has changed ({', '.join(changed)}); the result may differ from an "
                      "uninterrupted run", file=sys.stderr)
        elif self.args.resume:
            print("nothing to resume: the run starts from the beginning", flush=True)
        with written(self.folder / "config.json") as part:
            facts = {"args": vars(self.args), "environment": self.environment, "data": data.digest}
            part.write_text(json.dumps(facts, indent=1))
        self.before = self.clock.seconds.copy()
        return state

    def load_checkpoint(self):
        """Return the state that `end_epoch` saved. UserError where the file is damaged or belongs to other data."""
        try:
            with zipfile.ZipFile(self.checkpoint) as archive:  # torch.save writes a zip, but torch.load checks no sums
                damaged = archive.testzip()
            state = torch.load(self.checkpoint, map_location="cpu", weights_only=True)
            same = state["digest"] == self.digest and not damaged
        except Exception:  # whatever foreign bytes raise
            same = False
        expect(same, self.checkpoint, "damaged, or made with other data or model; remove it to start again")
        return state

    def progress(self, batch_list, kept):
        """Yield the index arrays of an epoch's batches, with a bar over samples if standard error is a terminal."""
        self.loss = torch.zeros((), device=self.args.device)
        title = f"epoch {len(self.log) + 1}/{self.epochs}, {len(kept)} of {len(self.data.train)}"
        hidden = True if rank() else None  # None: where standard error is no terminal
        with tqdm(total=len(kept), unit=" samples", desc=title, leave=False, disable=hidden) as bar:
            for indices in batch_list:
                yield indices
                self.steps += 1
                if bar.update(len(indices)) or self.args.device == "cpu":  # elsewhere, reading the loss waits
                    self.check_finite(self.loss)

    def check_finite(self, value):
        """Raise UserError where a number, (), is not finite."""
        if not value.isfinite():  # asked first, as a message with its value would wait for a GPU
            raise UserError(f"the loss is {value.item()} by step {self.steps} (epoch {len(self.log) + 1}); start again "
                            "with a lower --lr, or with --precision fp32")

    def save_selection(self, scores, importance, kept):
        """Write rounds/epoch-<e>.npz before epoch e (from 1): `scores`, `importance` (the smoothed scores) and the mask
        `keep`, each (N,) in dataset order."""
        (self.folder / "rounds").mkdir(exist_ok=True)
        keep = np.isin(np.arange(len(scores)), kept)
        with written(self.folder / "rounds" / f"epoch-{len(self.log) + 1:03}.npz") as part:
            np.savez_compressed(part, scores=scores, importance=importance, keep=keep)

    def end_epoch(self, kept, dev, state):
        """Check that the weights are finite, log the epoch, and save a checkpoint every --save-every epochs.

        kept: indices trained on; dev: metrics; state: what the next epoch depends on, as nested dicts of tensors.
        """
        self.check_finite(all_reduce_sum(self.loss) + 0 * state["optimizer"]["master"].sum())
        seconds = {phase: round(s, 4) for phase, s in (self.clock.seconds - self.before).items() if phase != "load"}
        line = {"epoch": len(self.log) + 1, "kept": len(kept), "tokens": int(self.data.train.lengths[kept].sum()),
                "loss": self.loss.item() / len(kept), "dev": dev, "seconds": seconds}  # fmt: skip
        self.log, self.before = [*self.log, line], self.clock.seconds.copy()
        with written(self.folder / "epochs.jsonl") as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in self.log))
        phases = "  ".join(f"{phase} {s:.1f} s" for phase, s in line["seconds"].items())
        print(f"epoch {line['epoch']:>2}/{self.epochs}  kept {len(kept)}/{len(self.data.train)}  "
              f"loss {line['loss']:.4f}  dev {metrics_line(dev)}  |  {phases}", flush=True)
        if rank() == 0 and (line["epoch"] % self.args.save_every == 0 or line["epoch"] == self.epochs):
            own = {"log": self.log, "steps": self.steps, "seconds": dict(self.before), "digest": self.digest,
                   "environment": self.environment}  # fmt: skip
            with self.clock("save"), written(self.checkpoint) as part:
                torch.save({**state, **own}, part)

    def finish(self, metrics, model):
        """Save the model, write result.json, and remove the checkpoint. Returns the row in result.json, a dict.

        metrics: {split: {name: percent}}, after the last epoch.
        """
        if not self.args.no_model:
            for old in ("model.part", "model"):  # a run was killed before it wrote result.json
                shutil.rmtree(self.folder / old, ignore_errors=True)
            model.save(self.folder / "model.part")
            os.replace(self.folder / "model.part", self.folder / "model")
        row = self.row(metrics)
        with written(self.result) as part:
            part.write_text(json.dumps(row) + "\n")
        self.checkpoint.unlink(missing_ok=True)
        return row

    def row(self, metrics):
        """Return a run's settings, environment, cost and metrics: one line of a results file."""
        log, n, seconds = self.log, len(self.data.train), self.clock.seconds
        flags = {name: value for name, value in vars(self.args).items()
                 if name not in NOT_SETTINGS - {"seed"} and value is not None}  # fmt: skip
        if os.path.isabs(self.args.model):  # a folder of the user's; rows carry no paths
            own = Path(self.args.model)
            flags["model"] = (own.parent if own.name == "model" else own).name  # a run's model has the run's name
        if os.path.isabs(self.args.dataset):
            flags["dataset"] = f"{Path(self.args.dataset).name}-{self.data.digest[:6]}"
        total = sum(seconds[phase] for phase in ("train", "score", "select"))
        return {
            "run": self.folder.name, "args": flags, "environment": self.environment,
            "samples": {name: len(split) for name, split in self.data.splits.items()}, "steps": self.steps,
            "seconds": {phase: round(s, 3) for phase, s in {**seconds, "total": total}.items()},
            "selections": sum("select" in line["seconds"] for line in log),
            "samples_seen": sum(line["kept"] for line in log), "samples_full": n * self.args.epochs,
            "tokens_seen": sum(line["tokens"] for line in log),
            "tokens_full": int(self.data.train.lengths.sum()) * self.args.epochs, **metrics,
            "epoch_dev": [line["dev"] for line in log], "epoch_kept": [line["kept"] for line in log],
            "epoch_seconds": [line["seconds"]["train"] for line in log],
        }  # fmt: skip


@contextmanager
def written(path):
    """Yield a temporary path. What is written to it becomes `path` once it is complete; else `path` stays as it was."""
    part = path.with_name(f"part-{path.name}")
    try:
        yield part
        with open(part, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{path}: {reason}; make room on the disk, or make its folder writable") from None
    finally:
        part.unlink(missing_ok=True)


def environment(device):
    """Return what a reader needs to judge a timing: code version, package versions and machine, as plain values."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        git = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True).stdout.strip()
    except OSError:
        git = None  # there is no git on this machine
    on_gpu = torch.device(device).type == "cuda"
    return {
        "git": git or None, "python": platform.python_version(), "torch": str(torch.__version__),
        "transformers": transformers.__version__, "numpy": np.__version__,
        "device": torch.cuda.get_device_name(device) if on_gpu else torch.device(device).type,
        "cpu": processor(), "threads": torch.get_num_threads(), "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }  # fmt: skip


def processor():
    """Return the processor's name with family, model and stepping: a name alone does not tell two machines apart."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return "{model name}, family {cpu family}, model {model}, stepping {stepping}".format(**facts)
    except (OSError, KeyError):
        return platform.processor() or platform.machine()


def metrics_line(metrics):
    """Return metrics in percent, as text."""
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def summary(row, run):
    """Return what a person wants to know when a run ends, as text. row: of `Run.finish`."""
    args, seconds, folder = run.args, {"score": 0, "select": 0, "save": 0, **row["seconds"]}, run.folder
    keep = f", keep {args.keep:g}" if args.keep else ""
    splits = "" if "test" in row else "; dev is a tenth of train" if args.tune else "; there is no test split"
    lines = [f"{row['args']['dataset']}, {args.method}{keep}, seed {args.seed}, {args.precision}; "
             f"metrics after the last epoch{splits}"]  # fmt: skip
    lines += [f"{split:<6} {metrics_line(row[split])}" for split in ("test", "dev", "dev_mismatched") if split in row]
    lines += [
        "time   {total:.1f} s = train {train:.1f} + score {score:.1f} + select {select:.2f}".format(**seconds),
        "       not counted: load {load:.1f}, evaluate {evaluate:.1f}, checkpoints {save:.1f}".format(**seconds),
        f"seen   {row['samples_seen'] / row['samples_full']:.1%} of the samples, "
        f"{row['tokens_seen'] / row['tokens_full']:.1%} of the tokens, in {row['steps']:,} steps",
    ]
    if row["selections"]:
        full = seconds["train"] * row["tokens_full"] / row["tokens_seen"]
        same = max(1, round(args.epochs * seconds["total"] / full))
        lines.append(f"saved  {1 - seconds['total'] / full:.1%} of {full:.1f} s, the estimate for full data; "
                     f"--method full --epochs {same} takes about as long: compare it")
    if row["selections"] and args.dataset == "demo" and args.method != "random" and not (args.max_train or args.tune):
        found, planted = demo.errors_found(np.load(max((folder / "rounds").glob("epoch-*.npz")))["scores"])
        lines.append(f"found  {found} of {planted} planted label errors among the {planted} highest scores")
    metric = next(name for name in ("frame_acc", *row["dev"]) if name in row["dev"])
    before, end = row["epoch_dev"][args.full_epochs - 1][metric], row["epoch_dev"][-1][metric]  # equal where τ = 0
    if row["selections"] and args.selection != "static" and end < before:
        lines.append(f"lost   dev {metric} was {before:.2f} before pruning and is {end:.2f} now; keep more, or "
                     "train on full data")
    files = "result, log, scores and masks" if row["selections"] else "result and log"
    lines.append(f"left   {folder}/ with {files}; python report.py {quote(args.out)} compares runs")
    if row["selections"] and args.method != "random":
        lines.append(f"look   python report.py {quote(str(folder))} shows likely label errors")
    if not args.no_model:
        text = ("…", "…") if run.data.pairs else "…"
        path = str(folder / "model")
        lines.append(f"next   from models import NLUModel; NLUModel.load({path!r}).predict([{text!r}])")
    return "\n".join(lines)
