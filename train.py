"""Fine-tune a language-understanding model on a pruned schedule (Attendu and Corbeil, "NLU on Data Diets", 2023).

    python train.py --dataset demo --keep 0.5

τ epochs on everything; then, every T epochs, score all examples, keep the share k with the highest scores, and train
on those. Read `train()` first: it is the whole method in one loop.
"""

import time

START = time.perf_counter()  # before the slow imports, so that they are in the load time

import argparse  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from pathlib import Path  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from tqdm import tqdm  # noqa: E402

from data import DATASETS, DataError, batches, load  # noqa: E402
from metrics import evaluate  # noqa: E402
from models import (ModelError, NLUModel, default_model, limit_vocabulary, load_tokenizer, losses,  # noqa: E402
                    predict)
from pruning import Schedule, Smoother, kept_size, select  # noqa: E402
from scoring import SCORES, random_scores, score  # noqa: E402


class RunError(RuntimeError):
    """A run that cannot start or go on. The message is one line."""


def train(model, data, schedule, args, clock, folder):
    """Fine-tune `model` in place. Writes epochs.jsonl and rounds.npz to `folder`; returns its lines, a list of dicts."""
    n, lengths = len(data.train), data.train.lengths
    trainset, devset = data.train.to(args.device), data.dev.to(args.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0, fused=True)
    steps = sum(-(-size // args.batch_size) for size in schedule.sizes(n))
    smooth = Smoother(args.ema, args.std_weight)
    kept, step, epochs, rounds = np.arange(n), 0, [], []

    for epoch in range(args.epochs):
        # All chance comes from (seed, epoch): no epoch depends on how many random numbers another one drew.
        rng = np.random.default_rng([args.seed, epoch])
        torch.manual_seed(int(rng.integers(2**63)))

        if schedule.prunes_at(epoch):
            if args.method == "random":
                importance = random_scores(n, rng)
            else:
                with clock("score"):
                    scores = score(model, trainset, args.method)
                with clock("select"):
                    importance = smooth(scores)
            with clock("select"):
                kept = select(importance, args.keep, args.offset)
            rounds.append((epoch, importance, kept))

        model.train()
        total_loss = torch.zeros((), device=args.device)
        with clock("train"), tqdm(total=len(kept), unit="ex", desc=f"epoch {epoch + 1}/{args.epochs}, {len(kept)} of {n}",
                                  leave=False, disable=None) as bar:
            for indices in batches(lengths, kept, args.batch_size, rng):
                batch = trainset.batch(indices)
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * (1 - step / steps if args.schedule == "linear" else 1)
                loss = losses(model(batch), batch).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                total_loss += loss.detach() * len(indices)
                if bar.update(len(indices)):  # only when the bar is drawn: reading the loss waits for the device
                    bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            mean_loss = total_loss.item() / len(kept)
        if not np.isfinite(mean_loss):
            raise RunError(f"the loss is {mean_loss} in epoch {epoch + 1}; a lower --lr (now {args.lr:g}) or "
                           "--precision fp32 may help")

        with clock("evaluate"):
            dev = evaluate(data.dev, *predict(model, devset), data.tags)
        epochs.append({"epoch": epoch + 1, "kept": len(kept), "tokens": int(lengths[kept].sum()), "step": step,
                       "loss": mean_loss, "dev": dev, "seconds": clock.lap()})
        log_epoch(folder, epochs[-1], rounds, args, n)
    return epochs


class Clock:
    """Seconds by named phase: `with clock("train"): …`. Waits for the device, so that work is billed where it was asked for."""

    def __init__(self, device):
        self.seconds, self.device, self.last = {}, torch.device(device), {}

    def now(self):
        if self.device.type != "cpu":
            getattr(torch, self.device.type).synchronize()
        return time.perf_counter()

    @contextmanager
    def __call__(self, phase):
        start = self.now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + self.now() - start

    def lap(self):
        """Seconds by phase since the last lap."""
        lap = {phase: round(s - self.last.get(phase, 0.0), 4) for phase, s in self.seconds.items()}
        self.last = dict(self.seconds)
        return {phase: s for phase, s in lap.items() if s}


def log_epoch(folder, line, rounds, args, n):
    """One line to epochs.jsonl and to the screen; scores and keep-masks so far to rounds.npz."""
    with open(folder / "epochs.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if rounds and rounds[-1][0] + 1 == line["epoch"]:
        masks = np.zeros((len(rounds), n), dtype=bool)
        for mask, (_, _, kept) in zip(masks, rounds):
            mask[kept] = True
        np.savez_compressed(folder / "rounds.npz", epoch=np.array([r[0] + 1 for r in rounds]),
                            scores=np.stack([r[1] for r in rounds]).astype(np.float32), keep=masks)
    print(f"epoch {line['epoch']:>2}/{args.epochs}  kept {line['kept']}/{n}  loss {line['loss']:.4f}  dev "
          + "  ".join(f"{name} {value:.2f}" for name, value in line["dev"].items())
          + "  |  " + "  ".join(f"{phase} {s:.1f} s" for phase, s in line["seconds"].items()), flush=True)


def parse(argv):
    class Parser(argparse.ArgumentParser):
        def error(self, message):  # one line: argparse would print the whole usage first
            self.exit(2, f"{self.prog}: error: {message} (see --help)\n")

    p = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--dataset", default="demo", metavar="NAME", help=f"one of: {', '.join(DATASETS)} (demo)")
    add("--data-dir", metavar="DIR", help="folder of the raw datasets ($DATA_DIR, or data/raw)")
    add("--model", default=None, metavar="ID", help="Hugging Face hub id or local folder (the embedded all-MiniLM-L6-v2)")
    add("--method", default="el2n", choices=["full", "random", *SCORES], help="score that decides what is kept; full keeps all (el2n)")
    add("--keep", type=float, default=0.5, metavar="k", help="k = 1 - ρ: share of train examples kept, in (0, 1] (0.5)")
    add("--epochs", type=int, default=10, metavar="E", help="E: number of epochs (10)")
    add("--full-epochs", type=int, default=2, metavar="τ", help="τ: epochs on everything before the first scoring (2)")
    add("--cycle", type=int, default=2, metavar="T", help="T: epochs from one scoring to the next (2)")
    add("--ema", type=float, default=0.8, metavar="α", help="α: weight of the newest score in the moving average, (0, 1] (0.8)")
    add("--std-weight", type=float, default=1.0, metavar="c", help="c: weight of the scores' standard deviation over rounds (1)")
    add("--offset", type=float, default=0.0, metavar="o", help="o: share with the very highest scores to set aside (0)")
    add("--lr", type=float, default=2e-4, help="learning rate at the start (2e-4)")
    add("--schedule", default="linear", choices=["linear", "constant"], help="of the learning rate: linear decay to 0, or constant (linear)")
    add("--clip", type=float, default=1.0, metavar="NORM", help="largest norm of the gradient of the mean loss (1)")
    add("--batch-size", type=int, default=32, metavar="B", help="examples a training step (32)")
    add("--max-length", type=int, default=256, metavar="TOKENS", help="longer examples are cut off (256)")
    add("--max-train", type=int, metavar="N", help="only the first N train examples, for quick tries (all)")
    add("--seed", type=int, default=0, help="of heads, dropout, batches and random selection (0)")
    add("--precision", default="auto", choices=["auto", "fp32", "bf16"], help="of the matrix products; auto: bf16 where the hardware has it (auto)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps or auto (auto)")
    add("--out", default="runs", metavar="DIR", help="where run folders and results.jsonl go (runs)")
    add("--no-model", action="store_true", help="do not write the fine-tuned model to the run folder")
    args = p.parse_args(argv)

    def check(ok, message):
        if not ok:
            p.error(message)

    check(args.dataset in DATASETS, f"--dataset {args.dataset}: unknown; choose from {', '.join(DATASETS)}")
    check(0 < args.keep <= 1, f"--keep {args.keep:g}: the share of examples kept must be above 0 and at most 1")
    for name in ("epochs", "full_epochs", "cycle", "batch_size"):
        check(getattr(args, name) >= 1, f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 1")
    if args.method == "full":
        args.keep = 1.0
    check(args.keep == 1 or args.full_epochs < args.epochs,
          f"--full-epochs {args.full_epochs}: leaves none of the {args.epochs} epochs to prune; τ must be below E")
    check(0 <= args.offset < 1 and args.offset + args.keep <= 1 + 1e-9 or args.keep == 1 and args.offset == 0,
          f"--offset {args.offset:g}: must be at least 0, and at most 1 - keep = {1 - args.keep:g}")
    check(0 < args.ema <= 1, f"--ema {args.ema:g}: must be above 0 and at most 1")
    check(0 <= args.std_weight < np.inf, f"--std-weight {args.std_weight:g}: must be a number, at least 0")
    check(0 < args.lr < np.inf, f"--lr {args.lr:g}: must be a number above 0")
    check(args.clip > 0, f"--clip {args.clip:g}: must be above 0")
    check(args.max_length >= 3, f"--max-length {args.max_length}: must be at least 3")
    check(args.max_train is None or args.max_train >= 1, f"--max-train {args.max_train}: must be at least 1")
    check(args.seed >= 0, f"--seed {args.seed}: must be at least 0")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=args.device)
    except Exception as error:
        p.error(f"--device {args.device}: not to be had here ({str(error).splitlines()[0]})")
    args.model = args.model or default_model()
    args.precision = best_precision(args.device) if args.precision == "auto" else args.precision
    return args


def best_precision(device):
    """bf16 on GPUs and on CPUs with bf16 instructions (AVX512-BF16 or AMX); elsewhere it is emulated, and slower."""
    kind = torch.device(device).type
    if kind == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported") if kind == "cpu" else ()
    return "bf16" if any(getattr(torch.cpu, probe, bool)() for probe in probes) else "fp32"


def open_folder(args):
    """A new folder for this run under --out; RunError where nothing can be written there."""
    name = f"{args.dataset}-{args.method}-{args.keep:g}-seed{args.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
    for suffix in ("", *(f"-{i}" for i in range(2, 1000))):  # runs of the same second
        folder = Path(args.out) / (name + suffix)
        try:
            folder.mkdir(parents=True)
            open(Path(args.out) / "results.jsonl", "a").close()
            return folder
        except FileExistsError:
            if not Path(args.out).is_dir():
                raise RunError(f"--out {args.out}: is a file; a folder was expected") from None
        except OSError as error:
            raise RunError(f"--out {args.out}: cannot be written ({error.strerror})") from None
    raise RunError(f"--out {args.out}: too many runs named {name}")


def environment(device):
    """What a reader needs to judge a timing: code version, package versions, machine."""

    def git(*command):
        result = subprocess.run(["git", *command], cwd=Path(__file__).parent, capture_output=True, text=True)
        return result.stdout.strip() if result.returncode == 0 else None

    try:
        processor = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    try:
        commit, dirty = git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except OSError:
        commit = dirty = None  # no git on this machine
    return {"git": commit, "dirty": dirty, "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "cpu": processor, "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device}


def summary(row):
    """What a person wants to know at the end, from a row of results.jsonl."""
    args, seconds = row["args"], row["seconds"]
    total = seconds["total"]
    lines = ["", f"{args['dataset']}, {args['method']}, {args['keep']:.0%} kept, seed {args['seed']}, {args['precision']} on {row['environment']['device']}"]
    for split in ("test", "dev"):
        lines.append(f"{split:<9}" + "  ".join(f"{name} {value:.2f}" for name, value in row[split].items()))
    lines.append(f"time     {total:.1f} s = train {seconds['train']:.1f} + score {seconds.get('score', 0):.1f} + select "
                 f"{seconds.get('select', 0):.2f};  not in it: load {seconds['load']:.1f}, evaluate {seconds['evaluate']:.1f}")
    lines.append(f"seen     {row['examples_seen']:,} of {row['examples_full']:,} examples ({row['examples_seen'] / row['examples_full']:.1%}), "
                 f"{row['tokens_seen'] / row['tokens_full']:.1%} of the tokens, in {row['steps']:,} steps")
    if row["rounds"]:
        lines.append(f"saved    {1 - total / row['full_seconds']:.1%} of the {row['full_seconds']:.1f} s that {args['epochs']} epochs on everything take at "
                     f"the pace of this run's full ones; the cost model says {1 - row['model_time']:.1%} with {row['rounds']} scoring "
                     f"passes of {row['scoring_cost']:.2f} epochs each")
    return "\n".join(lines)


def run(args):
    """Load, train, evaluate, record. Returns the row that it appended to results.jsonl."""
    clock = Clock(args.device)
    clock.seconds["load"] = time.perf_counter() - START if __name__ == "__main__" else 0.0
    with clock("load"):
        tokenizer = load_tokenizer(args.model)
        data = load(args.dataset, tokenizer, args.data_dir, args.max_length, args.max_train)
        n = len(data.train)
        if kept_size(n, args.keep) < args.batch_size:
            raise RunError(f"--keep {args.keep:g} of {n} examples is {kept_size(n, args.keep)}, fewer than one batch of {args.batch_size}; "
                           "keep more, or lower --batch-size")
        model = NLUModel.build(args.model, tokenizer, data, args.seed, bf16=args.precision == "bf16")
        limit_vocabulary(model, data)
        model.to(args.device)
    schedule = Schedule(args.epochs, args.full_epochs, args.cycle, args.keep)
    folder = open_folder(args)
    facts = {"folder": str(folder), "args": vars(args), "environment": environment(args.device)}
    (folder / "config.json").write_text(json.dumps(facts, indent=1))
    print(f"{args.dataset}: {n} train, {len(data.dev)} dev, {len(data.test)} test examples; {data.n_labels} labels, {data.n_tags} tags; "
          f"{args.precision} on {facts['environment']['device']}; to {folder}/", flush=True)

    epochs = train(model, data, schedule, args, clock, folder)
    with clock("evaluate"):
        test = evaluate(data.test, *predict(model, data.test.to(args.device)), data.tags)

    seconds = {phase: round(s, 3) for phase, s in clock.seconds.items()}
    seconds["total"] = round(sum(clock.seconds.get(phase, 0.0) for phase in ("train", "score", "select")), 3)
    full_epoch = float(np.median([line["seconds"]["train"] for line in epochs if line["kept"] == n]))
    scoring_cost = clock.seconds.get("score", 0.0) / max(schedule.rounds, 1) / full_epoch
    row = {**facts, "dev": epochs[-1]["dev"], "test": test, "seconds": seconds, "steps": epochs[-1]["step"],
           "examples_seen": sum(line["kept"] for line in epochs), "examples_full": n * args.epochs,
           "tokens_seen": sum(line["tokens"] for line in epochs), "tokens_full": int(data.train.lengths.sum()) * args.epochs,
           "rounds": schedule.rounds, "full_seconds": round(full_epoch * args.epochs, 3), "scoring_cost": round(scoring_cost, 4),
           "model_time": round(schedule.relative_time(scoring_cost), 4), "curve": [line["dev"] for line in epochs]}
    if not args.no_model:
        model.save(folder / "model")
    with open(Path(args.out) / "results.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
    print(summary(row))
    print(f"left     {folder}/ (config.json, epochs.jsonl{', rounds.npz' if schedule.rounds else ''}{'' if args.no_model else ', model/'}) "
          f"and a row in {Path(args.out) / 'results.jsonl'}")
    return row


def main(argv=None):
    """Exit status: 0 done, 1 the run failed on its way, 2 bad input, 130 interrupted."""
    try:
        run(parse(argv))
    except (DataError, ModelError, RunError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train.py: interrupted; the run folder keeps the epochs that were finished", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
