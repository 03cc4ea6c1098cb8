"""List the datasets, or download some ahead of a run.

    python -m data                every dataset: task, rows, licence, on disk or not
    python -m data mtop slurp     download these, unless on disk

Raw files are in $DATA_DIR, or in data/raw.
"""

import argparse
import sys

from errors import Parser, UserError, leave

from . import DATASETS, FILES, download, find


def main(argv=None):
    """List or download datasets. Returns the exit status: 0, 2 or 130."""
    p = Parser("python -m data", None, __doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("datasets", nargs="*", metavar="NAME", help=f"one of {', '.join(DATASETS)}")
    names = p.parse_args(argv).datasets
    try:
        for name in names or DATASETS:
            (source, path), files = find(name), FILES.get(name, ())
            if names:
                download.fetch(name, source, path, files)
            here = "generated" if path is None else "no" if download.absent(path, files) else path
            task, rows = "classification" if source.metrics else "intent, slots", " / ".join(map(str, source.rows))
            print(f"{name:<6} {task:<14}  {rows:<22}  {source.licence:<20}  on disk: {here}", flush=True)
    except (OSError, UserError) as error:  # OSError: a full disk, or a closed pipe
        print(f"python -m data: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m data: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
