"""Compare many runs, or look into one.

    python report.py runs                  compare the finished runs in a folder
    python report.py results/main.jsonl    compare the runs of a file, one line of JSON a run
    python report.py runs/demo-el2n-…      show the samples with the highest scores: their labels may be wrong

`--to DIR` also writes the report to DIR, as Markdown and pictures.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from statistics import mean, median
from textwrap import fill

import numpy as np

import figures
from compare import Task, best_on_dev, clean, deviation, half_width, read_rows, tasks
from errors import Parser, UserError, expect, leave

READING = """\
A line is one method with one setting, and n counts its seeds. The metric and the seconds are means ± standard
deviations over seeds. Time is training, scoring and selection, in percent of the longest run on full data. Each run
measures it in its own full epochs. One full epoch is the time for all tokens at the run's mean training speed. Where
full data ran with several learning rates, the curve takes the best on dev, among these with the most seeds.

Differences are in points and paired by seed. From 3 seeds on, they have 95 % intervals over seeds. With 3 seeds, the
width of an interval is itself uncertain. A test set is a sample, too, and no interval includes this. About one of 20
intervals misses the true value by chance. In the table above, a dataset counts as one value. Its intervals need 3 seeds
everywhere. They treat the datasets as a random sample, which they are not.

The equal-time curve is the upper concave envelope of the means on full data, and it never falls. It skips a mean below
the line between two others. The reported numbers decide which means it skips. This favours full data, above all where
dev is reported. Where a number of epochs is missing, the straight line favours pruning.

