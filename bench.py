"""How fast is the engine? Our training step and scoring pass against the textbook's, in one run.

    python bench.py --dataset snips --data-dir …
    python bench.py --encode                         reading and encoding a set as large as MNLI, instead

Rates are medians over rounds in which all variants take turns, so that a noisy machine is noisy for all of them; the
parts of a step are means over all turns; everything else is computed, or timed by itself.
"""

import argparse
import copy
import json
import resource
import statistics
import sys
import tempfile
import time
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

import report
import train
from data import DATASETS, DEFAULT_MODEL, DataError, ModelError, batches, demo, load, load_tokenizer, sorted_batches
from models import FlatAdamW, NLUModel, choose_products, hugging_face, infer, limit_vocabulary, losses
from pruning import Schedule, Smoother, select
from scoring import SCORES, Scorer, score


def textbook_step(model, optimizer, batch, clip, autocast=nullcontext):
    """One step of training as one would write it without a thought for speed. Returns the loss."""
    with autocast():
        loss = losses(model(batch), batch).mean()
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step()
    return loss


def as_it_comes():
    """Have products computed as PyTorch does by itself: `choose_products` is for the whole process."""
    torch.set_float32_matmul_precision("highest")


def under(products, work):
    """The generator `work`, with products() called before every next(): others have chosen differently meanwhile."""
    while True:
        products()
        yield next(work)


def textbook(args, tokenizer, data, precision, products=as_it_comes):
    """Generators that train one batch, and score one batch, at every next(). The model is transformers', under autocast
    in bf16; batches come from one shuffle, scores in dataset order, and are padded to their longest example."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed).to(args.device)
    model.run_encoder = hugging_face
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    n, size = len(data.train), args.batch_size

    def autocast():
        return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=precision == "bf16")

    def training():
        while True:
            order = np.random.permutation(n)
            for start in range(0, n, size):
                model.train()
                batch = data.train.batch(order[start : start + size])
                textbook_step(model, optimizer, batch, args.clip, autocast)
                yield len(batch.indices)

    def scoring():
        while True:
            for start in range(0, n, size):
                model.eval()
                batch = data.train.batch(np.arange(start, min(start + size, n)))
                with torch.no_grad(), autocast():
                    SCORES["el2n"](model(batch), batch)
                yield len(batch.indices)

    return under(products, training()), under(products, scoring())


def engine(args, tokenizer, data, precision):
    """The same of this engine, the step of train.py's loop and the passes of scoring.py; the model; and the clock of a
    step's parts. A next() scores up to 64 batches: a pass packs weights at its start."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed)
    limit_vocabulary(model, data)
    optimizer = FlatAdamW(model.to(args.device), precision, args.clip)
    rng, everything = np.random.default_rng(args.seed), np.arange(len(data.train))
    clock = report.Clock("cpu")  # for the parts of a step; a GPU would have to be waited for, which no step does

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
                clock.seconds["steps"] = clock.seconds.get("steps", 0) + 1
                yield len(indices)

    def scoring():
        while True:
            cut = sorted_batches(data.train)
            order = rng.permutation(len(cut))
            for start in range(0, len(cut), 64):  # a pass over a large set would be a long turn
                part = [cut[i] for i in order[start : start + 64]]
                for batch, outputs in infer(model, data.train, part):
                    SCORES["el2n"](outputs, batch)
                yield sum(map(len, part))

    products = partial(choose_products, precision, args.device)
    return under(products, training()), under(products, scoring()), model, clock


def alternate(variants, args):
    """Examples per second of each variant: the median over rounds, in each of which it has had its turn.

    variants: {name: generator that yields how many examples it has just done}. The first round warms up, uncounted.
    """
    rates, now = {name: [] for name in variants}, report.Clock(args.device).now
    for counted in [False] + [True] * args.rounds:
        for name, work in variants.items():
            done, start = 0, now()
            while time.perf_counter() - start < args.seconds:
                done += next(work)
            if counted:
                rates[name].append(done / (now() - start))
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


