"""How fast is the engine? Our training step and scoring pass against the textbook's, in one run.

    python bench.py --dataset snips --data-dir …

Every figure is a median over rounds in which all variants take turns, so that a noisy machine is noisy for all of them.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import report
import train
from data import DEFAULT_MODEL, DataError, ModelError, Split, batches, load, load_tokenizer, sorted_batches
from models import FlatAdamW, NLUModel, hugging_face, infer, limit_vocabulary, losses
from pruning import Schedule, Smoother, select
from scoring import SCORES, score


def textbook(args, tokenizer, data):
    """Generators that train one batch, and score one batch, at every next(): as one would write it without a thought
    for speed. The model is transformers', batches come from one shuffle and are padded to their longest example."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed).to(args.device)
    model.encode = hugging_face
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    n, size = len(data.train), args.batch_size

    def training():
        while True:
            order = np.random.permutation(n)
            for start in range(0, n - size + 1, size):
                model.train()
                batch = data.train.batch(order[start : start + size])
                loss = losses(model(batch), batch).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                yield size

    def scoring():
        while True:
            for start in range(0, n - size + 1, size):
                model.eval()
                batch = data.train.batch(np.arange(start, start + size))
                with torch.no_grad():
                    SCORES["el2n"](model(batch), batch)
                yield size

    return training(), scoring()


def engine(args, tokenizer, data, precision):
    """The same of this engine: the step of train.py's loop and a batch of scoring.py's pass. Returns the generators,
    the model, and a clock with the parts of a step."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed)
    limit_vocabulary(model, data)
    optimizer = FlatAdamW(model.to(args.device), precision, args.clip)
    clock = report.Clock(args.device)
    rng, everything = np.random.default_rng(args.seed), np.arange(len(data.train))

    def training():
        while True:
            for indices in batches(data.train.lengths, everything, args.batch_size, rng):
                model.train()
                with clock("batch"):
                    batch = data.train.batch(indices)
                with clock("forward"):
                    loss = losses(model(batch), batch).mean()
                with clock("backward"):
                    loss.backward()
                with clock("optimizer"):
                    optimizer.step(args.lr)
                yield len(indices)

    def scoring():
        while True:
            cut = sorted_batches(data.train)
            for i in rng.permutation(len(cut)):
                for batch, outputs in infer(model, data.train, [cut[i]]):
                    SCORES["el2n"](outputs, batch)
                yield len(cut[i])

    return training(), scoring(), model, clock


def alternate(variants, rounds, seconds):
    """Examples per second of each variant: the median over rounds, in each of which it has had its turn.

    variants: {name: generator that yields how many examples it has just done}. The first round warms up, uncounted.
    """
    rates = {name: [] for name in variants}
    for counted in [False] + [True] * rounds:
        for name, work in variants.items():
            done, start = 0, time.perf_counter()
            while (spent := time.perf_counter() - start) < seconds:
                done += next(work)
            if counted:
                rates[name].append(done / spent)
    return {name: statistics.median(values) for name, values in rates.items()}


def timed(work, repetitions=5):
    """Median seconds of work()."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def padding(lengths, cut):
    """Share of computed tokens that are padding, in a list of batches."""
    return 1 - sum(lengths[batch].sum() for batch in cut) / sum(len(batch) * lengths[batch].max() for batch in cut)


def same_losses(args, tokenizer, data, steps=20):
    """Largest relative difference between the losses of the textbook's step and ours in fp32, on the same batches.
    Without dropout, whose random numbers differ."""
    curves = []
    for ours in (False, True):
        model = NLUModel.build(args.model, tokenizer, data, args.seed)
        if ours:
            limit_vocabulary(model, data)
            optimizer = FlatAdamW(model, "fp32", args.clip)
        else:
            model.encode = hugging_face
            optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
        model.eval()
        curve = []
        for indices in batches(data.train.lengths, np.arange(len(data.train)), 32, np.random.default_rng(0))[:steps]:
            batch = data.train.batch(indices)
            loss = losses(model(batch), batch).mean()
            loss.backward()
            if ours:
                optimizer.step(args.lr)
            else:
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
            curve.append(loss.item())
        curves.append(np.array(curve))
    return float(np.max(np.abs(curves[1] / curves[0] - 1)))


