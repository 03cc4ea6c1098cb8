"""List the datasets, or download some ahead of a run.

    python -m data                every dataset: task, rows, licence, on disk or not
    python -m data mtop slurp     download these, unless on disk
"""

import argparse
import sys

from . import DATASETS, FILES, DataError, download, fetch, find


def overview(folder):
    """Yield the lines of a table of all datasets."""
    yield f"{'dataset':<8} {'task':<16} {'rows':<26} {'licence':<22} on disk"
    for name, source in DATASETS.items():
        path = find(name, folder)[1]
        missing = path and download.absent(path, FILES[name])
        here = "no" if missing else path or "generated"
        task = "classification" if source.classifies else "intent and slots"
        yield f"{name:<8} {task:<16} {' / '.join(f'{n:,}' for n in source.rows):<26} {source.licence:<22} {here}"


def main(argv=None):
    """List or download datasets. Returns the exit status: 0, 2 or 130."""
    p = argparse.ArgumentParser(prog="python -m data", description=__doc__,
                                formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    p.add_argument("datasets", nargs="*", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    p.add_argument("--data-dir", metavar="DIR", help="folder of the raw datasets ($DATA_DIR, or data/raw)")
    args = p.parse_args(argv)
    try:
        for name in args.datasets:
            fetch(name, args.data_dir)
            print(f"{name}: in {find(name, args.data_dir)[1] or 'this program, which generates it'}")
        if not args.datasets:
            print("\n".join(overview(args.data_dir)))
    except DataError as error:
        print(f"python -m data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
