"""How important is an example? Pure functions from a batch's outputs to one number an example, and the pass over all.

To add a score, write a function (outputs, batch) -> (B,) tensor and name it in SCORES; `--method` then takes it.
"""

import numpy as np
import torch

from data import IGNORE, sorted_batches
from data.parallel import add_up, share
from models import infer, losses


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


SCORES = {"el2n": el2n, "loss": losses}


def score(model, split, method, rng, tokens=None):
    """Score every example of `split` with the current model, dropout off. Returns (N,) float32 in dataset order.

    method: a key of SCORES, or "random": scores that know nothing, drawn from the numpy generator `rng`.
    tokens: most tokens a batch, as in sorted_batches. Several processes share the batches; all get all scores.
    """
    if method == "random":
        return rng.random(len(split), dtype=np.float32)
    scores = torch.zeros(len(split), device=split.tokens.device)
    for batch, outputs in infer(model, split, share(sorted_batches(split, tokens))):
        scores[torch.as_tensor(batch.indices, device=scores.device)] = SCORES[method](outputs, batch)
    return add_up(scores).cpu().numpy()
