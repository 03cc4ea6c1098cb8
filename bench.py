"""Measure the engine: training steps and scoring passes against the textbook loop, in turn, in one process.

    python bench.py --dataset snips

The textbook loop shuffles, pads each batch to its longest sample, and uses transformers' model under autocast,
clip_grad_norm_ and AdamW. Rates are medians over rounds in which all variants take turns.
"""

import argparse
import statistics
import sys
import time
from functools import partial
from itertools import cycle

import numpy as np
import torch

from data import DEFAULT_MODEL, batches, load, load_tokenizer, sorted_batches
from engine import FlatAdamW, has_bf16, limit_vocabulary, set_matmul_backend, transformers_forward
from errors import Parser, UserError, leave
from flags import count, device, positive
from models import build_model, infer, losses
from runs import Clock, environment
from scoring import el2n


def textbook(model, split, batch_list, precision):
    """Return {phase: function that does a batch and returns its number of samples} of the textbook loop."""
    model.run_encoder = transformers_forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    autocast = partial(torch.autocast, split.tokens.device.type, torch.bfloat16, enabled=precision == "bf16")
    batch_list = cycle(batch_list)

    def train():
        batch = split.batch(next(batch_list))
        model.train()
        with autocast():
            loss = losses(model(batch), batch).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return len(batch.indices)

    def score():
        batch = split.batch(next(batch_list))
        model.eval()
        with torch.no_grad(), autocast():
            el2n(model(batch), batch)
        return len(batch.indices)

    return {"training": train, "scoring": score}


def engine(model, split, batch_list, precision):
    """Return the same two functions of this engine."""
    optimizer, rng = FlatAdamW(model, precision, clip=1.0), np.random.default_rng(0)
    batch_list, whole_pass = cycle(batch_list), sorted_batches(split)

    def train():
        batch = split.batch(next(batch_list))
        model.train()
        losses(model(batch), batch).mean().backward()
        optimizer.step(1e-4)
        return len(batch.indices)

    def score():
        part = [whole_pass[i] for i in rng.permutation(len(whole_pass))[:64]]  # a whole pass would be a long turn
        for batch, outputs in infer(model, split, part):
            el2n(outputs, batch)
        return sum(map(len, part))

    return {"training": train, "scoring": score}


def alternate(variants, args):
    """Return samples a second of each variant, {name: median over rounds}. The first round warms up, uncounted.

    variants: {name: (function that chooses the matmul backend, function that does some samples)}.
    """
    rates, now = {name: [] for name in variants}, Clock(args.device).now
    for _ in range(args.rounds + 1):
        for name, (choose_backend, work) in variants.items():
            choose_backend()
            done, start = 0, now()
            while time.perf_counter() - start < args.seconds:
                done += work()
            rates[name].append(done / (now() - start))
    return {name: statistics.median(values[1:]) for name, values in rates.items()}


def padding(lengths, batch_list):
    """Return the share of computed tokens that are padding."""
    return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batch_list)


def measure(args):
    """Return samples a second of each variant, and the share of padding in the batches of each loop, as two dicts."""
    tokenizer, rng = load_tokenizer(args.model), np.random.default_rng(0)
    data = load(args.dataset, tokenizer, args.data_dir, max_train=args.max_train)
    split = data.train.to(args.device)  # a model is tried out on the CPU, with data.train
    everything = np.arange(len(split))
    plain_batches = np.split(rng.permutation(everything), range(args.batch_size, len(split), args.batch_size))
    our_batches = batches(split.lengths, everything, args.batch_size, rng)
    variants = {}
    for precision in ["fp32", "bf16"] if has_bf16(args.device) else ["fp32"]:
        models = [build_model(args.model, tokenizer, data, seed=0, precision=precision) for _ in range(2)]
        limit_vocabulary(models[1], data)
        plain = textbook(models[0].to(args.device), split, plain_batches, precision)
        ours = engine(models[1].to(args.device), split, our_batches, precision)
        for phase in ("training", "scoring"):
            highest = partial(torch.set_float32_matmul_precision, "highest")
            variants[f"textbook {precision} {phase}"] = highest, plain[phase]
            variants[f"engine {precision} {phase}"] = partial(set_matmul_backend, precision, args.device), ours[phase]
    shares = {"textbook": padding(split.lengths, plain_batches), "engine": padding(split.lengths, our_batches)}
    return alternate(variants, args), shares


def table(args, rates, shares):
    """Return what `measure` returned as aligned text, with what a reader needs to judge it."""
    here = environment(args.device)
    lines = [f"{'samples a second':<18} {'textbook':>10} {'engine':>10} {'ratio':>7}"]
    for name in [name.removeprefix("engine ") for name in rates if name.startswith("engine")]:
        plain, ours = rates[f"textbook {name}"], rates[f"engine {name}"]
        lines.append(f"{name:<18} {plain:>10.0f} {ours:>10.0f} {ours / plain:>7.2f}")
    lines.append(f"{'padding':<18} {shares['textbook']:>10.1%} {shares['engine']:>10.1%}")
    lines.append(f"{args.dataset}, {args.model}, batch size {args.batch_size}; {here['cpu']}, {here['threads']} "
                 f"threads; {here['device']}; torch {here['torch']}")
    return "\n".join(lines)


def main(argv=None):
    """Measure and print. Returns the exit status."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="demo", help="as in train.py")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--device", type=device, default="auto", help="as in train.py")
    p.add_argument("--model", default=DEFAULT_MODEL, help="as in train.py")
    p.add_argument("--max-train", type=count, help="as in train.py")
    p.add_argument("--batch-size", type=count, default=32, help="samples in a training step (default: 32)")
    p.add_argument("--rounds", type=count, default=7, help="turns of each variant (default: 7)")
    p.add_argument("--seconds", type=positive, default=3.0, help="least seconds of a turn (default: 3)")
    args = p.parse_args(argv)
    try:
        print(table(args, *measure(args)), flush=True)
    except (UserError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bench.py: interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    leave(main())
