"""Which datasets there are, and fetching them ahead of a run.

    python -m data --list            every dataset: task, sizes, licence, on disk or not
    python -m data mtop slurp        download those that are not on disk
    python -m data --check snips     read and encode it, and print what the loader sees beside what is official
"""

import argparse
import sys
from contextlib import redirect_stdout

import numpy as np

from metrics import spans

from . import DATASETS, DEFAULT_MODEL, IGNORE, DataError, ModelError, download, fetch, find, load, load_tokenizer


def overview(folder):
    """A table of all datasets, as lines of text."""
    yield f"{'dataset':<8} {'task':<24} {'rows':<28} {'licence':<22} on disk"
    for name, source in DATASETS.items():
        path = find(name, folder)[1]
        missing = download.absent(path, source.files)
        here = "generated" if path is None else str(path)
        if path and (not path.is_dir() or len(missing) == len(source.files) > 0):
            here = "no"
        elif missing:
            here = f"{path}, without {', '.join(file.path for file in missing)}"
        task = f"classification, {source.labels}" if source.classifies else "intent and slots"
        yield f"{name:<8} {task:<24} {' / '.join(f'{n:,}' for n in source.rows):<28} {source.licence:<22} {here}"


def on_disk(name, folder):
    """Whether a dataset can be read without a download."""
    source, path = find(name, folder)
    return path is None or (path.is_dir() and not download.absent(path, source.files))


def checked(names, folder):
    """A Markdown table of what the loader makes of datasets, official numbers in brackets, as lines of text."""
    head = ("dataset", "rows", "labels", "slot types", "tags", "slots", "rows without", "words lost")
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    for name in names:
        with redirect_stdout(sys.stderr):  # notes are no rows
            data, source = load(name, tokenizer, folder), find(name, folder)[0]
        splits = data.splits.values()
        cells = [name, f"{listed(map(len, splits))} ({listed(source.rows) or '–'})",
                 f"{len(data.labels)} ({source.labels or '–'})"]  # fmt: skip
        if data.tags:
            slots = [[len(spans(tags)) for tags in tags_of(split, data.tags)] for split in splits]
            lost = sum(split.lost for split in splits)
            cells += [
                f"{len({tag[2:] for tag in data.tags if tag != 'O'})} ({source.slots or '–'})", f"{len(data.tags)}",
                listed(map(sum, slots)), listed(counts.count(0) for counts in slots),
                f"{lost} of {lost + sum((split.tags != IGNORE).sum().item() for split in splits):,}",
            ]  # fmt: skip
        yield "| " + " | ".join(cells + ["–"] * (len(head) - len(cells))) + " |"


def tags_of(split, names):
    """Yield the tags of each utterance that its tokens carry, as a list of names."""
    for tags in np.split(split.tags.numpy(), split.offsets[1:-1]):
        yield [names[tag] for tag in tags[tags != IGNORE]]


def listed(numbers):
    """Numbers as text, separated by slashes."""
    return " / ".join(f"{n:,}" for n in numbers)


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m data", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("datasets", nargs="*", metavar="NAME", help=f"of {', '.join(DATASETS)}; or a folder of your own")
    p.add_argument("--list", action="store_true", help="show every dataset")
    p.add_argument("--check", action="store_true", help="print what the loader sees of the named ones (all on disk)")
    p.add_argument("--data-dir", metavar="DIR", help="folder of the raw datasets ($DATA_DIR, or data/raw)")
    args = p.parse_args(argv)
    try:
        for name in args.datasets:
            fetch(name, args.data_dir)
            print(f"{name}: in {find(name, args.data_dir)[1] or 'this program, which generates it'}")
        if args.check:
            here = [name for name in DATASETS if on_disk(name, args.data_dir)]
            for line in checked(args.datasets or here, args.data_dir):
                print(line, flush=True)
        if args.list or not (args.datasets or args.check):
            print("\n".join(overview(args.data_dir)))
    except (DataError, ModelError, OSError) as error:
        print(f"python -m data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show –
    sys.exit(main())
