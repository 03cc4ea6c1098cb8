"""How important is a sample? Its score comes from a scoring pass, or from its last training step.

To add a score, write a function (outputs, batch) -> (B,) tensor and name it in SCORES. `--method` then takes it.
outputs: fp32 logits of the intent (B, C) and of the tags (B, L, K) or None. batch: a data.Batch with labels and tags.
"""

import numpy as np
import torch

from data import IGNORE, sorted_batches
from distributed import all_reduce_sum, shard
from models import infer, losses

UNSEEN = 2.0**16  # above all scores: no score yet; for forgetting, never yet correct


def el2n(outputs, batch):
    """Return EL2N, ‖p − onehot(y)‖₂ (Paul et al. 2021), (B,) fp32. For intent and slots it is the length of all error
    vectors laid end to end (Attendu and Corbeil 2023):

    χ = sqrt(‖p_intent − y_intent‖² + Σ_t ‖p_t − y_t‖²), t over words.

    outputs: logits (B, C), and tag logits (B, L, K) or None.
    """
    logits, tag_logits = outputs
    squared = squared_error(logits, batch.labels)
    if tag_logits is not None:
        squared = squared + squared_error(tag_logits, batch.tags).sum(1)
    return squared.sqrt()


def squared_error(logits, gold):
    """Return ‖softmax(logits) − onehot(gold)‖² along the last axis, in fp32; 0 where gold is IGNORE.

    logits: (…, C); gold: (…) int64. The difference is taken before squaring, because Σp² − 2p_y + 1 would cancel.
    """
    error = logits.float().softmax(-1)
    counts = gold != IGNORE
    error.scatter_add_(-1, gold.where(counts, 0)[..., None], error.new_full((*gold.shape, 1), -1.0))
    return error.square().sum(-1) * counts


def is_correct(outputs, batch):
    """Return whether the intent and every tag of a sample are predicted correctly, (B,) bool."""
    logits, tag_logits = outputs
    correct = logits.argmax(-1) == batch.labels
    if tag_logits is not None:
        correct &= ((tag_logits.argmax(-1) == batch.tags) | (batch.tags == IGNORE)).all(1)
    return correct


def gradient_norm(model, batch):
    """Return GraNd, ‖∇ loss‖₂ over all weights (Paul et al. 2021), of a batch of one, ().

    Paul et al. average over several models. This takes the current model alone, in the dtype of its weights.
    """
    losses(model(batch), batch).sum().backward()
    gradients = [weight.grad.float() for weight in model.parameters() if weight.grad is not None]
    model.zero_grad()
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]  # equal tokens' gradients are summed
    return sum(g.square().sum() for g in dense).sqrt()


SCORES = {"el2n": el2n, "loss": losses}
METHODS = ("full", "random", *SCORES, "forgetting", "infobatch", "grand")


def score(model, split, method):
    """Score every sample of `split` with dropout off, which stays off. Returns (N,) fp32 on the split's device.

    method: a key of SCORES, or "grand", which takes one backward pass for each sample. Several processes share the
    work, and each returns all scores.
    """
    scores = torch.zeros(len(split), device=split.tokens.device)
    if method == "grand":
        model.eval()
        for i in shard(np.arange(len(split))):
            scores[i] = gradient_norm(model, split.batch(np.array([i])))
    else:
        for batch, outputs in infer(model, split, shard(sorted_batches(split))):
            scores[torch.as_tensor(batch.indices, device=scores.device)] = SCORES[method](outputs, batch)
    return all_reduce_sum(scores)


class Scorer(torch.nn.Module):
    """The newest score of every sample of a split, (N,) fp32. It is a module so that its buffers can be saved.

    rescore: "all" makes a scoring pass when scores are asked for. "none" takes each score from the sample's last
    training step. It costs next to nothing, but dropout was on and the model was younger. Forgetting and infobatch
    always score this way.
    """

    def __init__(self, split, method, rescore):
        super().__init__()
        self.split, self.method = split, method
        self.records = rescore == "none" or method in ("forgetting", "infobatch")
        self.register_buffer("scores", torch.full((len(split),), UNSEEN, device=split.tokens.device))
        self.register_buffer("correct", torch.zeros_like(self.scores))  # forgetting: 1 if right at the last step
        self.recorded = torch.zeros_like(self.scores)  # 1 where this process has a score that others lack

    @torch.no_grad()
    def record(self, outputs, batch):
        """Take the scores of a training step's samples from its outputs, where training scores are needed."""
        if not self.records:
            return
        rows = torch.as_tensor(batch.indices, device=self.scores.device)
        if self.method == "forgetting":
            self.record_forgetting(rows, is_correct(outputs, batch))
        else:
            self.scores[rows] = SCORES["loss" if self.method == "infobatch" else self.method](outputs, batch)
        self.recorded[rows] = 1

    def record_forgetting(self, rows, correct):
        """Count forgetting events (Toneva et al. 2019): correct at one training step, wrong at the sample's next one.

        The count is UNSEEN until a sample is first correct, then 0, then one more for each event.
        """
        events = self.scores[rows] + (self.correct[rows].bool() & ~correct)
        self.scores[rows] = torch.where(correct & (events == UNSEEN), 0, events)
        self.correct[rows] = correct.float()

    def sync(self):
        """Give every process the scores that each has recorded since the last call."""
        if not self.records:
            return
        anywhere = all_reduce_sum(self.recorded.clone()) > 0
        for values in (self.scores, self.correct):
            values.copy_(torch.where(anywhere, all_reduce_sum(values * self.recorded), values))
        self.recorded.zero_()

    def forward(self, model, rng):
        """Return the scores, (N,) float32 in dataset order. rng: a numpy generator, for random scores and for ties."""
        n = len(self.split)
        if self.method == "random":
            return rng.random(n, dtype=np.float32)
        if not self.records:
            return score(model, self.split, self.method).cpu().numpy()
        scores = self.scores.cpu().numpy().copy()
        if self.method == "forgetting":  # of equal counts, samples that are wrong now come first; noise orders the rest
            scores -= self.correct.cpu().numpy() / 2
            most = scores[scores < UNSEEN].max(initial=0)
            scores = scores.clip(max=most + 1) + rng.random(n, dtype=np.float32) / 2
        return scores
