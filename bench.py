"""Measure the engine: training steps and scoring passes against the textbook loop, by turns, in one process.

    python bench.py --dataset snips

The textbook loop shuffles, pads each batch to its longest sample, and uses transformers' model under autocast,
clip_grad_norm_ and AdamW. It scores in dataset order. Rates are medians over rounds in which all variants take turns.
"""

import argparse
import json
import statistics
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch

from data import DEFAULT_MODEL, DataError, ModelError, batches, load, load_tokenizer, sorted_batches
from engine import FlatAdamW, has_bf16, limit_vocabulary, set_matmul_backend, transformers_forward
from models import build_model, infer, losses
from runs import Clock, environment
from scoring import el2n


def textbook(model, split, args, precision):
    """Return endless generators that train, or score, a batch at every next() and yield its number of samples."""
    model.run_encoder = transformers_forward
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0)
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, enabled=precision == "bf16")

    def training():
        for indices in fixed_batches(np.random.permutation(len(split)), args.batch_size):
            model.train()
            batch = split.batch(indices)
            with autocast():
                loss = losses(model(batch), batch).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            yield len(indices)

    def scoring():
        for indices in fixed_batches(np.arange(len(split)), args.batch_size):
            model.eval()
            batch = split.batch(indices)
            with torch.no_grad(), autocast():
                el2n(model(batch), batch)
            yield len(indices)

    return endless(training), endless(scoring)


def engine(model, split, args, precision):
    """Return the same two generators for this engine."""
    optimizer, rng = FlatAdamW(model, precision, clip=1.0), np.random.default_rng(0)

    def training():
        for indices in batches(split.lengths, np.arange(len(split)), args.batch_size, rng):
            model.train()
            batch = split.batch(indices)
            losses(model(batch), batch).mean().backward()
            optimizer.step(1e-4)
            yield len(indices)

    def scoring():
        batch_list = sorted_batches(split)
        part = [batch_list[i] for i in rng.permutation(len(batch_list))[:64]]  # a whole pass would be a long turn
        for batch, outputs in infer(model, split, part):
            el2n(outputs, batch)
        yield sum(map(len, part))

    return endless(training), endless(scoring)


def fixed_batches(order, size):
    """Cut an array of indices into batches of at most `size`."""
    return np.split(order, range(size, len(order), size))


def endless(generator):
    """Start a generator function again and again."""
    while True:
        yield from generator()


def alternate(variants, args):
    """Return samples a second of each variant, {name: median over rounds}. The first round warms up, uncounted.

    variants: {name: (function that chooses the matmul backend, generator)}.
    """
    rates, now = {name: [] for name in variants}, Clock(args.device).now
    for counted in [False] + [True] * args.rounds:
        for name, (choose_backend, work) in variants.items():
            choose_backend()
            done, start = 0, now()
            while time.perf_counter() - start < args.seconds:
                done += next(work)
            if counted:
                rates[name].append(done / (now() - start))
    return {name: statistics.median(values) for name, values in rates.items()}


def padding(lengths, batch_list):
    """Return the share of computed tokens that are padding."""
    return 1 - sum(lengths[b].sum() for b in batch_list) / sum(len(b) * lengths[b].max() for b in batch_list)


def measure(args):
    """Return all figures, {name: value}. Rates are samples a second; shares are from 0 to 1."""
    tokenizer = load_tokenizer(args.model)
    data = load(args.dataset, tokenizer, args.data_dir, max_train=args.max_train)
    split = data.train = data.train.to(args.device)
    variants = {}
    for precision in ["fp32", "bf16"] if has_bf16(args.device) else ["fp32"]:
        models = [build_model(args.model, tokenizer, data, seed=0, precision=precision) for _ in range(2)]
        limit_vocabulary(models[1], data)
        plain = textbook(models[0].to(args.device), split, args, precision)
        ours = engine(models[1].to(args.device), split, args, precision)
        for work, i in (("training", 0), ("scoring", 1)):
            variants[f"textbook {precision} {work}"] = partial(torch.set_float32_matmul_precision, "highest"), plain[i]
            variants[f"engine {precision} {work}"] = partial(set_matmul_backend, precision, args.device), ours[i]
    everything, rng = np.arange(len(split)), np.random.default_rng(0)
    return {
        "dataset": args.dataset, "model": Path(args.model).name, "batch_size": args.batch_size,
        "environment": environment(args.device), "rates": alternate(variants, args), "padding": {
            "textbook": padding(split.lengths, fixed_batches(rng.permutation(everything), args.batch_size)),
            "engine": padding(split.lengths, batches(split.lengths, everything, args.batch_size, rng))},
    }  # fmt: skip


def table(result):
    """Return the figures of `measure` as aligned text."""
    rates, here = result["rates"], result["environment"]
    lines = [f"{'samples a second':<18} {'textbook':>10} {'engine':>10} {'ratio':>7}"]
    for name in [name.removeprefix("engine ") for name in rates if name.startswith("engine")]:
        plain, ours = rates[f"textbook {name}"], rates[f"engine {name}"]
        lines.append(f"{name:<18} {plain:>10.0f} {ours:>10.0f} {ours / plain:>7.2f}")
    lines.append(f"{'padding':<18} {result['padding']['textbook']:>10.1%} {result['padding']['engine']:>10.1%}")
    lines.append(f"{result['dataset']}, {result['model']}, batch size {result['batch_size']}; {here['cpu']}, "
                 f"{here['threads']} threads; {here['device']}; torch {here['torch']}")
    return "\n".join(lines)


def main(argv=None):
    """Measure, print and save. Returns the exit status."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="demo", help="as in train.py")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--model", default=DEFAULT_MODEL, help="as in train.py")
    p.add_argument("--max-train", type=int, help="as in train.py")
    p.add_argument("--batch-size", type=int, default=32, help="samples in a training step (default: 32)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each variant (default: 7)")
    p.add_argument("--seconds", type=float, default=3.0, help="shortest length of a turn (default: 3)")
    p.add_argument("--json", metavar="FILE", help="write all figures there, too")
    args = p.parse_args(argv)
    try:
        result = measure(args)
    except (DataError, ModelError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
