"""How important is an example? Pure functions from a batch's outputs to one number an example, and where outputs come
from: a pass over the examples, or their last training step.

To add a score, write a function (outputs, batch) -> (B,) tensor and name it in SCORES; `--method` then takes it.
"""

import numpy as np
import torch

from data import IGNORE, sorted_batches
from data.parallel import add_up, share
from models import EmbeddingRows, infer, losses

NEVER = 2.0**16  # the score of what has not been right yet, above any number of events; nor been scored at all


def el2n(outputs, batch):
    """EL2N: ‖p − onehot(y)‖₂ (Paul et al. 2021). For joint intent/slot data, of all error vectors laid end to end:
    χ = sqrt(‖p_intent − y_intent‖² + Σ_t ‖p_t − y_t‖²), t over words (Attendu and Corbeil 2023).

    outputs: logits (B, C), and (B, L, K) or None. Returns (B,) fp32.
    """
    logits, tag_logits = outputs
    squared = squared_error(logits, batch.labels)
    if tag_logits is not None:
        squared = squared + squared_error(tag_logits, batch.tags).sum(1)
    return squared.sqrt()


def squared_error(logits, gold):
    """‖softmax(logits) − onehot(gold)‖² along the last axis, in fp32; 0 where gold is IGNORE.

    logits: (…, C); gold: (…) int64. The difference is taken before squaring: Σp² − 2p_y + 1 would cancel.
    """
    error = logits.float().softmax(-1)
    counts = gold != IGNORE
    error.scatter_add_(-1, gold.where(counts, 0)[..., None], error.new_full((*gold.shape, 1), -1.0))
    return error.square().sum(-1) * counts


def forgetting(outputs, batch, before):
    """Forgetting events (Toneva et al. 2019): how often an example was right at one of its training steps and wrong at
    its next; NEVER until it is first right. Right: intent and every tag. Less ½ while it is right, so that of equal
    counts those wrong now come first. They are counted while an example is trained on: once dropped, it gains none.

    before: (B,) its score before this step, from which the events go on being counted.
    """
    logits, tag_logits = outputs
    right = logits.argmax(-1) == batch.labels
    if tag_logits is not None:
        right &= ((tag_logits.argmax(-1) == batch.tags) | (batch.tags == IGNORE)).all(1)
    was_right = before.frac() != 0
    events = torch.where(was_right, before + 0.5, before)
    return torch.where(right, torch.where(before == NEVER, 0, events) - 0.5, events + was_right)


def gradient_norm(model, batch):
    """GraNd (Paul et al. 2021) of a batch of one: ‖∇ loss‖₂ over all weights, (). Of this one model, where the paper
    averages over several; in bf16 where the weights are."""
    losses(model(batch), batch).sum().backward()
    squared = 0.0
    for module in model.modules():
        if isinstance(module, EmbeddingRows) and module.looked_up:  # the sum of what each row's tokens ask for
            (rows, vectors), = module.looked_up
            _, row = rows.unique(return_inverse=True)
            gradient = vectors.grad.flatten(0, 1).float()
            squared = squared + torch.zeros_like(gradient).index_add_(0, row, gradient).square().sum()
            module.looked_up.clear()
    for weight in model.parameters():
        if weight.grad is not None:
            squared = squared + weight.grad.float().square().sum()
            weight.grad = None
    return squared.sqrt()


SCORES = {"el2n": el2n, "loss": losses}
WATCHED = ("forgetting", "infobatch")  # methods whose scores come from training steps alone
METHODS = ("full", "random", *SCORES, *WATCHED, "grand")


def score(model, split, method, indices=None, tokens=None):
    """Score the examples `indices` of `split` (None: all) with the current model, dropout off. Returns (N,) fp32, on
    the device of the split, 0 where nothing was scored.

    method: a key of SCORES, or "grand", which takes a backward pass of its own for each example. tokens: most tokens a
    batch, as in sorted_batches. Several processes share the batches; all get all scores.
    """
    scores = torch.zeros(len(split), device=split.tokens.device)
    cut = share(sorted_batches(split, indices, tokens))
    if method == "grand":
        training = model.training
        model.eval()
        for i in np.concatenate([*cut, np.empty(0, int)]):
            scores[i] = gradient_norm(model, split.batch(np.array([i])))
        model.train(training)
    else:
        for batch, outputs in infer(model, split, cut):
            scores[torch.as_tensor(batch.indices, device=scores.device)] = SCORES[method](outputs, batch)
    return add_up(scores)


class Scorer:
    """The newest score of every example of a split.

    rescore: which examples a pass goes over when scores are asked for: "all"; those "untrained" in the last epoch; or
    "none". The others' are those of their last training step: for next to nothing, but with dropout on, and of a model
    up to an epoch younger.
    """

    def __init__(self, split, method, rescore):
        self.split, self.method, self.rescore = split, method, rescore
        self.scores = torch.full((len(split),), NEVER, device=split.tokens.device)
        self.watched = torch.zeros_like(self.scores)  # 1 where this process has trained on it since `gather`

    def watches(self, schedule, epoch):
        """Whether a selection will use the scores of `epoch`'s training steps. It uses those of the epoch before it,
        as the others since the last selection train on the same examples; forgetting events, of all epochs."""
        ahead = range(epoch + 1, schedule.total) if self.method == "forgetting" else [epoch + 1]
        return self.rescore != "all" and any(map(schedule.prunes_at, ahead))

    @torch.no_grad()
    def watch(self, outputs, batch):
        """Take the scores of a training step's examples from its outputs."""
        rows = torch.as_tensor(batch.indices, device=self.scores.device)
        if self.method == "forgetting":
            self.scores[rows] = forgetting(outputs, batch, self.scores[rows])
        else:
            self.scores[rows] = SCORES["loss" if self.method == "infobatch" else self.method](outputs, batch)
        self.watched[rows] = 1

    def gather(self):
        """At the end of an epoch that was watched: have in all processes what each has seen."""
        scores = add_up(self.scores * self.watched)
        self.scores = torch.where(add_up(self.watched) > 0, scores, self.scores)
        self.watched.zero_()

    def __call__(self, model, trained, rng):
        """(N,) float32 in dataset order. trained: indices of the last epoch's examples. rng: a numpy generator, for
        "random" (scores that know nothing) and for the order of those that were forgotten equally often."""
        n = len(self.split)
        if self.method == "random":
            return rng.random(n, dtype=np.float32)
        if self.rescore != "none":
            stale = np.arange(n) if self.rescore == "all" else np.setdiff1d(np.arange(n), trained)
            fresh = score(model, self.split, self.method, stale)
            rows = torch.as_tensor(stale, device=fresh.device)
            self.scores[rows] = fresh[rows]
        scores = self.scores.cpu().numpy().copy()
        if self.method == "forgetting":
            most = scores[scores < NEVER].max(initial=0)
            scores = scores.clip(max=most + 1) + rng.random(n, dtype=np.float32) / 2
        return scores
