"""When to prune and which examples to keep."""

from dataclasses import dataclass

import numpy as np


class SelectionError(ValueError):
    """Scores that nothing can be selected by. The message is one line."""


@dataclass(frozen=True)
class Schedule:
    """τ epochs on everything; then every T epochs select anew what the next T train on; F epochs on everything.

    epochs: E. full_epochs: τ. cycle: T, at least 1. keep: k = 1 − ρ, the share kept, in (0, 1]; at 1 nothing is pruned.
    full_end: F. static: select once, after τ epochs, and start again from the pretrained weights, for E epochs more.
    """

    epochs: int
    full_epochs: int
    cycle: int
    keep: float
    full_end: int = 0
    static: bool = False

    @property
    def total(self):
        """How many epochs there are in all: E, or τ + E."""
        return self.epochs + self.full_epochs * (self.static and self.keep < 1)

    def full_at(self, epoch):
        """Whether `epoch` (from 0) trains on everything."""
        return self.keep == 1 or not self.full_epochs <= epoch < self.total - self.full_end

    def prunes_at(self, epoch):
        """Whether to select before `epoch`. Never when the result would not be used."""
        since = epoch - self.full_epochs
        return not self.full_at(epoch) and (since == 0 if self.static else since % self.cycle == 0)

    def restarts_at(self, epoch):
        """Whether `epoch` begins with the pretrained weights again."""
        return self.static and 0 < self.full_epochs == epoch and self.keep < 1

    def progress(self, epoch):
        """Which share of its epochs the training has behind it; epoch: whole ones and the share of the current one."""
        return (epoch - (self.total - self.epochs) * (epoch >= self.full_epochs)) / self.epochs


