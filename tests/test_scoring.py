"""Scores agree with their definitions, one sample at a time, whatever the batches."""

from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data import IGNORE, Batch, Split, sorted_batches
from engine import FlatAdamW, limit_vocabulary, transformers_forward
from models import build_model, losses
from scoring import SCORES, UNSEEN, Scorer, el2n, score, squared_error


def batch_of(labels, tags=None, rows=None):
    """Return a Batch that has labels and tags only."""
    rows = np.arange(len(labels)) if rows is None else rows
    return Batch(rows, None, None, None, torch.as_tensor(labels), None if tags is None else torch.as_tensor(tags))


def slow_el2n(logits, label, tag_logits=(), tags=()):
    """Return EL2N of one sample in float64: the norm of all error vectors laid end to end."""
    errors = []
    for z, y in [(logits, label), *zip(tag_logits, tags)]:
        if y != IGNORE:
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            errors.append(p - np.eye(len(z))[y])
    return np.linalg.norm(np.concatenate(errors))


@pytest.mark.parametrize("scale", [0.1, 3, 300, 1e9])
def test_el2n_agrees_with_one_sample_at_a_time(rng, scale):
    logits, tag_logits = (torch.tensor(rng.normal(size=size) * scale).float() for size in ((50, 7), (50, 12, 40)))
    labels, tags = rng.integers(7, size=50), rng.integers(40, size=(50, 12))
    tags[rng.random(tags.shape) < 0.4] = IGNORE
    z, tag_z = logits.double().numpy(), tag_logits.double().numpy()
    wanted = [slow_el2n(z[i], labels[i], tag_z[i], tags[i]) for i in range(50)]
    np.testing.assert_allclose(el2n((logits, tag_logits), batch_of(labels, tags)).numpy(), wanted, atol=1e-6)
    wanted = [slow_el2n(z[i], labels[i]) for i in range(50)]
    np.testing.assert_allclose(el2n((logits, None), batch_of(labels)).numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(squared_error(logits, torch.tensor(labels)), np.square(wanted), atol=1e-6)


def test_el2n_of_special_cases():
    """With one class nothing can be wrong. Equal logits are a tie. Where logits are not finite, the score is not."""
    assert el2n((torch.tensor([[3.0], [-7.0]]), None), batch_of([0, 0])).tolist() == [0, 0]
    assert len(set(el2n((torch.zeros(9, 4), None), batch_of([0, 1, 2, 3] * 2 + [0])).tolist())) == 1
    assert not el2n((torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0]]), None), batch_of([1, 1])).isfinite().any()


