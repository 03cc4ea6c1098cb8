"""Compare runs: read their rows, gather them into arms, and set each arm against full data in the same time.

A run's cost is its time in its own full epochs, because machines differ in speed. A full epoch takes as long as all its
tokens take at the run's mean training speed. So a pause in a few epochs does not spoil the unit. An arm is the runs
that differ in the seed alone. All differences are paired by seed.
"""

import json
import sys
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

import numpy as np

TASK = ("dataset", "model", "max_length", "max_train", "tune")  # runs are compared only where these are equal
NOT_SETTINGS = {"seed", "device", "precision"}  # runs of one arm may differ in these
NAMED = {*TASK, "method", "selection", "sample", "stratify", "keep", "epochs", "lr"}  # have a column
METHODS = {"full": "full data", "infobatch": "InfoBatch", "el2n": "EL2N", "grand": "GraNd"}
METRICS = {"frame_acc": "frame accuracy", "accuracy": "accuracy", "matthews": "Matthews correlation"}
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)  # Student's t for 95 %, degrees 1 to 9


# ---- rows: one a finished run


def clean(text):
    """Return text on one line, without control characters."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def read_rows(paths):
    """Read the rows of .jsonl files and of folders of runs. Skip what is damaged, with a warning."""
    rows = []
    for path in map(Path, paths):
        for file in sorted(path.rglob("result.json")) if path.is_dir() else [path]:
            try:
                lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
            except OSError as error:
                print(f"warning: {file}: {error.strerror}; skipped", file=sys.stderr)
                continue
            damaged = []
            for number, line in enumerate(lines, 1):
                try:
                    rows += [completed(json.loads(line))] if line.strip() else []
                except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
                    damaged.append((number, error))
            if damaged:
                (number, error), more = damaged[0], f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
                print(f"warning: {file}:{number}: damaged row, skipped ({clean(error)}){more}", file=sys.stderr)
    return rows


def completed(row):
    """Return a row with values derived from it. Raise an error where something is missing or makes no sense.

    metrics: on test, or on dev where there is no test split; the methods are compared by `metric`. cost: of training,
    scoring and selection, in own full epochs.
    """
    args, split, facts = row["args"], "test" if "test" in row else "dev", row["environment"]
    metrics = {**row[split], **{f"{name} (mismatched)": value for name, value in row.get("dev_mismatched", {}).items()}}
    metric = "frame_acc" if "frame_acc" in metrics else next(iter(metrics), None)
    tokens, seconds = args["epochs"] * row["tokens_seen"] / row["tokens_full"], row["seconds"]
    cost = tokens * seconds["total"] / seconds["train"]
    if not all(-100 <= value <= 100 for value in [row["dev"][metric], *metrics.values()]):
        raise ValueError("a metric is not in percent")
    if not all(0 < value < 1e9 for value in (cost, tokens, args["epochs"], args["lr"], args.get("keep") or 1)):
        raise ValueError("epochs, lr, keep, tokens and seconds must be above 0")
    if {type(args[flag]) for flag in ("dataset", "model", "method")} != {str} or type(args["seed"]) is not int:
        raise TypeError("dataset, model and method must be text, and seed a whole number")
    hardware = facts.get("cpu" if facts.get("device") == "cpu" else "device")
    machine = f"{hardware}, threads {facts.get('threads')}, processes {facts.get('processes')}, {args.get('precision')}"
    return {**row, "metrics": metrics, "metric": metric, "split": split, "machine": machine, "cost": cost}


# ---- arms and tasks


def method_name(args):
    """Return a method and how it selects, in words."""
    words = ["static"] if args.get("selection") == "static" else []
    if args["method"] == "random" and args.get("cycle") == 1 and not words:
        return "random each epoch"
    known = {"stratify": "stratified", "sample": "sampled"}
    on = [flag for flag, value in args.items() if value is True and flag not in TASK]
    words += [known.get(flag, flag.replace("_", "-")) for flag in on]
    if not words and args["method"] not in ("full", "random", "infobatch"):
        words = ["highest"]
    return " ".join([*words, METHODS.get(args["method"], args["method"])])


def settings(args):
    """Return the flags that make an arm, as {flag: JSON}. A flag that is off is left out."""
    unused = NOT_SETTINGS | ({"full_epochs", "cycle"} if args["method"] == "full" else set())
    return {flag: json.dumps(value) for flag, value in args.items() if value and flag not in unused}


class Arm:
    """Rows that differ in the seed alone. Of two rows with one seed, the last counts, with a warning.

    cost: in own full epochs, the mean over seeds.
    """

    def __init__(self, rows):
        self.rows = {row["args"]["seed"]: row for row in rows}
        self.args = args = rows[0]["args"]
        self.name, self.epochs, self.settings = method_name(args), args["epochs"], settings(args)
        self.accuracy = {seed: row["metrics"][row["metric"]] for seed, row in self.rows.items()}
        self.dev = {seed: row["dev"][row["metric"]] for seed, row in self.rows.items()}
        self.mean, self.deviation = mean(self.accuracy.values()), deviation(self.accuracy.values())
        self.cost = mean(row["cost"] for row in self.rows.values())
        self.full, soft = args["method"] == "full", args["method"] == "infobatch"
        keep = round(args.get("keep") or 1, 6)  # as it is shown
        self.keep = "all" if self.full else f"r {1 - keep:g}" if soft else f"{keep:g}"
        self.order = not self.full, soft, -keep, args["method"] != "random", self.name, -self.epochs, args["lr"]
        if len(rows) > len(self.rows):
            what = clean(f"{args['dataset']}, {self.name}, keep {self.keep}, {self.epochs} epochs")
            print(f"warning: {what}: {len(rows)} runs with {len(self.rows)} seeds; the last of a seed counts",
                  file=sys.stderr)  # fmt: skip


class Task:
    """The arms that may be compared with one another, and what full data reaches in the same time.

    differing: the flags in which Tasks differ. kind: the measure, with these flags; a mean over Tasks needs one kind.
    full: the arm on full data with the most epochs, or None. epochs: its number of epochs, else the highest of any arm.
    baselines: for each number of epochs on full data, the arm that is best on dev; the most epochs first. corners: of
    the equal-time curve, by `envelope`.
    """

    def __init__(self, rows, differing):
        args, by_arm = rows[0]["args"], {}
        further = [f"{flag.replace('_', '-')} {args[flag]}" for flag in differing if args.get(flag)]
        for row in rows:
            by_arm.setdefault(json.dumps(settings(row["args"]), sort_keys=True), []).append(row)
        self.arms = sorted(map(Arm, by_arm.values()), key=lambda arm: arm.order)
        self.metric, self.measure = rows[0]["metric"], METRICS.get(rows[0]["metric"], rows[0]["metric"])
        self.title, self.kind = (clean(", ".join([name, *further])) for name in (args["dataset"], self.measure))
        self.split = rows[0]["split"]
        full = sorted((arm for arm in self.arms if arm.full), key=lambda arm: -arm.epochs)  # names may differ
        self.baselines = [best_on_dev(list(arms)) for _, arms in groupby(full, key=lambda arm: arm.epochs)]
        self.full = self.baselines[0] if self.baselines else None
        self.epochs = self.full.epochs if self.full else max(arm.epochs for arm in self.arms)
        self.corners = envelope([(arm.cost, arm.mean, arm) for arm in self.baselines])

    def extras(self, arm):
        """Name the flags in which the arms of one method differ here, with their values for `arm`."""
        alike = [other.settings for other in self.arms if other.name == arm.name]
        flags = sorted({flag for other in alike for flag in other} - NAMED)
        differing = [flag for flag in flags if len({other.get(flag) for other in alike}) > 1]
        values = [arm.args[flag] if flag in arm.settings else "off" for flag in differing]
        return "".join(f", {flag.replace('_', '-')} {value}" for flag, value in zip(differing, values))

    def percent(self, cost):
        """Return a cost in percent of full data."""
        return 100 * cost / self.epochs

    def to_full(self, arm):
        """Return an arm's points above full data, one a seed."""
        if not self.full or arm is self.full:
            return []
        return [arm.accuracy[seed] - self.full.accuracy[seed] for seed in sorted(arm.rows) if seed in self.full.rows]

    def to_equal_time(self, arm):
        """Return an arm's points above full data in the same time. There is one for each seed that both have.

        There is none below the smallest cost on full data.
        """
        costs = [cost for cost, _, _ in self.corners]
        if arm.full or not costs or arm.cost < costs[0]:
            return []
        gains = []
        for seed in sorted(arm.rows):
            curve = [corner.accuracy.get(seed, np.nan) for _, _, corner in self.corners]
            gains.append(arm.accuracy[seed] - float(np.interp(arm.cost, costs, curve)))
        return [gain for gain in gains if np.isfinite(gain)]  # else a corner beside the cost lacks the seed