def defaults(args):
    """The schedule that comes with --method, --epochs, --selection and --draw: {flag: value} for those not given."""
    flags = {"full_epochs": 2, "cycle": 2, "full_end": 0, "rescore": "untrained", "ema": 0.8, "std_weight": 1.0}
    if args.draw or args.method in ("random", "forgetting", "infobatch"):
        flags |= {"ema": 1.0, "std_weight": 0.0}  # an average would favour earlier rounds' random draws, or old scores
    if args.draw:  # what has not been drawn for long keeps an old score, as a rule a high one, until that has it drawn
        flags |= {"cycle": 1, "rescore": "none"}
    if args.method in ("random", "grand") or args.selection == "static":  # selected once, by the model as it is then
        flags["rescore"] = "all"
    if args.method == "random" and args.selection == "static":
        flags["full_epochs"] = 0  # nothing has to be learned before
    if args.method in ("forgetting", "infobatch"):
        flags["rescore"] = "none"
    if args.method == "infobatch":  # its authors' code prunes in epochs before 87.5 % of E
        flags |= {"full_epochs": 1, "cycle": 1, "full_end": args.epochs // 8}
    return flags


def kept_size(n, keep):
    """round(keep · n), a half rounded to even."""
    return round(keep * n)


def choose(importance, labels, args, rng):
    """What to train on until the next selection, by the flags --method, --keep, --draw, --offset, --stratify and
    --class-floor.

    importance: (N,) float; labels: (N,) int; rng: a numpy generator. Returns the kept indices, ascending, int64, and
    the weight of each example in the loss, (N,) float32.
    """
    if args.method == "infobatch":
        return soft_prune(importance, args.keep, rng)
    if args.draw:
        importance = perturbed(importance, rng)
    if args.stratify:
        kept = stratified(importance, args.keep, args.offset, rng)
    else:
        kept = select(importance, args.keep, args.offset)
    if args.class_floor:
        kept = with_floor(kept, importance, labels, args.class_floor)
    return kept, np.ones(len(importance), np.float32)


def check_finite(scores):
    """SelectionError where a score is no finite number."""
    if not np.isfinite(scores).all():
        raise SelectionError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite")


def ranked(scores, keep, offset):
    """All examples by falling score, of equal ones the lower index first, without the round(offset·N) very highest
    (suspected label errors); and how many of them make up a share `keep` of all: round(keep·N)."""
    check_finite(scores)
    size = kept_size(len(scores), keep)
    if size < 1:
        raise SelectionError(f"a share of {keep:g} of {len(scores)} examples is none")
    first = min(round(offset * len(scores)), len(scores) - size)  # both may round up where offset + keep is 1
    return np.argsort(-scores, kind="stable")[first:], size


def select(scores, keep, offset=0.0):
    """The examples to train on: the round(keep·N) highest scores after the round(offset·N) very highest are set aside.
    Of equal scores the lower index comes first.

    scores: (N,) float. Returns indices, ascending, int64. SelectionError where a score is no finite number or nothing
    would be kept.
    """
    order, size = ranked(scores, keep, offset)
    return np.sort(order[:size])


def perturbed(scores, rng):
    """ln(score) + Gumbel noise, (N,) float64. The k highest are a draw of k without replacement, one after the other,
    each with a chance in proportion to its score among those left (Efraimidis and Spirakis 2006, in logarithms).

    scores: (N,) float; SelectionError where one is below 0. Those of 0 come last, in no order.
    """
    if (scores < 0).any():
        raise SelectionError(f"{(scores < 0).sum()} of {len(scores)} scores are below 0: no chances")
    return np.log(np.maximum(scores, 1e-30), dtype=float) + rng.gumbel(size=len(scores))


def stratified(scores, keep, offset, rng, bins=50):
    """Coverage-centric selection (Zheng et al. 2023, always with an offset): as `select`, but from each of 50 equally
    wide ranges of scores equally many, at random; what one has too few of falls to the fuller ones."""
    order, size = ranked(scores, keep, offset)
    low, high = scores[order[-1]], scores[order[0]]
    width = (high - low) / bins or 1.0
    bin_of = np.minimum((scores[order] - low) // width, bins - 1)
    groups = sorted((order[bin_of == i] for i in rng.permutation(np.unique(bin_of))), key=len)
    kept = []
    for i, group in enumerate(groups):
        kept.append(rng.permutation(group)[: (size - sum(map(len, kept))) // (len(groups) - i)])
    return np.sort(np.concatenate(kept))


def with_floor(kept, scores, labels, floor):
    """As many examples as in `kept`, but of each class at least `floor`, or all that it has: its highest scores come
    in (even those set aside by an offset) for the lowest of the classes that have more."""
    order = np.lexsort((-scores, ~np.isin(np.arange(len(scores)), kept)))  # the kept ones first, by falling score
    by_class = order[np.argsort(labels[order], kind="stable")]
    starts = np.r_[0, np.bincount(labels).cumsum()]
    place = np.arange(len(scores)) - starts[labels[by_class]]  # from 0 within its class
    safe = by_class[place < floor]
    if len(safe) > len(kept):
        raise SelectionError(f"{floor} examples a class are {len(safe)} in all, more than the {len(kept)} to keep")
    return np.sort(np.r_[safe, order[~np.isin(order, safe)]][: len(kept)])


def soft_prune(scores, keep, rng):
    """InfoBatch (Qin et al. 2024): of the examples whose score is below the mean, each is kept with probability `keep`
    = 1 − r, and then weighs 1/(1 − r), so that the expected gradient is that of all. Returns as `choose`."""
    check_finite(scores)
    below = scores < scores.mean(dtype=float)
    kept = ~below | (rng.random(len(scores)) < keep)
    return np.flatnonzero(kept), np.where(below, 1 / keep, 1).astype(np.float32)


class Smoother:
    """Scores averaged over the rounds: χ̂ = EMA + c·SD, with EMA_n = α·χ_n + (1 − α)·EMA_{n−1}, and SD the
    exponentially weighted standard deviation, corrected for bias (0 in the first round).

    alpha: weight of the newest score in (0, 1]; 1 is no smoothing. c: weight of the standard deviation.
    """

    def __init__(self, alpha, c):
        self.alpha, self.c = alpha, c
        self.mean = self.variance = None
        self.squared_weights = 1.0  # Σ w_i² of the weights so far, for the bias correction 1 / (1 − Σ w_i²)

    def __call__(self, scores):
        """Take this round's scores, (N,) float32, and return the smoothed ones, likewise."""
        if self.mean is None or self.alpha == 1:  # the first round, or only the newest score counts
            self.mean, self.variance = scores, np.zeros_like(scores)
            return scores
        a = self.alpha
        delta = scores - self.mean
        self.mean = self.mean + a * delta
        self.variance = (1 - a) * (self.variance + a * delta**2)
        self.squared_weights = a**2 + (1 - a) ** 2 * self.squared_weights
        return self.mean + self.c * np.sqrt(self.variance / (1 - self.squared_weights))