def loss_difference(args, tokenizer, data, steps=20):
    """Largest relative difference between the losses of the textbook's step and ours in fp32, on the same batches.
    Without dropout, whose random numbers differ."""
    plain, ours = (NLUModel.build(args.model, tokenizer, data, args.seed).eval() for _ in range(2))
    plain.run_encoder = hugging_face
    adam = torch.optim.AdamW(plain.to(args.device).parameters(), lr=args.lr, weight_decay=0.0)
    limit_vocabulary(ours, data)
    flat = FlatAdamW(ours.to(args.device), "fp32", args.clip)
    largest = 0.0
    for indices in batches(data.train.lengths, np.arange(len(data.train)), 32, np.random.default_rng(0))[:steps]:
        batch = data.train.batch(indices)
        as_it_comes()
        wanted = textbook_step(plain, adam, batch, args.clip).item()
        choose_products("fp32", args.device)
        loss = losses(ours(batch), batch).mean()
        loss.backward()
        flat.step(args.lr)
        largest = max(largest, abs(loss.item() / wanted - 1))
    return largest


def score_difference(model, split):
    """Differences of EL2N from the textbook's (transformers' encoder, fp32, batches of 32 in dataset order), for the
    weights of `model`, over a whole split; and which share of the kept half is another. Of the textbook under autocast,
    too: what rounding to bf16 costs in any case."""
    model = copy.deepcopy(model).float().eval()
    model.run_encoder, ours = hugging_face, model.run_encoder
    plain = np.split(np.arange(len(split)), range(32, len(split), 32))

    def textbook_scores():
        as_it_comes()
        with torch.inference_mode():
            return torch.cat([SCORES["el2n"](model(batch), batch) for batch in map(split.batch, plain)]).cpu().numpy()

    wanted = textbook_scores()
    with torch.autocast(split.tokens.device.type, torch.bfloat16):
        got = {"textbook bf16": textbook_scores()}
    model.run_encoder = ours
    choose_products("fp32", split.tokens.device)
    got |= {"fp32": score(model, split, "el2n").cpu().numpy(),
            "bf16": score(model.bfloat16(), split, "el2n").cpu().numpy()}
    return {
        precision: {
            "largest": float(np.abs(scores - wanted).max()), "99 %": float(np.quantile(np.abs(scores - wanted), 0.99)),
            "other kept": 1 - len(np.intersect1d(select(scores, 0.5), select(wanted, 0.5))) / round(len(split) / 2),
        }
        for precision, scores in got.items()
    }  # fmt: skip


