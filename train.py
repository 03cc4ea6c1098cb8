"""Fine-tune a language-understanding model on a pruned schedule (Attendu and Corbeil, "NLU on Data Diets", 2023).

    python train.py --dataset demo --keep 0.5

τ epochs on everything; then, every T epochs, score the examples, keep the share k with the highest scores, and train on
those. Read `train()` first: it is the whole method in one loop.
"""

import time

START = time.perf_counter()  # before the slow imports, so that they count as loading

import argparse
import os
import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a traceback

from pathlib import Path

import numpy as np
import torch

import report
from data import DATASETS, DEFAULT_MODEL, DataError, ModelError, batches, default_folder, find, load, load_tokenizer
from data.encoding import one_line
from data.parallel import add_up, lost_process, processes, rank, share
from metrics import evaluate
from models import FlatAdamW, NLUModel, choose_products, limit_vocabulary, losses, predictions
from pruning import Schedule, SelectionError, Smoother, choose, defaults, kept_size
from report import RunError
from scoring import METHODS, SCORES, WATCHED, Scorer


def train(model, data, schedule, args, clock, folder):
    """Fine-tune `model` in place and log every epoch to `folder`, from its checkpoint on if it has one. Returns the
    log, a list of dicts."""
    n, lengths = len(data.train), data.train.lengths
    labels, everything, equal = data.train.labels.cpu().numpy(), np.arange(n), torch.ones(n, device=args.device)
    scorer, smooth = Scorer(data.train, args.method, args.rescore), Smoother(args.ema, args.std_weight)
    step, kept, weights, log = 0, everything, equal, []
    with clock("load"):
        optimizer = FlatAdamW(model, args.precision, args.clip)
        pretrained = {"master": optimizer.master.cpu().numpy().copy()} if schedule.static else None
        identity = report.identity(args, data, optimizer.weights)
        if state := report.load_checkpoint(folder, identity):
            step, kept, log = state["step"], state["kept"], state["log"]
            weights = torch.as_tensor(state["weights"], device=args.device)
            scorer.scores = torch.as_tensor(state["scores"], device=args.device)
            optimizer.load(state["optimizer"])
            vars(smooth).update(state["smooth"])
            clock.add(state["seconds"])
        report.opening(args, data, folder, log, schedule.total)
    clock.lap()

    for epoch in range(len(log), schedule.total):
        # All chance comes from (seed, epoch): no epoch depends on how many numbers an earlier one drew.
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**62)) + rank())

        if schedule.prunes_at(epoch):
            with clock("score"):
                scores = scorer(model, kept, rng)
            with clock("select"):
                importance = smooth(scores)
                kept, weights = choose(importance, labels, args, rng)
                weights = torch.as_tensor(weights, device=args.device)
                report.save_round(folder, epoch + 1, scores, importance, kept)  # on the clock, as only pruning needs it
                if schedule.restarts_at(epoch):
                    optimizer.load(pretrained)
        elif schedule.full_at(epoch):
            kept, weights = everything, equal

        model.train()
        watching = scorer.watches(schedule, epoch)
        loss_sum = torch.zeros((), device=args.device)
        good = torch.tensor(step, device=args.device)  # steps up to the first whose loss is no finite number
        with clock("train"), report.progress(epoch, schedule.total, len(kept), n) as bar:
            cut = batches(lengths, kept, args.batch_size, rng)
            for i, indices in enumerate(cut):
                mine = share(indices)  # all of them, unless torchrun started several processes
                if len(mine):
                    batch = data.train.batch(mine)
                    outputs = model(batch)
                    loss = losses(outputs, batch)
                    (loss @ weights[mine] / len(indices)).backward()
                    if watching:
                        scorer.watch(outputs, batch)
                    loss_sum += loss.detach().sum()
                done = schedule.progress(epoch + i / len(cut))
                optimizer.step(args.lr * (1 - done) if args.schedule == "linear" else args.lr)
                step += 1
                good += loss_sum.isfinite()
                redrawn = bar.update(len(indices))  # first process only
                if redrawn:
                    bar.set_postfix(loss=f"{loss.mean().item():.3f}", refresh=False)
                if redrawn or args.device == "cpu":  # elsewhere, item() waits for the device
                    check_finite(loss_sum, good, step, epoch)
            if watching:
                scorer.gather()
            mean_loss = add_up(loss_sum).item() / len(kept)
            # The last step's loss is that before its update: a blow-up there shows in the weights only.
            check_finite(loss_sum + 0 * optimizer.master.sum(), good, step, epoch)

        with clock("evaluate"):
            dev = evaluate(data, data.evaluation["dev"], *predictions(model, data.evaluation["dev"]))
        log.append({"epoch": epoch + 1, "kept": len(kept), "tokens": int(lengths[kept].sum()), "step": step,
                    "loss": mean_loss, "dev": dev, "seconds": clock.lap()})
        report.log_epoch(folder, log[-1], schedule.total, n)
        if (epoch + 1) % args.save_every == 0 or epoch + 1 == schedule.total:
            with clock("save"):
                report.save_checkpoint(folder, {"identity": identity, "step": step, "kept": kept, "log": log,
                                                "weights": weights.cpu().numpy(), "scores": scorer.scores.cpu().numpy(),
                                                "smooth": vars(smooth), "optimizer": optimizer.state(),
                                                "seconds": clock.seconds})
    optimizer.restore()
    return log


