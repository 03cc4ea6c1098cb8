"""What runs were and what they showed: the machine, the summary that ends a run, and the table over many.

    python report.py results/*.jsonl > results/table.md
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import transformers

from data import demo


def environment(device):
    """What a reader needs to judge a timing: code version, package versions, machine. A dict of plain values."""

    def git(*command):
        try:
            result = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        except OSError:
            return None  # no git on this machine
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        info = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.partition(":")[2].strip() for line in info if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    on_gpu = torch.device(device).type == "cuda"
    return {
        "git": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "numpy": np.__version__, "device": torch.cuda.get_device_name(device) if on_gpu else device,
        "cpu": processor, "threads": torch.get_num_threads(),
    }  # fmt: skip


def metrics_line(metrics):
    """Metrics in percent, as text."""
    return "  ".join(f"{name} {value:.2f}" for name, value in metrics.items())


def machine(row):
    """Name of the processor that did the work."""
    return row["environment"]["cpu" if row["environment"]["device"] == "cpu" else "device"]


def summary(row):
    """What a person wants to know when a run ends. row: a row of results.jsonl. Returns lines of text."""
    args, seconds, folder = row["args"], row["seconds"], Path(row["folder"])
    lines = [
        f"{args['dataset']}, {args['method']}, {args['keep']:.0%} kept, seed {args['seed']}, "
        f"{args['precision']} on {machine(row)}",
        f"test   {metrics_line(row['test'])}   (after the last epoch)",
        f"dev    {metrics_line(row['dev'])}",
        f"time   {seconds['total']:.1f} s = train {seconds['train']:.1f} + score {seconds.get('score', 0):.1f} + "
        f"select {seconds.get('select', 0):.2f};  outside it: load {seconds['load']:.1f}, "
        f"evaluate {seconds['evaluate']:.1f}, save {seconds['save']:.1f}",
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
    if args["dataset"] == "demo" and row["scoring_rounds"]:
        lines.append("found  " + planted_errors_found(folder / "rounds.npz"))
    lines.append(f"left   {folder}/ with the log, scores and keep-masks; a row in {folder.parent / 'results.jsonl'}")
    if not args["no_model"]:
        example = f'from models import NLUModel; print(NLUModel.load("{folder}/model").predict(["…"]))'
        lines.append(f"next   python -c '{example}'")
    return "\n".join(lines)


def planted_errors_found(path):
    """How many of the demo's planted label errors the first round's scores put on top, as text. path: rounds.npz."""
    with np.load(path) as rounds:
        scores, epoch = rounds["scores"][0], rounds["epoch"][0]
    planted = demo.planted_errors()
    planted = planted[planted < len(scores)]  # --max-train leaves some out
    top = np.argsort(-scores, kind="stable")[: len(planted)]
    return (f"{np.isin(planted, top).sum()} of the {len(planted)} wrong labels planted in demo, among the "
            f"{len(planted)} highest scores before epoch {epoch}")


def read_rows(paths):
    """Rows of result files, in order. A line that is no row (a run was killed while writing) is skipped and said."""
    rows = []
    for path in paths:
        for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError:
                print(f"warning: {path}:{number}: not a whole row; skipped", file=sys.stderr)
    return rows


# Runs that differ in nothing but these are repetitions of one another.
NOT_SETTINGS = ("seed", "out", "no_model", "data_dir", "device")


def settings(row, *leave_out):
    return json.dumps({k: v for k, v in row["args"].items() if k not in (*NOT_SETTINGS, *leave_out)}, sort_keys=True)


def mean_and_deviation(values, digits=2):
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def table(rows):
    """Markdown: test metrics, mean ± deviation over seeds, and the time saved against the full-data run with the same
    seed and otherwise the same settings."""
    groups, full = defaultdict(list), {}
    for row in rows:
        groups[settings(row)].append(row)
        if row["args"]["method"] == "full":
            full[settings(row, "method", "keep"), row["args"]["seed"]] = row
    head = ("dataset", "method", "kept", "n", "test metrics, %", "against full", "seconds", "time saved, %")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for group in sorted(groups.values(), key=lambda g: (g[0]["args"]["dataset"], g[0]["args"]["method"] != "full")):
        args = group[0]["args"]
        pairs = [(row, full.get((settings(row, "method", "keep"), row["args"]["seed"]))) for row in group]
        pairs = [pair for pair in pairs if pair[1] and args["method"] != "full"]
        metrics = {name: [row["test"][name] for row in group] for name in group[0]["test"]}
        main = "frame_acc" if "frame_acc" in metrics else next(iter(metrics))
        gains = [a["test"][main] - b["test"][main] for a, b in pairs]
        saved = [100 * (1 - a["seconds"]["total"] / b["seconds"]["total"]) for a, b in pairs]
        lines.append("| " + " | ".join([
            args["dataset"], args["method"], f"{args['keep']:.0%}", str(len(group)),
            ", ".join(f"{name} {mean_and_deviation(values)}" for name, values in metrics.items()),
            f"{main} {statistics.mean(gains):+.2f}" if gains else "–",
            mean_and_deviation([row["seconds"]["total"] for row in group], 0),
            mean_and_deviation(saved, 1) if saved else "–",
        ]) + " |")  # fmt: skip
    machines = sorted({f"{machine(row)}, {row['environment']['threads']} threads, torch {row['environment']['torch']}, "
                       f"transformers {row['environment']['transformers']}" for row in rows})
    note = "On test after the last epoch: mean ± standard deviation over n seeds. Machine: " + "; ".join(machines) + "."
    return "\n".join([*lines, "", note])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Print the table of one or more results.jsonl files.")
    parser.add_argument("files", nargs="+", help="results.jsonl files")
    print(table(read_rows(parser.parse_args().files)))