Letters name machines with a precision. Accuracy is compared across them. Seconds compare only within one letter, and
only while nothing else ran on the machine."""
LEGEND = """\
Time is training, scoring and selection, in percent of full data at the run's own speed. Highest EL2N is the paper's
rule. Sampled EL2N is `--sample`. Random each epoch draws anew before every epoch. InfoBatch leaves out the fraction r
of the samples below the mean loss. n counts seeds. A cell shows the setting that is best on dev, among the settings
with the most seeds. The table omits methods that ran on fewer than half of the datasets. Compare only cells of equal n.
The full tables pair runs by seed."""


# ---- blocks: a page is a list of text and tables; a table is a list of lines, and a line a list of cells


def as_markdown(blocks, wrap=False):
    """Return blocks as Markdown with aligned columns. No text can break out of its cell. wrap: text, for a terminal."""
    parts = []
    for block in blocks:
        if isinstance(block, str):
            parts.append(fill(clean(block), 120, break_on_hyphens=False) if wrap else clean(block))
        else:
            lines = [[clean(cell).replace("\\", "\\\\").replace("|", "\\|") for cell in line] for line in block]
            widths = [max(3, *map(len, column)) for column in zip(*lines)]
            widths[-1] = 3  # a long text there would pad all lines
            lines.insert(1, ["-" * width for width in widths])
            parts.append("\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines))
    return "\n\n".join(parts) + "\n"


# ---- many runs


def plus_minus(values, digits=2):
    """Return mean ± deviation as text. One value has no deviation."""
    return f"{mean(values):.{digits}f}" + (f" ± {deviation(values):.{digits}f}" if len(values) > 1 else "")


def gain(values, n, seeds=3):
    """Return a mean difference as text, with its 95 % interval from 3 values on.

    n: how many values there should be. seeds: the fewest behind one of them; with fewer than 3 there is no interval.
    """
    if not values:
        return "–"
    text = f"{mean(values):+.2f}"
    if len(values) > 2 and seeds > 2:  # the interval of 2 says next to nothing
        half = half_width(values)
        text += f" [{mean(values) - half:+.2f}, {mean(values) + half:+.2f}]"
    return text if len(values) == n else f"{text} (n {len(values)})"


def mean_gain(gains):
    """Return the mean over datasets as text; "–" where one has no gain. gains: for each dataset a list, one a seed."""
    return gain([mean(values) for values in gains], len(gains), min(map(len, gains))) if all(gains) else "–"


def headline_arms(found):
    """Return {(keep, method): {Task: arm}} of what half of the Tasks have. Of several arms, take the best on dev."""
    candidates = {}
    for task in found:
        for arm in task.arms:
            other = arm.epochs != task.epochs
            name = f"{arm.name}, {arm.epochs:g} epochs" if other else arm.name
            key = (*arm.order[:5], -arm.epochs if other else -np.inf), arm.keep, name
            candidates.setdefault(key, {}).setdefault(task, []).append(arm)
    return {key[1:]: {task: best_on_dev(arms) for task, arms in candidates[key].items()}
            for key in sorted(candidates) if 2 * len(candidates[key]) >= len(found)}  # fmt: skip


def headline(found, arms):
    """Return the blocks of the headline table: a line a method, a column a dataset, one number a cell."""
    titles, seeds = {}, {task: len(task.full.rows) if task.full else 1 for task in found}
    first = [task for task in found if task.kind == found[0].kind]  # the differences are means over these
    some = any(task.full for task in found)
    differences = {"to full data": Task.to_full, "to equal time": Task.to_equal_time} if some else {}
    table = [["keep", "method", "time", *differences, *(f"{task.title} (n {seeds[task]})" for task in found)]]
    for (keep, name), by_task in arms.items():
        times = [round(task.percent(arm.cost)) for task, arm in by_task.items()]
        span = sorted({min(times), max(times)})
        cells = [keep, name, " to ".join(map(str, span)) + " %"]
        for difference in differences.values():
            cells.append(mean_gain([difference(task, by_task[task]) if task in by_task else [] for task in first]))
        for task in found:
            arm = by_task.get(task)
            other_n = f" (n {len(arm.rows)})" if arm and len(arm.rows) != seeds[task] else ""
            cells.append(f"{arm.mean:.1f}{other_n}" if arm else "–")
        table.append(cells)
    for task in found:
        titles.setdefault(f"{task.measure} on {task.split}, {task.epochs} epochs", []).append(task.title)
    models = dict.fromkeys(task.arms[0].args["model"].rpartition("/")[2] for task in found)
    caption = [f"Model: {', '.join(models)}."]
    caption += [f"{', '.join(names)}: {measure}." for measure, names in titles.items()]
    if differences:
        over = f", mean over {'; '.join(task.title for task in first)}" if len(first) > 1 else ""
        caption.append(f"To full data: points above the longest run on full data{over}. To equal time: points above "
                       "full data trained for the same time.")  # fmt: skip
    return [table, " ".join([*caption, LEGEND])]


def full_table(task, letters, wide):
    """Return the table of all arms of a Task. letters: {machine: letter}. wide: with the other metrics."""
    head = ["keep", "method", "epochs", "lr", "n", task.measure, "time", "to full data", "to equal time", "seconds"]
    table = [head + ["other metrics"] * wide]
    for arm in task.arms:
        rows = list(arm.rows.values())
        where = sorted({letters[row["machine"]] for row in rows})
        seconds = plus_minus([row["seconds"]["total"] for row in rows], 0) if len(where) == 1 else ""
        others = [f"{name} {mean(row['metrics'][name] for row in rows):.2f}" for name in rows[0]["metrics"]
                  if name != task.metric and all(name in row["metrics"] for row in rows)]  # fmt: skip
        line = [arm.keep, arm.name + task.extras(arm), f"{arm.epochs}", f"{arm.args['lr']:g}", f"{len(rows)}",
                plus_minus(arm.accuracy.values()), f"{task.percent(arm.cost):.1f} %",
                gain(task.to_full(arm), len(rows)), gain(task.to_equal_time(arm), len(rows)),
                f"{seconds} {', '.join(where)}".strip()]  # fmt: skip
        table.append(line + [", ".join(others)] * wide)
    return table


def full_page(found, arms, wide):
    """Return the blocks of all tables."""
    names = dict.fromkeys(row["machine"] for task in found for arm in task.arms for row in arm.rows.values())
    letters = {name: chr(65 + i % 26) * (i // 26 + 1) for i, name in enumerate(names)}
    blocks = [*headline(found, arms), *READING.split("\n\n")]
    for task in found:
        steps = [f"{arm.epochs} (lr {arm.args['lr']:g}{task.extras(arm)}, n {len(arm.rows)})"
                 for arm in reversed(task.baselines)]  # fmt: skip
        text = f"Epochs on full data for equal time: {', '.join(steps) or 'none; make runs with --method full'}."
        gains = [task.to_equal_time(arm) for arm in task.arms]
        if spreads := [deviation(values) for values in gains if len(values) > 2]:
            seeds = 16 * median(spreads) ** 2 + 2  # where 2 * deviation / sqrt(n - 2) is 0.5
            text += f" The gain to equal time has a standard deviation of {median(spreads):.1f} points between "
            text += f"seeds (the median over the lines). An interval of ±0.5 points takes about {seeds:.0f} seeds."
        blocks += [f"## {task.title}", text, full_table(task, letters, wide)]
    return [*blocks, "## Machines", [["letter", "machine"], *([letter, name] for name, letter in letters.items())]]


# ---- one run


def likely_errors(folder, count):
    """Return the blocks that show the train samples with the highest scores of a run's last selection, in words."""
    import data  # here, because it takes seconds

    path = max((folder / "rounds").glob("epoch-*.npz"), default=None)
    expect(path, folder, "no selection in rounds/; take the folder of a run that has pruned")
    try:
        with np.load(path) as arrays:
            scores = arrays["scores"].astype(float)
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        args, digest = facts["args"], facts["data"]
        dataset, random = args["dataset"], args["method"] == "random"
        expect(not random, folder, "random scores say nothing about labels; take a run of another method")
        with redirect_stdout(sys.stderr):  # its warnings are no part of the page
            splits = data.read(dataset, args["data_dir"], args["max_train"], args["tune"])
    except (OSError, UserError):
        raise
    except Exception as error:  # whatever a damaged file makes NumPy or json raise
        raise UserError(f"{folder}: damaged ({clean(error)}); take the folder of another run") from None
    samples = splits["train"]
    same = data.digest(splits) == digest and scores.shape == (len(samples),)
    expect(same, folder, f"the samples of {dataset} have changed since; make the run again")
    table = [["row", "score", "label", "text, with its slots"]]
    for i in np.argsort(-scores, kind="stable")[: max(count, 0)]:
        text, label, tags, row = samples[i]
        if tags:
            text = " ".join(word if tag == "O" else f"[{word}: {tag}]" for word, tag in zip(text, tags))
        elif isinstance(text, tuple):
            text = " / ".join(text)
        table.append([f"{row}", f"{scores[i]:.2f}", label, text])
    text = f"{folder.resolve().name}: the highest scores of {Path(dataset).name} in {path.name}."
    text += " A high EL2N or loss often means a wrong label. Rows count from 0, without a header."
    return ["# Likely label errors", text, table]