def check_finite(loss, good, step, epoch):
    """RunError where `loss`, (), is no finite number. good: how many of the steps so far came before; epoch: from 0."""
    if not loss.isfinite():
        raise RunError(f"the loss is {loss.item()} at step {min(good.item() + 1, step)} (epoch {epoch + 1}); start "
                       "again with a lower --lr, or --precision fp32")


def parse(argv=None):
    """Flags to a namespace, checked. Exits with status 2 and one line where a value makes no sense. RunError where
    there is no run to resume."""
    argv = sys.argv[1:] if argv is None else argv
    p = argparse.ArgumentParser(prog="train.py", description=__doc__, allow_abbrev=False,
                                formatter_class=argparse.RawDescriptionHelpFormatter)
    p.error = lambda message: p.exit(2, f"{p.prog}: error: {message} (see --help)\n")  # without the whole usage
    add = p.add_argument
    add("--dataset", default="demo", metavar="NAME",
        help=f"one of: {', '.join(DATASETS)}; or a folder of your own (demo)")
    add("--data-dir", metavar="DIR", help="folder of the raw datasets ($DATA_DIR, or data/raw)")
    add("--model", default=DEFAULT_MODEL, metavar="ID",
        help="Hugging Face hub id or local folder (%(default)s, a copy of which requirements.txt installs)")
    add("--method", default="el2n", choices=METHODS,
        help="the score that decides what is kept: %(choices)s; full keeps everything (el2n)")
    add("--keep", type=float, default=0.5, metavar="k",
        help="k = 1 - ρ: share of train examples kept, in (0, 1]; infobatch: of those with a loss below the mean (0.5)")
    add("--epochs", type=int, default=10, metavar="E", help="E: epochs in all; static: after τ others (10)")
    add("--full-epochs", type=int, metavar="τ",
        help="τ: epochs on everything before the first selection (2; infobatch: 1; random static: 0)")
    add("--cycle", type=int, metavar="T", help="T: epochs from one selection to the next (2; infobatch, --draw: 1)")
    add("--full-end", type=int, metavar="F", help="F: last epochs, on everything again (0; infobatch: an eighth of E)")
    add("--selection", default="dynamic", choices=["dynamic", "static"],
        help="dynamic: every T epochs anew; static: once, after τ epochs, to train E epochs from the start (dynamic)")
    add("--rescore", choices=["all", "untrained", "none"],
        help="what a selection makes a scoring pass over: all; what was not trained on in the last epoch; none. Others "
        "have the score of their last training step (untrained; static, grand: all; --draw, forgetting, infobatch: "
        "none)")
    add("--ema", type=float, metavar="α", help="α: weight of the newest score in the average over rounds, in (0, 1] "
        "(0.8; random, forgetting, infobatch, --draw: 1, which is no smoothing)")
    add("--std-weight", type=float, metavar="c", help="c: weight of the scores' deviation over rounds (1; those: 0)")
    add("--offset", type=float, default=0.0, metavar="o", help="o: share with the very highest scores to set aside (0)")
    either = p.add_mutually_exclusive_group().add_argument
    either("--draw", action="store_true", help="draw what is kept, one example after the other, with chances in "
           "proportion to their scores, instead of keeping the highest (el2n and loss)")
    either("--stratify", action="store_true", help="keep equally many from each of 50 ranges of scores, at random")
    add("--class-floor", type=int, default=0, metavar="N", help="keep at least N examples of each label (0)")
    add("--lr", type=float, help="learning rate at the start (2e-4; classification: 1e-4)")
    add("--schedule", default="linear", choices=["linear", "constant"], help="learning rate: linear ends at 0 (linear)")
    add("--clip", type=float, default=1.0, metavar="NORM", help="largest norm of the mean loss's gradient (1)")
    add("--batch-size", type=int, default=32, metavar="B", help="examples a training step (32)")
    add("--max-length", type=int, default=256, metavar="TOKENS", help="longer examples are cut off (256)")
    add("--max-train", type=int, metavar="N", help="only the first N train examples, for quick tries (all)")
    add("--seed", type=int, default=0, help="of heads, dropout, batches and random selection (0)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="auto: bf16 if hardware has it (auto)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, …; auto is cuda where there is one (auto)")
    add("--out", default="runs", metavar="DIR", help="where run folders and results.jsonl go (runs)")
    add("--no-model", action="store_true", help="do not keep the fine-tuned model (90 MB with the default --model)")
    add("--save-every", type=int, default=1, metavar="N", help="checkpoint every N epochs, and after the last (1)")
    add("--resume", metavar="DIR", help="go on with the run in this folder, with its flags; or auto: with the newest "
        "run in --out that has the same settings and seed, if there is one and none of them is finished")
    p.set_defaults(folder=None)  # the run's, once it has begun
    args = p.parse_args(argv)
    if args.resume not in (None, "auto"):
        if argv not in (["--resume", args.resume], [f"--resume={args.resume}"]):
            p.error("--resume goes on with the flags of the run's config.json: leave all others out")
        folder = Path(args.resume).resolve()  # "." has neither a name nor the right parent
        p.prog = f"train.py: {folder / 'config.json'}"  # where a flag that is refused comes from
        args = p.parse_args([*report.command_line(folder), f"--resume={folder}", f"--out={folder.parent}"])

    def check(flag, ok, right):
        if not ok:
            p.error(f"--{flag} {getattr(args, flag.replace('-', '_'))}: must be {right}")

    if args.dataset not in DATASETS:  # a folder of the user's: the same one from another folder, too
        check("dataset", os.path.isdir(args.dataset), f"one of {', '.join(DATASETS)}, or a folder of your own")
        args.dataset = os.path.abspath(args.dataset)
    args.data_dir = os.path.abspath(args.data_dir or default_folder())
    args.model = os.path.abspath(args.model) if os.path.isdir(args.model) else args.model
    own = defaults(args) | {"lr": 1e-4 if find(args.dataset)[0].classifies else 2e-4}
    for flag, value in own.items():  # the method's and the task's own, where the user says nothing
        setattr(args, flag, value if getattr(args, flag) is None else getattr(args, flag))
    check("keep", 0 < args.keep <= 1, "above 0 and at most 1, the share of examples that is kept")
    for flag in ("epochs", "cycle", "batch-size", "save-every", "max-train"):
        value = getattr(args, flag.replace("-", "_"))
        check(flag, value is None or value >= 1, "at least 1")
    check("ema", 0 < args.ema <= 1, "above 0 and at most 1")
    check("std-weight", 0 <= args.std_weight < np.inf, "a number, 0 or more")
    check("lr", 0 < args.lr < np.inf, "a number above 0")
    check("clip", 0 < args.clip < np.inf, "a number above 0")
    check("max-length", 3 <= args.max_length < 2**15, "from 3 to 32767")
    check("seed", 0 <= args.seed < 2**63, "from 0 to 2**63 - 1")
    if args.method == "full":
        args.keep, args.offset, args.draw = 1.0, 0.0, False
    check("full-epochs", args.full_epochs >= (args.method != "random"), "at least 1 (random: 0)")
    check("full-end", args.full_end >= 0, "at least 0")
    check("class-floor", args.class_floor >= 0, "at least 0")
    pruned = args.epochs - args.full_end - args.full_epochs * (args.selection == "dynamic")
    check("full-epochs", args.keep == 1 or pruned > 0, "lower, or --full-end, or nothing is ever pruned")
    check("rescore", args.rescore == "none" or args.method not in WATCHED, "none: it is known from training alone")
    check("rescore", args.rescore == "all" or args.method not in ("grand", "random"), "all")
    ruled = args.selection == "static" or args.offset or args.stratify or args.class_floor
    check("method", args.method != "infobatch" or not ruled, "another one for --selection static, --offset, --stratify "
          "or --class-floor: it has its own rule")
    check("method", not args.draw or args.method in SCORES, f"{' or '.join(SCORES)} for --draw")
    check("offset", not (args.draw and args.offset), "0 with --draw, where all have a chance")
    check("offset", 0 <= args.offset <= 1 - args.keep + 1e-9, f"at least 0 and at most 1 - keep = {1 - args.keep:g}")
    args.device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device).cpu()  # "meta" has no values to bring back
    except Exception as error:  # RuntimeError, AssertionError and others, by backend
        p.error(f"--device {args.device}: not to be had here: {str(error).splitlines()[0]}")
    args.precision = args.precision if args.precision != "auto" else "bf16" if report.has_bf16(args.device) else "fp32"
    return args


