"""What runs leave and what they show: times, log lines, scores, the machine, the closing summary, the table over many.

    python report.py runs/results.jsonl
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import transformers
from tqdm import tqdm

from data import demo, rank

CHECKOUT = Path(__file__).resolve().parent


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

    def lap(self):
        """Seconds by phase since the last lap, without the phases that had none."""
        lap = {phase: round(s - self.laps.get(phase, 0.0), 4) for phase, s in self.seconds.items()}
        self.laps = dict(self.seconds)
        return {phase: s for phase, s in lap.items() if s > 0}


def progress(epoch, epochs, kept, n):
    """A bar that counts examples; none where standard error is no terminal."""
    return tqdm(total=kept, unit="ex", desc=f"epoch {epoch + 1}/{epochs}, {kept} of {n}", leave=False,
                disable=True if rank() else None)


def new_folder(args):
    """A new folder for this run under --out, with its config.json. Returns the folder and what is in that file; OSError
    where one cannot be made or results.jsonl not written."""
    out = Path(args.out)
    dataset = Path(args.dataset).resolve().name  # the last part of a folder of the user's
    name = f"{dataset}-{args.method}-{args.keep:g}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        out.mkdir(parents=True, exist_ok=True)
        open(out / "results.jsonl", "a").close()
        for suffix in ["", *(f"-{i}" for i in range(2, 100))]:  # runs of the same second
            with suppress(FileExistsError):
                folder = out / (name + suffix)
                folder.mkdir()
                facts = {"folder": str(folder), "args": vars(args), "environment": environment(args.device)}
                (folder / "config.json").write_text(json.dumps(facts, indent=1))
                return folder, facts
    except OSError as error:
        raise OSError(f"--out {out}: {error.strerror} ({error.filename}); name a folder that can be written") from None
    raise OSError(f"--out {out}: too many runs named {name}")


def append_line(path, fields):
    """One line of JSON, in one unbuffered write, so that lines of runs that end together do not mix."""
    line = json.dumps(fields).encode() + b"\n"
    with open(path, "ab", buffering=0) as file:
        if file.write(line) != len(line):
            raise OSError(f"{path}: the line could not be written whole; is the disk full?")


def opening(args, data, folder):
    """Say what is about to be done."""
    sizes = ", ".join(f"{len(split)} {name}" for name, split in data.splits.items())
    print(f"{args.dataset}: {sizes} examples, {data.n_labels} labels, {data.n_tags} tags; {args.precision} on "
          f"{args.device}; to {folder}/", flush=True)


def log_epoch(folder, line, epochs, n):
    """One line to epochs.jsonl, and one to the screen."""
    append_line(folder / "epochs.jsonl", line)
    seconds = "  ".join(f"{phase} {s:.1f} s" for phase, s in line["seconds"].items())
    print(f"epoch {line['epoch']:>2}/{epochs}  kept {line['kept']}/{n}  loss {line['loss']:.4f}  "
          f"dev {metrics_line(line['dev'])}  |  {seconds}", flush=True)


def save_round(folder, epoch, scores, importance, kept):
    """rounds/epoch-<e>.npz: what was scored and kept before epoch e (from 1), each (N,) in dataset order: scores,
    importance (the smoothed scores, float64) and keep (bool)."""
    (folder / "rounds").mkdir(exist_ok=True)
    mask = np.zeros(len(scores), dtype=bool)
    mask[kept] = True
    path = folder / "rounds" / f"epoch-{epoch:03}.npz"
    with open(path.with_suffix(".part"), "wb") as file:
        np.savez_compressed(file, scores=scores, importance=importance, keep=mask)
    os.replace(path.with_suffix(".part"), path)


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
    n, epochs = len(data.train), schedule.epochs
    seconds = dict(clock.seconds, total=sum(clock.seconds.get(phase, 0.0) for phase in ("train", "score", "select")))
    full_epoch = float(np.median([line["seconds"]["train"] for line in log if line["kept"] == n]))
    scoring_cost = seconds.get("score", 0.0) / max(schedule.rounds, 1) / full_epoch
    return {
        "rows": {name: len(split) for name, split in data.splits.items()},
        "seconds": {phase: round(s, 3) for phase, s in seconds.items()},
        "steps": log[-1]["step"], "pruned_epochs": sum(line["kept"] < n for line in log),
        "examples_seen": sum(line["kept"] for line in log), "examples_full": n * epochs,
        "tokens_seen": sum(line["tokens"] for line in log), "tokens_full": int(data.train.lengths.sum()) * epochs,
        "scoring_rounds": schedule.rounds, "scoring_cost": round(scoring_cost, 4),
        "full_seconds": round(full_epoch * epochs, 3),  # estimated from the epochs that were full
        "model_time": round(schedule.relative_time(scoring_cost), 4),
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
    args, seconds, folder = row["args"], row["seconds"], Path(row["folder"])
    evaluated = [split for split in ("test", "dev", "dev_mismatched") if split in row]
    when = "(after the last epoch)" if "test" in row else "(after the last epoch; there is no test split)"
    lines = [
        f"{args['dataset']}, {args['method']}, {args['keep']:.0%} kept, seed {args['seed']}, "
        f"{args['precision']} on {machine(row)}",
        *(f"{split:<6} {metrics_line(row[split])}   {when if split == evaluated[0] else ''}".rstrip()
          for split in evaluated),
        f"time   {seconds['total']:.1f} s = train {seconds['train']:.1f} + score {seconds.get('score', 0):.1f} + "
        f"select {seconds.get('select', 0):.2f};  outside it: load {seconds['load']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}",
        f"seen   {row['examples_seen']:,} of {row['examples_full']:,} examples "
        f"({row['examples_seen'] / row['examples_full']:.1%}), {row['tokens_seen'] / row['tokens_full']:.1%} of the "
        f"tokens, in {row['steps']:,} steps",
    ]
    if row["pruned_epochs"]:
        lines += [
            f"saved  {1 - seconds['total'] / row['full_seconds']:.1%} of an estimated {row['full_seconds']:.1f} s for "
            f"{args['epochs']} epochs on everything, at the pace of this run's {args['full_epochs']} full ones;",
            f"       the cost model says {1 - row['model_time']:.1%}, with {row['scoring_rounds']} scoring passes of "
            f"{row['scoring_cost']:.2f} epochs each. The same command with --method full measures it.",
        ]
    if args["dataset"] == "demo" and row["scoring_rounds"] and args["method"] != "random":
        first = min((folder / "rounds").iterdir())
        with np.load(first) as scored:
            found, planted = demo.errors_found(scored["scores"])
        lines.append(f"found  {found} of the {planted} wrong annotations planted in demo, among the {planted} highest "
                     f"scores of the first round ({first.name})")
    lines.append(f"left   {folder}/ with the log, scores and keep-masks; a row in {folder.parent / 'results.jsonl'}")
    if not args["no_model"]:
        example = f'from models import NLUModel; print(NLUModel.load("{folder}/model").predict(["…"]))'
        here = "" if Path.cwd() == CHECKOUT else f"PYTHONPATH={CHECKOUT} "
        lines.append(f"next   {here}python -c '{example}'")
    return "\n".join(lines)


def read_rows(paths):
    """Rows of result files, in order. A line that is no row (a run was killed while writing) is skipped and said."""
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                row = json.loads(line)
                table([row])  # fails where something is missing
                rows.append(row)
            except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
                print(f"warning: {path}:{number}: not a whole row; skipped", file=sys.stderr)
    return rows


# Runs that differ in nothing but these flags are repetitions of one another.
NOT_SETTINGS = {"seed", "out", "no_model", "data_dir"}
# A run on everything is the same whatever these are.
PRUNING = {"method", "keep", "full_epochs", "cycle", "ema", "std_weight", "offset"}


def settings(row):
    """The flags that matter to a run, as a dict; of one on everything, without those of pruning."""
    ignored = NOT_SETTINGS | PRUNING if row["args"]["method"] == "full" else NOT_SETTINGS
    return {flag: value for flag, value in row["args"].items() if flag not in ignored}


def platform_of(row):
    """What two timings must share to be compared."""
    environment = row["environment"]
    return (machine(row), *(environment[name] for name in ("threads", "torch", "transformers")),
            environment.get("processes", 1))


def baseline(row):
    """A key that a run shares with the full-data runs it may be compared with."""
    flags = {flag: value for flag, value in settings(row).items() if flag not in PRUNING}
    return platform_of(row), json.dumps(flags, sort_keys=True), row["args"]["seed"]


def mean_and_deviation(values, digits=2):
    """As text; without a deviation where there is one value."""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows):
    """Markdown: test metrics, mean ± deviation over seeds (of a seed that was run twice, the last), and the time saved
    against the full-data run with the same seed and otherwise the same flags, on the same machine and versions.
    Flags in which the rows differ are named beside the method."""
    groups, full, values = {}, {}, {}
    for row in rows:
        key = platform_of(row), row["args"]["method"], json.dumps(settings(row), sort_keys=True)
        groups.setdefault(key, {})[row["args"]["seed"]] = row
        if row["args"]["method"] == "full":
            full[baseline(row)] = row
        for flag, value in settings(row).items():
            values.setdefault(flag, set()).add(value)
    differing = [flag for flag in values if len(values[flag]) > 1 and flag not in ("dataset", "method", "keep")]

    head = ("dataset", "method", "kept", "n", "metrics, %", "against full", "seconds", "time saved, %")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for group in groups.values():
        first = next(iter(group.values()))
        metrics = {name: [reported(row)[name] for row in group.values()] for name in reported(first)}
        main = "frame_acc" if "frame_acc" in metrics else next(iter(metrics))
        pairs = [(row, full[baseline(row)]) for row in group.values() if baseline(row) in full]
        compared = first["args"]["method"] != "full" and len(pairs) == len(group)
        gains = [reported(row)[main] - reported(base)[main] for row, base in pairs]
        saved = [100 * (1 - row["seconds"]["total"] / base["seconds"]["total"]) for row, base in pairs]
        flags = settings(first)
        lines.append("| " + " | ".join([
            first["args"]["dataset"],
            ", ".join([first["args"]["method"], *(f"{flag} {flags[flag]}" for flag in differing if flag in flags)]),
            f"{100 * first['args']['keep']:g} %", str(len(group)),
            ", ".join(f"{name} {mean_and_deviation(column)}" for name, column in metrics.items()),
            f"{main} {mean_and_deviation(gains)}" if compared else "–",
            mean_and_deviation([row["seconds"]["total"] for row in group.values()], 0),
            mean_and_deviation(saved, 1) if compared else "–",
        ]) + " |")  # fmt: skip
    text = "{}, {} threads, torch {}, transformers {}, {} process(es)"
    machines = sorted({text.format(*platform_of(row)).replace(", 1 process(es)", "") for row in rows})
    on_dev = sorted({row["args"]["dataset"] for row in rows if "test" not in row})
    note = (f"On test{' (on dev: ' + ', '.join(on_dev) + ')' if on_dev else ''} after the last epoch: mean ± standard "
            f"deviation over n seeds. Machine: {'; '.join(machines)}.")
    return "\n".join([*lines, "", note])


def main(argv=None):
    parser = argparse.ArgumentParser(description="Print the table of one or more results.jsonl files.")
    parser.add_argument("files", nargs="+", help="results.jsonl files")
    try:
        rows = read_rows(parser.parse_args(argv).files)
    except OSError as error:
        print(f"report.py: error: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show ±
    sys.exit(main())
