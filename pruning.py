"""When to select samples, and which ones to keep."""

import numpy as np
import torch

from errors import expect


def make_plan(epochs, full_epochs, cycle=1, full_end=0, static=False):
    """Return what comes before each epoch, a list: "full" (take everything), "select", or "same" (change nothing).

    Train τ epochs on everything, then select anew every T epochs, and train the last F epochs on everything. epochs: E.
    full_epochs: τ. cycle: T, at least 1. full_end: F. static: select once, after τ epochs, and train E more epochs.
    """
    plan = ["full"] * (epochs + full_epochs * static)
    for epoch in range(full_epochs, len(plan) - full_end):
        since = epoch - full_epochs
        plan[epoch] = "same" if since % cycle or (static and since) else "select"
    return plan


def select(importance, args, rng):
    """Choose the samples to train on until the next selection, by the flags in `args`.

    importance: (N,) float; rng: a numpy generator. Returns the kept indices, ascending, int64, and the weight of each
    sample in the loss, (N,) float32. UserError where a score is not finite.
    """
    if args.sample:
        importance = gumbel_log_scores(importance, rng)
    bad = (~np.isfinite(importance)).sum()
    expect(not bad, f"{bad} of {len(importance)} scores", "NaN or infinite; start again with a lower --lr")
    if args.method == "infobatch":
        return infobatch(importance, args.keep, rng)
    if args.stratify:
        kept = stratified(importance, args.keep, args.offset, rng)
    else:
        kept = highest(importance, args.keep, args.offset or 0)
    return kept, np.ones(len(importance), np.float32)


def kept_size(n, keep):
    """Return round(keep · N); a half is rounded to the even number."""
    return round(keep * n)


def ranking(scores, keep, offset):
    """Return all samples by falling score, without the round(offset·N) very highest, and the number to keep.

    Of equal scores the lower index comes first.
    """
    size = kept_size(len(scores), keep)
    first = min(round(offset * len(scores)), len(scores) - size)  # `size` of them must remain
    return np.argsort(-scores, kind="stable")[first:], size


def highest(scores, keep, offset=0.0):
    """Keep the round(keep·N) highest scores, after setting the round(offset·N) very highest aside.

    scores: (N,) float. Returns indices, ascending, int64.
    """
    order, size = ranking(scores, keep, offset)
    return np.sort(order[:size])


def gumbel_log_scores(scores, rng):
    """Return ln(score) + Gumbel noise, (N,) float64.

    Its k highest are a sample of k without replacement, with chances in proportion to the scores (Efraimidis and
    Spirakis 2006, in logarithms). scores: (N,) float, at least 0. Scores of 0 come last, in no order.
    """
    negative = (scores < 0).sum()
    expect(not negative, "--sample", f"{negative} of {len(scores)} scores are negative; leave --sample out")
    return np.log(np.maximum(scores, 1e-30), dtype=float) + rng.gumbel(size=len(scores))


def stratified(scores, keep, offset, rng, bins=50):
    """Keep equally many samples from each of 50 equally wide ranges of scores, at random.

    This is coverage-centric selection (Zheng et al. 2023, who always use an offset). Fuller ranges make up for short
    ones. Arguments and result as for `highest`.
    """
    order, size = ranking(scores, keep, offset)
    low, high = scores[order[-1]], scores[order[0]]
    width = (high - low) / bins or 1.0
    bin_of = np.minimum((scores[order] - low) // width, bins - 1)
    groups = sorted((order[bin_of == i] for i in rng.permutation(np.unique(bin_of))), key=len)
    kept = []
    for i, group in enumerate(groups):
        kept.append(rng.permutation(group)[: (size - sum(map(len, kept))) // (len(groups) - i)])
    return np.sort(np.concatenate(kept))


def infobatch(scores, keep, rng):
    """Keep each sample below the mean score with probability `keep` = 1 − r, and all others (Qin et al. 2024).

    A kept sample below the mean weighs 1/(1 − r), so the expected gradient is the full one. Returns as `select`.
    """
    below = scores < scores.mean(dtype=float)
    kept = ~below | (rng.random(len(scores)) < keep)
    return np.flatnonzero(kept), np.where(below, 1 / keep, 1).astype(np.float32)


class Smoother:
    """Smooth scores over the selections: χ̂ = EMA + c·SD, with EMA_n = α·χ_n + (1 − α)·EMA_{n−1}.

    SD is the exponentially weighted standard deviation, corrected for bias; at first it is 0. alpha: weight of the
    newest score, in (0, 1]; 1 is no smoothing. c: weight of the deviation.
    """

    def __init__(self, alpha, c):
        self.alpha, self.c = alpha, c
        self.state = {}  # all that the next call depends on

    def __call__(self, scores):
        """Take the newest scores, (N,) float32, and return the smoothed ones, (N,) float32."""
        new, a = torch.from_numpy(scores), self.alpha
        if a == 1:
            return scores
        if not self.state:
            self.state = {"mean": new, "variance": torch.zeros_like(new), "squared_weights": 1.0}
            return scores
        mean, variance, squared_weights = self.state.values()
        delta = new - mean
        mean = mean + a * delta
        variance = (1 - a) * (variance + a * delta**2)
        squared_weights = a**2 + (1 - a) ** 2 * squared_weights  # Σ w_i², for the bias correction 1 / (1 − Σ w_i²)
        self.state = {"mean": mean, "variance": variance, "squared_weights": squared_weights}
        return (mean + self.c * (variance / (1 - squared_weights)).sqrt()).numpy()