def report_runs(paths, to):
    """Compare many runs. Returns the blocks for the terminal, and {file name: blocks} if there is a folder `to`."""
    rows = read_rows(paths)
    expect(rows, " ".join(paths), "no finished run here; train.py writes result.json when a run ends")
    found = tasks(rows)
    arms = headline_arms(found)
    pages = {}
    if to:
        top = ["# Results", f"Made by `python report.py {' '.join(paths)} --to {to}`."]
        if any(task.full for task in found):
            try:
                figures.figure(found, arms, to / "figure")
                top.append("![accuracy against time](figure.svg)")
            except ImportError:
                print("note: no pictures without matplotlib; pip install matplotlib", file=sys.stderr)
        pages = {"headline.md": headline(found, arms), "results.md": top + full_page(found, arms, wide=True)}
    return full_page(found, arms, wide=False), pages


def main(argv=None):
    """Print a report, and write it with --to. Returns the exit status: 0, or 2 where there is nothing to report."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="+", metavar="PATH", help=".jsonl files, folders of runs, or one run's folder")
    parser.add_argument("--to", type=Path, metavar="DIR", help="write Markdown and pictures to this folder")
    parser.add_argument("--errors", type=int, default=20, metavar="N", help="samples to show of one run (default: 20)")
    args = parser.parse_args(argv)
    try:
        single = [path for path in args.paths if Path(path, "config.json").is_file()]
        expect(not single or len(args.paths) == 1, " ".join(single), "one run's folder; name it alone, or its parent")
        if args.to:
            args.to.mkdir(parents=True, exist_ok=True)
        if single:
            blocks = likely_errors(Path(single[0]), args.errors)
            pages = {"likely_errors.md": blocks}
        else:
            blocks, pages = report_runs(args.paths, args.to)
        for name, page in pages.items() if args.to else ():
            (args.to / name).write_text(as_markdown(page), encoding="utf-8")
        print(as_markdown(blocks, wrap=True), end="", flush=True)
    except (OSError, UserError) as error:
        message = f"{error.filename or 'the report'}: {error.strerror}" if isinstance(error, OSError) else error
        print(f"report.py: error: {clean(message)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # for a terminal that cannot show ±
    leave(main())