def tasks(rows):
    """Sort rows into Tasks, joint datasets first. Another metric or another split makes another Task."""
    by_task = {}
    for row in rows:
        key = [*(row["args"].get(flag) or None for flag in TASK), row["metric"], row["split"]]
        by_task.setdefault(json.dumps(key), []).append(row)
    differing = [flag for flag in TASK[1:] if len({json.dumps(row["args"].get(flag) or None) for row in rows}) > 1]
    found = [Task(same, differing) for same in by_task.values()]
    return sorted(found, key=lambda task: [*METRICS, task.metric].index(task.metric))


# ---- statistics


def best_on_dev(arms):
    """Return the arm that is best on dev, to 3 decimals, of those with the most seeds. Some committed rows have 4."""
    most = max(len(arm.rows) for arm in arms)
    return max((arm for arm in arms if len(arm.rows) == most), key=lambda arm: round(mean(arm.dev.values()), 3))


def best_rate(folder, seed, *rates):
    """Return which learning rate is best on dev, of the runs in a folder with this seed; None if one is missing.

    It is for run_all.sh: it exits with one line where a rate has several runs, which differ in other settings.
    """
    dev, wanted = {}, set(map(float, rates))
    for row in read_rows([folder]):
        if row["args"]["seed"] == int(seed) and row["args"]["lr"] in wanted:
            if row["args"]["lr"] in dev:
                sys.exit(f"run_all.sh: {folder}: several runs with lr {row['args']['lr']:g}; set another OUT")
            dev[row["args"]["lr"]] = row["dev"][row["metric"]]
    return max(dev, key=dev.get) if len(dev) == len(wanted) else None


def envelope(points):
    """Return the corners of the upper concave envelope of points (cost, accuracy, arm), by rising cost.

    A point that is worse than a cheaper one first takes the accuracy and the arm of the cheaper one.
    """
    corners = []
    for cost, accuracy, arm in sorted(points, key=lambda point: point[0]):
        if corners and accuracy < corners[-1][1]:
            accuracy, arm = corners[-1][1:]
        while len(corners) > 1:
            (x, y, _), (x1, y1, _) = corners[-2:]
            if (y1 - y) * (cost - x) > (accuracy - y) * (x1 - x):
                break
            corners.pop()  # it is not above the line from the corner before it to the new point
        corners.append((cost, accuracy, arm))
    return corners


def deviation(values):
    """Return the standard deviation; 0 of one value."""
    return stdev(values) if len(values) > 1 else 0.0


def half_width(values):
    """Return half the width of the 95 % interval of a mean of 2 or more values. From 11 on, it is a little too wide."""
    return T95[min(len(values), 10) - 2] * stdev(values) / len(values) ** 0.5