def tile(split, n):
    """A split of n examples, which are those of `split` over and over."""
    times = -(-n // len(split))
    grown = {"labels": split.labels.repeat(times)[:n]}
    for bounds, names in (("offsets", ("tokens", "types", "tags")), ("word_offsets", ("word_tags", "word_starts"))):
        if (offsets := getattr(split, bounds)) is not None:
            grown[bounds] = torch.cat([offsets.new_zeros(1), offsets.diff().repeat(times).cumsum(0)])[: n + 1]
            for name in names:
                if (flat := getattr(split, name)) is not None:
                    grown[name] = flat.repeat(times)[: grown[bounds][-1]]
    return replace(split, **grown)


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


def selection_seconds(scores):
    """Seconds of all that a round does after scoring, in train.py's order: smoothing, selecting, writing the file."""
    with tempfile.TemporaryDirectory() as folder:
        smooth = Smoother(0.8, 1.0)
        smooth(scores)
        start = time.perf_counter()
        importance = smooth(scores)
        report.save_round(Path(folder), 1, scores, importance, select(importance, 0.5))
        return time.perf_counter() - start


def watch_seconds(model, split, batch_size):
    """Seconds that taking the scores of a training step's examples from its outputs adds to the step."""
    scorer, batch = Scorer(split, "el2n", "untrained"), split.batch(np.arange(min(batch_size, len(split))))
    with torch.no_grad():
        outputs = model(batch)
    return timed(lambda: (scorer.watch(outputs, batch), scorer.scores[0].item()), 51)  # item() waits for a GPU


def encoding(args, rows):
    """Read and encode sentence pairs in files of MNLI's shape, `rows` of them in train and in each dev set. Returns how
    long that took and the most memory that this process has had, as text."""
    words = [" ".join(words) for words in demo.generate()["train"].texts]
    columns = ("index", "promptID", "pairID", "genre", "sentence1_binary_parse", "sentence2_binary_parse",
               "sentence1_parse", "sentence2_parse", "sentence1", "sentence2", "label1", "gold_label")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        for file, n in zip(("train", "dev_matched", "dev_mismatched"), rows, strict=True):
            path = Path(folder) / "glue" / "MNLI" / f"{file}.tsv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "w", encoding="utf-8") as table:
                print(*columns, sep="\t", file=table)
                for i in range(n):
                    first, second = " ".join(words[i % prime] for prime in (3989, 3967, 3947, 3943)), words[i % 3931]
                    a, b = (text.replace(" ", " ) ( ") for text in (first, second))
                    label = ("contradiction", "entailment", "neutral")[i % 3]
                    print(i, 1, i, "x", a, b, a, b, first, second, label, label, sep="\t", file=table)
        start = time.perf_counter()
        data = load("mnli", load_tokenizer(args.model), folder)
        seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert tuple(map(len, data.splits.values())) == rows
    return (f"{sum(rows):,} sentence pairs of {data.train.lengths.mean():.0f} tokens read and encoded in "
            f"{seconds:.1f} s; memory at most {peak:,.0f} MB")  # fmt: skip


def measure(args):
    """All figures, as {name: value}; rates in examples a second, times in seconds, shares from 0 to 1."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.model)
    data = load(args.dataset, tokenizer, args.data_dir, max_train=args.max_train)
    data.train = data.train.to(args.device)
    n, lengths = len(data.train), data.train.lengths
    precisions = ["fp32", "bf16"] if report.has_bf16(args.device) else ["fp32"]
    best = precisions[-1]
    ours = {best: engine(args, tokenizer, data, best)}
    next(ours[best][0])
    result = {"dataset": args.dataset, "examples": n, "batch size": args.batch_size,
              "environment": report.environment(args.device), "start-up": time.perf_counter() - started}  # fmt: skip
    for _ in range(args.steps - 1):  # the scores that are compared below are those of a model that has learned
        next(ours[best][0])
    result["score difference"] = score_difference(ours[best][2], data.train)
    result["loss difference"] = loss_difference(args, tokenizer, data)
    scores = score(ours[best][2], data.train, "el2n").cpu().numpy()

    variants = {}
    for precision in precisions:
        ours.setdefault(precision, engine(args, tokenizer, data, precision))
        plain = textbook(args, tokenizer, data, precision)
        variants |= {f"textbook {precision} training": plain[0], f"textbook {precision} scoring": plain[1],
                     f"engine {precision} training": ours[precision][0],
                     f"engine {precision} scoring": ours[precision][1]}  # fmt: skip
        ours[precision][3].seconds.clear()
    products = partial(choose_products, "fp32", args.device)
    products()
    if torch.get_float32_matmul_precision() != "highest":  # how much of the gain is the choice of products alone
        plain = textbook(args, tokenizer, data, "fp32", products)
        variants |= {"textbook fp32 by oneDNN training": plain[0], "textbook fp32 by oneDNN scoring": plain[1]}
    rates = result["rates"] = alternate(variants, args)
    result["step"] = {precision: dict(ours[precision][3].seconds) for precision in precisions}
    for parts in result["step"].values():
        steps = parts.pop("steps")
        parts.update({part: seconds / steps for part, seconds in parts.items()})

    shuffled = np.random.default_rng(0).permutation(n)
    result["padding"] = {
        "textbook": padding(lengths, np.split(shuffled, range(args.batch_size, n, args.batch_size))),
        "training": padding(lengths, batches(lengths, np.arange(n), args.batch_size, np.random.default_rng(0))),
        "scoring": padding(lengths, sorted_batches(data.train)),
    }

    # What pruning costs, from these rates and from what EL2N would keep now: selections; in the epoch before each, the
    # scores of every step's outputs; and, before all but the first, a pass over what was not kept.
    full, tokens = n / rates[f"engine {best} training"], lengths[select(scores, 0.5)].sum() / lengths.sum()
    watching = watch_seconds(ours[best][2], data.train, args.batch_size) * n / args.batch_size
    selecting, passing = selection_seconds(scores), n / rates[f"engine {best} scoring"] * (1 - tokens)
    result["pruning"] = {}
    for epochs, cycle in ((10, 2), (40, 4)):
        rounds = sum(map(Schedule(epochs, cycle, cycle, 0.5).prunes_at, range(epochs)))
        training = full * (cycle + tokens * (epochs - cycle))
        cost = selecting * rounds + watching * (1 + 0.5 * (rounds - 1)) + passing * (rounds - 1)
        result["pruning"][f"T = {cycle}, {epochs} epochs"] = {
            "overhead": cost / (training + cost), "saved": 1 - (training + cost) / (full * epochs),
            "saved if scoring were free": 1 - training / (full * epochs)}  # fmt: skip

    # Growth: the same examples many times over.
    big = replace(data, train=tile(data.train, args.grown))
    grown = engine(args, tokenizer, big, best)
    rates = alternate({"training": ours[best][0], "grown training": grown[0],
                       "scoring": ours[best][1], "grown scoring": grown[1]}, args)  # fmt: skip
    random = np.random.default_rng(0).random(args.grown, dtype=np.float32)
    result["growth"] = {
        "examples": args.grown,
        "training": rates["grown training"] / rates["training"], "scoring": rates["grown scoring"] / rates["scoring"],
        "select": timed(lambda: select(random, 0.5)),
        "batches": timed(lambda: batches(big.train.lengths, np.arange(args.grown), 32, np.random.default_rng(0))),
        "bytes": bytes_per_example(big.train, 0.5), "tokens": float(big.train.lengths.mean()),
    }  # fmt: skip
    return result


def table(result):
    """Markdown. result: of `measure`."""
    rates, growth = result["rates"], result["growth"]
    lines = ["| examples/s | training | × textbook in fp32 | scoring | × textbook in fp32 |", "|" + " --- |" * 5]
    for name in dict.fromkeys(variant.rpartition(" ")[0] for variant in rates):
        columns = [f"{rates[f'{name} {work}']:.0f} | {rates[f'{name} {work}'] / rates[f'textbook fp32 {work}']:.2f}"
                   for work in ("training", "scoring")]  # fmt: skip
        lines.append(f"| {name.replace(' bf16', ', bf16').replace(' fp32', ', fp32')} | {' | '.join(columns)} |")
    lines += ["", "| | |", "| --- | --- |"]
    for precision, parts in result["step"].items():
        lines.append(f"| a step, {precision} | {', '.join(f'{part} {1000 * s:.1f}' for part, s in parts.items())} ms |")
    lines.append(f"| padding | {', '.join(f'{name} {share:.1%}' for name, share in result['padding'].items())} |")
    lines.append(f"| losses of 20 fp32 steps | differ by up to about {result['loss difference']:.1e} of themselves |")
    for precision, difference in result["score difference"].items():
        lines.append(f"| EL2N, {precision} | differs by up to about {difference['largest']:.1e}, for 99 % by up to "
                     f"{difference['99 %']:.1e}; of the kept half, {difference['other kept']:.2%} are others |")
    for name, cost in result["pruning"].items():
        lines.append(f"| pruning, {name} | {cost['overhead']:.1%} of the time; {cost['saved']:.1%} saved, "
                     f"{cost['saved if scoring were free']:.1%} if scoring were free |")
    lines += [
        f"| with {growth['examples']:,} examples instead of {result['examples']:,} | rate of training × "
        f"{growth['training']:.2f}, of scoring × {growth['scoring']:.2f}; selection {1000 * growth['select']:.0f} ms, "
        f"cutting into batches {1000 * growth['batches']:.0f} ms |",
        f"| memory for each example | {growth['bytes']:.0f} bytes, at {growth['tokens']:.1f} tokens |",
        f"| start-up to the first step, without imports | {result['start-up']:.1f} s |",
        "", f"{result['dataset']}, batch size {result['batch size']}, {report.machine(result)}, "
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
    p.add_argument("--steps", type=int, default=800, help="steps of training before scores are compared (800)")
    p.add_argument("--rounds", type=int, default=7, help="turns of each variant (7)")
    p.add_argument("--seconds", type=float, default=3.0, help="least length of a turn (3)")
    p.add_argument("--grown", type=int, default=400_000, help="size of the grown dataset (400000)")
    p.add_argument("--encode", action="store_true", help="measure reading and encoding a set of MNLI's size, only that")
    p.add_argument("--json", metavar="FILE", help="write all figures there, too")
    flags = p.parse_args(argv)
    shared = {name: getattr(flags, name) for name in ("dataset", "data_dir", "device", "model", "max_train")}
    args = train.parse([f"--{name.replace('_', '-')}={value}" for name, value in shared.items() if value is not None])
    for name in ("steps", "rounds", "seconds", "grown"):
        setattr(args, name, getattr(flags, name))
    try:
        if flags.encode:
            print(encoding(args, DATASETS["mnli"].rows))
            return 0
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