@pytest.mark.parametrize("method", SCORES)
def test_scoring_is_repeatable_and_independent_of_batches(model, demo_data, monkeypatch, method):
    dev = demo_data.evaluation["dev"]
    one, two = (score(model.train(), dev, method) for _ in range(2))
    monkeypatch.setattr("scoring.sorted_batches", partial(sorted_batches, tokens=99))
    small = score(model.train(), dev, method)
    assert one.dtype == torch.float32 and one.shape == (250,) and torch.equal(one, two)
    torch.testing.assert_close(small, one, atol=1e-5, rtol=1e-5)
    batch = dev.batch(np.array([123]))
    with torch.inference_mode():
        torch.testing.assert_close(SCORES[method](model.eval()(batch), batch)[0], one[123], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("joint", [False, True])
def test_grand_is_the_norm_of_the_gradient_of_every_weight(tiny, tokenizer, demo_data, joint, in_training):
    """Against autograd through transformers' encoder and the whole embedding table. In training, the optimizer has the
    gradients, and scoring leaves nothing over for its next step."""
    dev = demo_data.evaluation["dev"]
    end = int(dev.offsets[6])
    split = replace(dev, tokens=dev.tokens[:end], offsets=dev.offsets[:7], labels=dev.labels[:6],
                    tags=dev.tags[:end] if joint else None)  # fmt: skip
    data = demo_data if joint else replace(demo_data, tags=[])
    plain, ours = (build_model(tiny, tokenizer, data, seed=3) for _ in range(2))
    plain.run_encoder, wanted = transformers_forward, []
    for batch in (split.batch(np.array([i])) for i in range(6)):
        gradients = torch.autograd.grad(losses(plain.eval()(batch), batch)[0], list(plain.parameters()))
        wanted.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    if in_training:
        limit_vocabulary(ours, data)
        optimizer = FlatAdamW(ours, "fp32", 1.0)
    torch.testing.assert_close(score(ours.train(), split, "grand"), torch.stack(wanted), rtol=1e-4, atol=0)
    if in_training:
        optimizer.step(1e-3)
        assert not optimizer.master.grad.any()


# ---- scores of training steps


def split_of(n):
    """Return a Split of n samples that nothing is read from."""
    return Split(torch.zeros(n), torch.arange(n + 1), torch.zeros(n), pad=0)


def answers(rows, correct, tagged):
    """Return outputs and batch of some samples. Intent and tags are right where `correct` says so; else one is wrong:
    the last tag, or without tags the intent."""
    tags = torch.tensor([[1, IGNORE, 0]] * len(rows))
    guess = tags.clamp(min=0)
    guess[~torch.tensor(correct), 2] = 1
    logits = F.one_hot(torch.tensor(~correct).long() * (not tagged), 3).float()
    batch = batch_of(torch.zeros(len(rows), dtype=int), tags if tagged else None, rows)
    return (logits, F.one_hot(guess, 3).float() if tagged else None), batch


@pytest.mark.parametrize("tagged", [False, True])
def test_forgetting_agrees_with_a_slow_count(rng, tagged):
    """Toneva et al. (2019) count a sample's steps that are wrong after a right one; never right comes first of all.

    Of equal counts, a sample that is wrong now comes first. The state is saved and loaded between epochs.
    """
    history, state = [[] for _ in range(40)], Scorer(split_of(40), "forgetting", "none").state_dict()
    for epoch in range(9):
        rows = np.flatnonzero(rng.random(40) < 0.7) if epoch else np.arange(40)
        correct = (rng.random(len(rows)) < 0.5) & (rows != 0) | (rows == 1)
        scorer = Scorer(split_of(40), "forgetting", "none")
        scorer.load_state_dict(state)
        scorer.record(*answers(rows, correct, tagged))
        scorer.sync()
        state = scorer.state_dict()
        for i, right in zip(rows, correct):
            history[i].append(bool(right))
        counts = [sum(a and not b for a, b in pairwise(steps)) if any(steps) else UNSEEN for steps in history]
        assert scorer.scores.tolist() == counts
        key = [(count, not steps[-1]) for count, steps in zip(counts, history)]
        assert [key[i] for i in np.argsort(-scorer(None, rng))] == sorted(key, reverse=True)
    assert counts[0] == UNSEEN and counts[1] == 0
    assert len({tuple(np.argsort(-scorer(None, rng))) for _ in range(50)}) > 40  # chance decides about the rest


@pytest.mark.parametrize(("rescore", "wanted"), [("all", [9] * 6), ("none", [-1, UNSEEN] * 3)])
def test_a_scorer_makes_a_pass_or_takes_the_scores_of_training(monkeypatch, rng, rescore, wanted):
    """Samples 0, 2 and 4 are trained on and get −1 there. A pass gives every sample 9."""
    monkeypatch.setattr("scoring.score", lambda model, split, method: torch.full((6,), 9.0))
    monkeypatch.setitem(SCORES, "loss", lambda outputs, batch: -torch.ones(3))
    scorer = Scorer(split_of(6), "loss", rescore)
    scorer.record(None, batch_of([0, 0, 0], rows=np.array([0, 2, 4])))
    scorer.sync()
    scorer(None, rng)[:] = 0  # the caller may change what it got
    assert scorer(None, rng).tolist() == wanted and scorer(None, rng).dtype == np.float32
