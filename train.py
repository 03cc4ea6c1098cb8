"""Fine-tune a language-understanding model on a pruned dataset (Attendu and Corbeil, "NLU on Data Diets", 2023).

    python train.py --dataset snips --keep 0.5

Train τ epochs on everything. Every T epochs, score all samples, and keep the fraction k with the highest scores. Train
on them until the next selection. With --sample, draw the fraction, with chances in proportion to the scores.
"""

import time

START = time.perf_counter()  # before the slow imports, so that they count as loading

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends the slow imports without a traceback

import numpy as np
import torch

import flags
from data import batches, load, load_tokenizer
from distributed import lost_process, process_group, rank, shard, world_size
from engine import FlatAdamW, limit_vocabulary, set_matmul_backend
from errors import UserError, expect, leave, one_line
from metrics import evaluate
from models import build_model, losses, predictions
from pruning import Smoother, kept_size, make_plan, select
from runs import Clock, Run, summary
from scoring import Scorer


def train(model, optimizer, data, plan, args, run, state=None):
    """Fine-tune `model` in place. plan: from `make_plan`. state: from a checkpoint, or None."""
    clock, n, lengths = run.clock, len(data.train), data.train.lengths
    everything, ones = np.arange(n), torch.ones(n, device=args.device)
    scorer, smooth = Scorer(data.train, args.method, args.rescore), Smoother(args.ema or 1, args.std_weight or 0)
    static = args.selection == "static"
    pretrained = {"master": optimizer.master.clone()} if static else None  # the weights, without Adam's averages
    if state:
        kept, weights = state["kept"].numpy(), state["weights"].to(args.device)
        optimizer.load_state_dict(state["optimizer"])
        scorer.load_state_dict(state["scorer"])
        smooth.state = state["smoother"]

    for epoch in range(len(run.log), len(plan)):  # the log has the epochs before a resume
        rng = seed_epoch(args.seed, epoch)

        if plan[epoch] == "select":
            with clock("score"):
                scores = scorer(model, rng)
            with clock("select"):
                importance = smooth(scores)
                kept, weights = select(importance, args, rng)
                weights = torch.as_tensor(weights, device=args.device)
                run.save_selection(scores, importance, kept)
                if static:
                    optimizer.load_state_dict(pretrained)
        elif plan[epoch] == "full":
            kept, weights = everything, ones

        with clock("train"):
            model.train()
            batch_list = batches(lengths, kept, args.batch_size, rng)
            for i, indices in enumerate(run.progress(batch_list, kept)):
                batch = data.train.batch(shard(indices))  # this process's part of the batch
                outputs = model(batch)
                loss = losses(outputs, batch)
                (loss @ weights[batch.indices] / len(indices)).backward()
                scorer.record(outputs, batch)
                optimizer.step(learning_rate(args, epoch + i / len(batch_list)))  # and clear the gradients
                run.loss += loss.detach().sum()
            scorer.sync()

        with clock("evaluate"):
            dev = evaluate(data, "dev", *predictions(model, data.evaluation["dev"]))
        run.end_epoch(kept, dev, {"kept": torch.from_numpy(kept), "weights": weights, "scorer": scorer.state_dict(),
                                  "smoother": smooth.state, "optimizer": optimizer.state_dict()})  # fmt: skip
    optimizer.release()  # so the last metrics are of the fp32 weights, which the run saves


def seed_epoch(seed, epoch):
    """Seed PyTorch for an epoch, and return a numpy generator for it. No epoch depends on an earlier one's draws."""
    rng = np.random.default_rng([seed, epoch])
    torch.manual_seed(int(rng.integers(2**62)) + rank())
    return rng


def learning_rate(args, epoch):
    """Return the learning rate: falling linearly to 0, or constant. epoch: whole epochs plus the share of this one.

    A static run is two trainings: the one before the selection, and the one after it.
    """
    first = args.full_epochs if args.selection == "static" else 0
    progress = epoch / first if epoch < first else (epoch - first) / args.epochs
    return args.lr * (1 - progress) if args.schedule == "linear" else args.lr


def main(argv=None, start=None):
    """Load, train, evaluate, save. start: perf_counter() from which loading counts; by default from now.

    Returns the exit status: 0 done, 2 bad input or a run that cannot go on, 130 interrupted, 143 terminated.
    """
    args, status, hint = None, 2, ""
    try:
        args = flags.parse(argv, __doc__)
        with process_group(args):
            fine_tune(args, Clock(args.device), start)
        return 0
    except UserError as error:
        message = f"error: {error}"
    except OSError as error:  # a full disk, for example
        message, hint = f"error: {error}", HINT
    except KeyboardInterrupt as error:
        message, status, hint = "interrupted", 128 + (error.args or (signal.SIGINT,))[0], HINT
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(sign in str(error) for sign in NO_MEMORY):
            message = (f"error: out of memory; lower --batch-size {args.batch_size} or --max-length {args.max_length} "
                       f"({one_line(error)})")
        elif lost_process(error):
            message, hint = f"error: lost another process of this run ({one_line(error)})", HINT
        else:
            raise
    print(f"train.py: {message}{hint}", file=sys.stderr)
    return status


HINT = "; to go on, run the same command with --resume"
# PyTorch's allocators name the lack of memory. oneDNN only says that it could not do something.
NO_MEMORY = ("allocate memory", "could not create a primitive", "could not execute a primitive", "bad_alloc")


def fine_tune(args, clock, start):
    """Make one run from its flags: load, train, evaluate, save."""
    clock.seconds["load"] = time.perf_counter() - start if start else 0.0
    with clock("load"):
        run = Run(args, clock)
        if run.finished:
            print(f"{run.folder}/ is finished; remove it to train again, for example on changed data", flush=True)
            return
        tokenizer = load_tokenizer(args.model)
        data = load(args.dataset, tokenizer, args.data_dir, args.max_length, args.max_train, args.tune)
        check_sizes(args, len(data.train))
        model = build_model(args.model, tokenizer, data, args.seed, args.precision)
        limit_vocabulary(model, data)
        set_matmul_backend(args.precision, args.device)
        model.to(args.device)
        data.to(args.device)
        optimizer = FlatAdamW(model, args.precision, args.clip)
        plan = make_plan(args.epochs, args.full_epochs, args.cycle, args.full_end, args.selection == "static")
        state = run.begin(data, optimizer.master, len(plan))

    train(model, optimizer, data, plan, args, run, state)
    with clock("evaluate"):
        metrics = {name: evaluate(data, name, *predictions(model, split)) for name, split in data.evaluation.items()}
    row = run.finish(metrics, model)
    if rank() == 0:  # other processes have no folder to summarise
        print("\n" + summary(row, run), flush=True)


def check_sizes(args, n):
    """Raise UserError where a batch or a selection of n train samples would be too small."""
    size, least = kept_size(n, args.keep or 1), 2 * world_size()
    expect(least == 2 or min(args.batch_size, n) >= least, f"--batch-size {args.batch_size}",
           f"{world_size()} processes need at least {least} samples in a batch and in train")  # fmt: skip
    expect(size >= args.batch_size or args.method in ("full", "infobatch"), f"--keep {args.keep}", f"keeps {size} of "
           f"{n} samples, less than one batch of {args.batch_size}; raise --keep or lower --batch-size")


def terminated(number, _):
    """End a run by SIGTERM as by Ctrl-C."""
    raise KeyboardInterrupt(number)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # for a terminal that cannot show τ
    signal.signal(signal.SIGTERM, terminated)
    signal.signal(signal.SIGINT, terminated)
    leave(main(start=START))