def run(args, start=None):
    """Load, train, evaluate, save, record. start: perf_counter() from which loading counts (now). Returns the row that
    was appended to results.jsonl."""
    clock = report.Clock(args.device)
    clock.seconds["load"] = time.perf_counter() - start if start else 0.0
    with clock("load"):
        resumed, done = report.reopen(args)
        if done:
            print(f"{done['folder']}/ is finished: nothing is left to do")
            return done
        tokenizer = load_tokenizer(args.model)
        data = load(args.dataset, tokenizer, args.data_dir, args.max_length, args.max_train)
        size = kept_size(len(data.train), args.keep)
        if size < args.batch_size and args.method != "infobatch":
            raise RunError(f"--keep {args.keep:g}: that is {size} of {len(data.train)} train examples, less than one "
                           f"batch of {args.batch_size}; take more examples, or lower --batch-size")
        model = NLUModel.build(args.model, tokenizer, data, args.seed)
        limit_vocabulary(model, data)
        report.check_space(args.folder or args.out, model.parameters())
        choose_products(args.precision, args.device)
        model.to(args.device)
        data.to(args.device)
        folder, facts, _lock = resumed or report.new_folder(args)  # locked until this function ends

    schedule = Schedule(args.epochs, args.full_epochs, args.cycle, args.keep, args.full_end,
                        args.selection == "static")
    log = train(model, data, schedule, args, clock, folder)
    row = report.recorded(folder)
    if not row:  # else the run was killed between this and the next line
        with clock("evaluate"):
            results = {name: evaluate(data, split, *predictions(model, split))
                       for name, split in data.evaluation.items()}  # fmt: skip
        row = {**facts, **results, **report.totals(data, schedule, clock, log)}
        report.append_line(folder.parent / "results.jsonl", row)  # before the model, which may not fit on the disk
    if not args.no_model:
        model.save(folder / "model.part")
        report.publish(folder / "model.part", folder / "model")
    report.remove_checkpoints(folder)
    if rank() == 0:  # the folders of other processes hold no more than they have done since a run was resumed
        print("\n" + report.summary(row))
    return row