def same_scores(model, split):
    """Differences of EL2N from the textbook's (transformers' encoder, fp32, batches of 32 in dataset order), for the
    weights of `model`, over a whole split: {"fp32": …, "bf16": …}, each an array (N,)."""
    model = copy.deepcopy(model).float()
    model.encode, encode = hugging_face, model.encode
    plain = np.split(np.arange(len(split)), range(32, len(split), 32))
    wanted = torch.cat([SCORES["el2n"](outputs, batch) for batch, outputs in infer(model, split, plain)]).cpu().numpy()
    model.encode = encode
    fp32 = score(model, split, "el2n", None)
    return {"fp32": np.abs(fp32 - wanted), "bf16": np.abs(score(model.bfloat16(), split, "el2n", None) - wanted)}


def tile(split, n):
    """A split of n examples, which are those of `split` over and over."""
    times = -(-n // len(split))

    def repeated(flat, offsets):
        return flat.repeat(times)[: repeated_offsets(offsets)[-1]]

    def repeated_offsets(offsets):
        return torch.cat([torch.zeros(1, dtype=torch.int64), offsets.diff().repeat(times).cumsum(0)])[: n + 1]

    words = {} if split.word_tags is None else {
        "tags": repeated(split.tags, split.offsets), "word_tags": repeated(split.word_tags, split.word_offsets),
        "word_starts": repeated(split.word_starts, split.word_offsets),
        "word_offsets": repeated_offsets(split.word_offsets)}  # fmt: skip
    types = None if split.types is None else repeated(split.types, split.offsets)
    return Split(repeated(split.tokens, split.offsets), repeated_offsets(split.offsets),
                 split.labels.repeat(times)[:n], split.pad, types=types, **words)


def bytes_per_example(split, keep):
    """Memory that grows with the data: the arrays of a split, and the most that one round of smoothing and selecting
    takes beside them."""
    arrays = [value for value in vars(split).values() if isinstance(value, (torch.Tensor, np.ndarray))]
    scores = np.random.default_rng(0).random(len(split), dtype=np.float32)
    tracemalloc.start()
    smooth = Smoother(0.8, 1.0)
    for _ in range(2):
        select(smooth(scores), keep)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return (sum(array.nbytes for array in arrays) + peak) / len(split)


def measure(args):
    """All figures, as {name: value}; rates in examples a second, times in seconds, shares from 0 to 1."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.model)
    data = load(args.dataset, tokenizer, args.data_dir, max_train=args.max_train)
    data.train = data.train.to(args.device)
    n, everything, lengths = len(data.train), np.arange(len(data.train)), data.train.lengths
    result = {"dataset": args.dataset, "examples": n, "batch_size": args.batch_size,
              "environment": report.environment(args.device)}  # fmt: skip

    plain_training, plain_scoring = textbook(args, tokenizer, data)
    variants = {"textbook training": plain_training, "textbook scoring": plain_scoring}
    engines = {precision: engine(args, tokenizer, data, precision) for precision in args.precisions}
    next(engines[args.precisions[0]][0])
    result["start_up"] = time.perf_counter() - started  # without the imports
    for precision, (training, scoring, *_) in engines.items():
        variants |= {f"{precision} training": training, f"{precision} scoring": scoring}
    result["rates"] = alternate(variants, args.rounds, args.seconds)
    for precision, (*_, clock) in engines.items():
        steps = sum(clock.seconds.values())
        result[f"parts of a step, {precision}"] = {part: s / steps for part, s in clock.seconds.items()}

    shuffled = np.random.default_rng(0).permutation(n)
    result["padding"] = {
        "textbook": padding(lengths, np.split(shuffled, range(args.batch_size, n, args.batch_size))),
        "training": padding(lengths, batches(lengths, everything, args.batch_size, np.random.default_rng(0))),
        "scoring": padding(lengths, sorted_batches(data.train)),
    }
    result["loss, largest relative difference in fp32"] = same_losses(args, tokenizer, data)
    for precision, difference in same_scores(engines["fp32"][2], data.train).items():
        result[f"score, difference in {precision}"] = {
            "largest": float(difference.max()), "99 %": float(np.quantile(difference, 0.99)),
            "median": float(np.median(difference))}  # fmt: skip

    # What pruning costs, from the rates above and what EL2N would keep now.
    best = args.precisions[-1]
    scores = score(engines[best][2], data.train, "el2n", None)
    seconds = n / result["rates"][f"{best} scoring"] + timed(lambda: select(scores, 0.5))
    full, tokens = n / result["rates"][f"{best} training"], lengths[select(scores, 0.5)].sum() / lengths.sum()
    for epochs, cycle in ((10, 2), (40, 4)):
        schedule = Schedule(epochs, cycle, cycle, 0.5)
        total = full * (cycle + tokens * (epochs - cycle)) + seconds * schedule.rounds
        result[f"overhead of pruning, T = {cycle}, {epochs} epochs"] = seconds * schedule.rounds / total

    # Growth: the same examples many times over.
    big = replace(data, train=tile(data.train, args.grown))
    training, scoring, *_ = engine(args, tokenizer, big, best)
    grown = alternate({"small training": engines[best][0], "training": training,
                       "small scoring": engines[best][1], "scoring": scoring}, args.rounds, args.seconds)  # fmt: skip
    random = np.random.default_rng(0).random(args.grown, dtype=np.float32)
    result["growth"] = {
        "examples": args.grown, "training": grown["training"] / grown["small training"],
        "scoring": grown["scoring"] / grown["small scoring"],
        "select": timed(lambda: select(random, 0.5)),
        "cut into batches": timed(
            lambda: batches(big.train.lengths, np.arange(args.grown), args.batch_size, np.random.default_rng(0))),
        "bytes an example": bytes_per_example(big.train, 0.5),
    }  # fmt: skip
    result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    return result


def table(result):
    """Markdown. result: of `measure`."""
    rates, growth = result["rates"], result["growth"]
    lines = ["| | training, examples/s | × textbook | scoring, examples/s | × textbook |", "|" + " --- |" * 5]
    for name in dict.fromkeys(variant.split()[0] for variant in rates):
        a, b = rates[f"{name} training"], rates[f"{name} scoring"]
        label = "textbook, fp32" if name == "textbook" else f"this engine, {name}"
        lines.append(f"| {label} | {a:.0f} | {a / rates['textbook training']:.2f} | {b:.0f} | "
                     f"{b / rates['textbook scoring']:.2f} |")
    lines += ["", "| | |", "| --- | --- |"]
    for name, value in result.items():
        if name.startswith("parts"):
            ms = 1000 * result["batch_size"] / rates[f"{name.split()[-1]} training"]
            lines.append(f"| {name} | {', '.join(f'{part} {share * ms:.1f}' for part, share in value.items())} ms |")
        elif name.startswith("score,"):
            lines.append(f"| {name} | {', '.join(f'{which} {x:.1g}' for which, x in value.items())} |")
        elif name.startswith("loss"):
            lines.append(f"| {name} | {value:.1g} |")
        elif name.startswith("overhead"):
            lines.append(f"| {name}, of the time | {value:.1%} |")
    lines += [
        f"| padding | {', '.join(f'{name} {value:.1%}' for name, value in result['padding'].items())} |",
        f"| rate at {growth['examples']:,} examples, against {result['examples']:,} | "
        f"training {growth['training']:.2f}, scoring {growth['scoring']:.2f} |",
        f"| there: selection, cutting into batches | {1000 * growth['select']:.0f} ms, "
        f"{1000 * growth['cut into batches']:.0f} ms |",
        f"| memory for each example | {growth['bytes an example']:.0f} bytes |",
        f"| start-up without imports, peak memory of this benchmark | {result['start_up']:.1f} s, "
        f"{result['peak_memory_mib']:.0f} MiB |",
        "", f"{result['dataset']}, batch {result['batch_size']}, on {report.machine(result)}, "
        f"{result['environment']['threads']} threads, torch {result['environment']['torch']}.",
    ]  # fmt: skip
    return "\n".join(lines)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dataset", default="demo", help="(demo)")
    p.add_argument("--data-dir", help="as in train.py")
    p.add_argument("--device", default="auto", help="as in train.py")
    p.add_argument("--model", default=DEFAULT_MODEL, help="as in train.py")
    p.add_argument("--max-train", type=int, help="as in train.py")
    p.add_argument("--rounds", type=int, default=7, help="turns of each variant (7)")
    p.add_argument("--seconds", type=float, default=3.0, help="length of a turn (3)")
    p.add_argument("--grown", type=int, default=400_000, help="size of the grown dataset (400000)")
    p.add_argument("--json", metavar="FILE", help="write all figures there, too")
    flags = p.parse_args(argv)
    known = ["--dataset", flags.dataset, "--device", flags.device, "--model", flags.model]
    args = train.parse(known + (["--data-dir", flags.data_dir] if flags.data_dir else []))
    for name in ("rounds", "seconds", "grown", "max_train"):
        setattr(args, name, getattr(flags, name))
    args.precisions = ["fp32", "bf16"] if report.has_bf16(args.device) else ["fp32"]
    try:
        result = measure(args)
    except (DataError, ModelError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    print(table(result))
    if flags.json:
        Path(flags.json).write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
