"""The command line of train.py: every flag, its default, and which flags go together."""

import argparse
import os
from contextlib import suppress

import numpy as np
import torch

from data import DATASETS, DEFAULT_MODEL, default_folder, find
from distributed import several
from engine import has_bf16
from errors import Parser, one_line
from scoring import METHODS, SCORES

# The pruning flags that have an effect with each method. Every other one is refused.
RANKED = {"keep", "full_epochs", "cycle", "full_end", "selection", "ema", "std_weight", "offset", "stratify"}
USES = {
    "full": set(),
    "random": {"keep", "full_epochs", "cycle", "full_end", "selection"},
    **dict.fromkeys(SCORES, RANKED | {"rescore", "sample"}),
    **dict.fromkeys(("forgetting", "grand"), RANKED),
    "infobatch": {"keep", "full_epochs", "cycle", "full_end"},
}
PRUNING = set().union(*USES.values())


def defaults(args, given, classifies):
    """Return the value of every pruning flag that the user did not give, as {flag: value}; None where it has no use.

    classifies: whether the task is classification, for which the paper does not smooth scores.
    """
    if args.method == "full":
        return dict.fromkeys(PRUNING) | {"full_epochs": args.epochs, "cycle": 1, "full_end": 0}
    static, sample = given.get("selection") == "static", given.get("sample", False)
    flags = {"keep": 0.5, "full_epochs": 2, "cycle": 2, "full_end": 0, "selection": "dynamic", "rescore": "all",
             "ema": 0.8, "std_weight": 1.0, "offset": 0.0, "sample": False, "stratify": False}  # fmt: skip
    if classifies or static or sample or args.method == "forgetting":  # the last two: an average favours old scores
        flags["ema"] = 1.0
    if given.get("ema", flags["ema"]) == 1:
        flags["std_weight"] = 0.0
    if sample:
        flags |= {"cycle": 1, "rescore": "all" if static else "none"}
    if args.method == "infobatch":
        # Qin et al. prune while e + 1 <= 0.875 E, for e from 0.
        flags |= {"cycle": 1, "full_epochs": 1, "full_end": -(-args.epochs // 8)}
    if args.method == "random" and static:
        flags["full_epochs"] = 0  # nothing has to be learned before a random choice
    return {flag: value if flag in USES[args.method] else None for flag, value in flags.items() if flag not in given}


def number(kind, right, holds):
    """Return a type for argparse: int or float, refused where `holds` is false of it. right: what it must be."""

    def parse(text):
        with suppress(ValueError):
            if holds(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text} must be {right}")

    return parse


def device(name):
    """Return the name of a device that works here, for argparse. auto is cuda where there is one, else cpu."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and several():
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"  # else every process would open the first GPU
    try:
        torch.empty(0, device=name).cpu()  # "meta" has no values to bring back
    except Exception as error:  # RuntimeError, AssertionError and others, by backend
        advice = "start one process for each GPU, or try cpu" if several() else "try cpu"
        raise argparse.ArgumentTypeError(f"{name} is not available here ({one_line(error)}); {advice}") from None
    return name


count = number(int, "a whole number, at least 1", lambda n: n >= 1)
count_or_0 = number(int, "a whole number, at least 0", lambda n: n >= 0)
positive = number(float, "a number above 0", lambda x: 0 < x < np.inf)
share = number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that keeps line breaks and shows each flag's default."""


def parser(description):
    """Return the argument parser. Flags whose default depends on others are absent from the result if not given."""
    p = Parser(prog="train.py", description=description, allow_abbrev=False, formatter_class=Help,
               argument_default=argparse.SUPPRESS)  # fmt: skip

    add = p.add_argument_group("data").add_argument
    add("--dataset", default="demo", metavar="NAME", help=f"{', '.join(DATASETS)}, or your own folder")
    add("--data-dir", metavar="DIR", help="folder of the raw datasets (default: $DATA_DIR, or data/raw)")
    add("--max-length", default=256, metavar="TOKENS", help="cut samples off after this many tokens",
        type=number(int, "from 3 to 32767", lambda n: 3 <= n < 2**15))
    add("--max-train", type=count, metavar="N", help="train on N samples only, drawn at random")
    add("--tune", action="store_true", help="evaluate on a tenth of train, held out, and never on dev or test")

    add = p.add_argument_group("method").add_argument
    add("--method", default="el2n", choices=METHODS,
        help="full: all samples; random: a random fraction; infobatch: all samples above the mean loss, and a fraction "
        "of the others; any other method: the highest scores, unless --sample or --stratify is given")
    add("--keep", type=number(float, "above 0 and below 1; --method full keeps everything", lambda k: 0 < k < 1),
        metavar="k", help="k: fraction of the samples to keep (1 - ρ in the paper); "
        "infobatch: of the samples below the mean loss (default: 0.5)")
    add("--full-epochs", type=count_or_0, metavar="τ",
        help="τ: epochs on full data before the first selection (default: 2; infobatch 1; static random 0)")
    add("--cycle", type=count, metavar="T", help="T: epochs between selections (default: 2; infobatch and --sample 1)")
    add("--full-end", type=count_or_0, metavar="F",
        help="F: train the last F epochs on full data (default: 0; infobatch E / 8, rounded up)")
    add("--selection", choices=["dynamic", "static"],
        help="dynamic: select every T epochs; static: once, then train E epochs from the pretrained weights "
        "(default: dynamic)")
    add("--sample", action="store_true",
        help="draw samples with chances in proportion to their scores, instead of keeping the highest")
    add("--draw", action="store_true", dest="sample", help=argparse.SUPPRESS)  # old name
    add("--stratify", action="store_true", help="keep equally many samples from each of 50 ranges of scores")
    add("--offset", type=number(float, "at least 0 and below 1", lambda o: 0 <= o < 1), metavar="o",
        help="o: leave out this fraction of the samples, with the very highest scores (default: 0)")
    add("--rescore", choices=["all", "none"], help="all: a pass over every sample before a selection, dropout off; "
        "none: scores of the last training steps (default: all; dynamic --sample: none)")
    add("--ema", type=share, metavar="α", help="α: weight of the newest score in the average over selections "
        "(default: 0.8; 1 for classification, with --sample and for forgetting)")
    add("--std-weight", type=number(float, "at least 0", lambda c: 0 <= c < np.inf), metavar="c",
        help="c: weight of the deviation of a sample's scores, added to their average (default: 1; 0 where α = 1)")

    add = p.add_argument_group("training").add_argument
    add("--model", default=DEFAULT_MODEL, metavar="ID", help="Hugging Face hub id or local folder")
    add("--epochs", type=count, default=10, metavar="E", help="E: number of epochs; static: after the selection")
    add("--lr", type=positive,
        help="learning rate at the start (default: 2e-4; classification 1e-4; try 3e-5 with a base-size model)")
    add("--schedule", default="linear", choices=["linear", "constant"], help="learning rate: falling to 0, or constant")
    add("--clip", type=positive, default=1.0, metavar="NORM", help="clip the gradient of the mean loss to this norm")
    add("--batch-size", type=count, default=32, metavar="B", help="samples in a training step")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto is bf16 where the hardware has it")
    add("--seed", type=number(int, "from 0 to 2**63 - 1", lambda n: 0 <= n < 2**63), default=0,
        help="seed of heads, dropout, batches and random selection")

    add = p.add_argument_group("run").add_argument
    add("--device", type=device, default="auto", help="cpu, cuda, cuda:1, …; auto is cuda where there is one")
    add("--out", default="runs", metavar="DIR", help="folder of run folders")
    add("--resume", action="store_true", help="go on with the run of this command, if it was stopped")
    add("--save-every", type=count, default=1, metavar="N", help="save a checkpoint every N epochs")
    add("--no-model", action="store_true", help="do not save the fine-tuned model")
    return p


def parse(argv, description):
    """Return all flags as a namespace, checked and complete. Exits with status 2 and one line where they are wrong."""
    p = parser(description)
    absent = {"data_dir": None, "max_train": None, "tune": False, "resume": False, "no_model": False}
    args = p.parse_args(argv, argparse.Namespace(**absent))
    given = {flag: value for flag, value in vars(args).items() if flag in PRUNING}
    if args.dataset not in DATASETS:
        if not os.path.isdir(args.dataset):
            p.error(f"--dataset {args.dataset}: must be one of {', '.join(DATASETS)}, or your own folder")
        args.dataset = os.path.abspath(args.dataset)
    args.data_dir = os.path.abspath(args.data_dir or default_folder())
    args.model = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    classifies = bool(find(args.dataset)[0].metrics)
    args.lr = getattr(args, "lr", 1e-4 if classifies else 2e-4)
    vars(args).update(defaults(args, given, classifies))

    static = args.selection == "static"
    pruned = args.epochs - args.full_end - args.full_epochs * (not static)
    once = static or pruned <= args.cycle
    without_effect = [  # where this holds, these flags have no effect with that
        (True, PRUNING - USES[args.method], f"--method {args.method}"),
        (once, {"ema", "std_weight"}, "a single selection"),
        (static, {"cycle"}, "--selection static"),
        (static and args.method == "random", {"full_epochs"}, "a single random selection"),
        (args.sample, {"offset", "stratify"}, "--sample"),
        (args.ema == 1, {"std_weight"}, "--ema 1 (by default or given), which averages nothing"),
    ]
    for holds, flags, other in without_effect:
        for flag in sorted(flags & given.keys()) if holds else ():
            p.error(f"--{flag.replace('_', '-')} has no effect with {other}; leave it out")
    if args.method != "full" and pruned < 1:
        p.error(f"--full-epochs {args.full_epochs} and --full-end {args.full_end} leave none of {args.epochs} epochs "
                "to prune; raise --epochs")
    if args.full_epochs < 1 and args.method != "random":
        p.error(f"--full-epochs 0: --method {args.method} has to learn before it scores; take 1 or more")
    if args.offset and args.offset > 1 - args.keep + 1e-9:
        p.error(f"--offset {args.offset:g}: must be at most 1 - keep, {1 - args.keep:g}")

    if args.precision == "auto":
        args.precision = "bf16" if has_bf16(args.device) else "fp32"
    return args