# PyTorch's allocator says it; oneDNN that lacks memory says only what it could not do.
NO_MEMORY = ("allocate memory", "could not create a primitive", "could not execute a primitive", "bad_alloc")


def main(argv=None, start=None):
    """Exit status: 0 done, 2 bad input or a run that cannot go on, 130 interrupted, 143 terminated."""
    args, status, hint = None, 2, True
    try:
        args = parse(argv)
        with processes(args):
            run(args, start)
        return 0
    except (DataError, SelectionError, RunError) as error:
        message, hint = f"error: {error}", False  # the same again would end in the same
    except (ModelError, OSError) as error:  # a full disk, say
        message = f"error: {error}"
    except KeyboardInterrupt as error:
        message, status = "interrupted", 128 + (error.args or (signal.SIGINT,))[0]
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in NO_MEMORY):
            message = (f"error: out of memory; lower --batch-size {args.batch_size} or --max-length {args.max_length} "
                       f"({one_line(error)})")
        elif lost_process(error):
            message = f"error: lost another process of this run ({str(error).splitlines()[0]})"
        else:
            raise
    print(f"train.py: {message}{report.going_on(args) if hint else ''}", file=sys.stderr)
    return status


def terminated(number, _):
    """SIGTERM and Ctrl-C end a run alike."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal that cannot show τ
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGINT, terminated)
    sys.exit(main(start=START))
