"""When to prune and which examples to keep."""

from dataclasses import dataclass

import numpy as np


class SelectionError(ValueError):
    """Scores that nothing can be selected by. The message is one line."""


@dataclass(frozen=True)
class Schedule:
    """τ epochs on everything; then every T epochs score all examples again and keep a share k for the next T.

    epochs: E. full_epochs: τ, 1 … E. cycle: T, at least 1. keep: k = 1 − ρ, the share kept, in (0, 1].
    """

    epochs: int
    full_epochs: int
    cycle: int
    keep: float

    def prunes_at(self, epoch):
        """Whether to score and select before `epoch` (from 0). Never when the result would not be used."""
        in_time = self.full_epochs <= epoch < self.epochs
        return self.keep < 1 and in_time and (epoch - self.full_epochs) % self.cycle == 0

    @property
    def rounds(self):
        """r, the number of scoring rounds."""
        return sum(self.prunes_at(epoch) for epoch in range(self.epochs))

    def sizes(self, n):
        """How many of n examples each epoch trains on: a list of E integers."""
        pruned = self.epochs - self.full_epochs if self.keep < 1 else 0
        return [n] * (self.epochs - pruned) + [kept_size(n, self.keep)] * pruned

    def relative_time(self, s):
        """The cost model: time against training on everything, (τ + k(E − τ) + s·r) / E,
        where s is the time of one scoring pass over the time of one full epoch."""
        return (self.full_epochs + self.keep * (self.epochs - self.full_epochs) + s * self.rounds) / self.epochs


def kept_size(n, keep):
    """round(keep · n), a half rounded to even."""
    return round(keep * n)


def select(scores, keep, offset=0.0):
    """The examples to train on: the round(keep·N) highest scores after the round(offset·N) very highest are set aside
    (suspected label errors). Of equal scores the lower index comes first.

    scores: (N,) float. Returns indices, ascending, int64. SelectionError where a score is no finite number or nothing
    would be kept.
    """
    if not np.isfinite(scores).all():
        raise SelectionError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are NaN or infinite")
    size = kept_size(len(scores), keep)
    first = min(round(offset * len(scores)), len(scores) - size)  # both may round up where offset + keep is 1
    if size < 1:
        raise SelectionError(f"a share of {keep:g} of {len(scores)} examples is none")
    return np.sort(np.argsort(-scores, kind="stable")[first : first + size])


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
