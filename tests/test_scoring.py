"""EL2N is what the paper defines, whatever the batches, and finds label errors once a model has learned something."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import DEFAULT_MODEL, IGNORE, Batch, demo, load, load_tokenizer
from models import FlatAdamW, NLUModel, hugging_face, limit_vocabulary, losses
from pruning import Schedule, SelectionError, select
from scoring import NEVER, SCORES, Scorer, el2n, forgetting, score


def slow_el2n(logits, label, tag_logits, tags):
    """One example, in float64, from the definition: the norm of all error vectors laid end to end."""
    errors = []
    for z, y in [(logits, label), *zip(tag_logits, tags)]:
        if y != IGNORE:
            p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            p[y] -= 1
            errors.append(p)
    return np.linalg.norm(np.concatenate(errors))


@pytest.mark.parametrize("scale", [0.1, 3, 30, 300])
def test_el2n_agrees_with_one_example_at_a_time(rng, scale):
    logits, tag_logits = rng.normal(size=(50, 7)) * scale, rng.normal(size=(50, 12, 40)) * scale
    labels, tags = rng.integers(7, size=50), rng.integers(40, size=(50, 12))
    tags[rng.random(tags.shape) < 0.4] = IGNORE
    outputs = torch.tensor(logits).float(), torch.tensor(tag_logits).float()
    batch = Batch(np.arange(50), None, None, None, torch.tensor(labels), torch.tensor(tags))
    wanted = [slow_el2n(outputs[0][i].double().numpy(), labels[i], outputs[1][i].double().numpy(), tags[i])
              for i in range(50)]
    np.testing.assert_allclose(el2n(outputs, batch).numpy(), wanted, atol=1e-6)
    plain = el2n((outputs[0], None), batch).numpy()
    np.testing.assert_allclose(plain, [slow_el2n(x.double().numpy(), y, [], []) for x, y in zip(outputs[0], labels)],
                               atol=1e-6)
    assert (plain <= 2**0.5 + 1e-6).all()


def el2n_of(logits, labels):
    batch = Batch(np.arange(len(labels)), None, None, None, torch.tensor(labels), None)
    return el2n((torch.tensor(logits, dtype=torch.float32), None), batch).numpy()


def test_el2n_of_one_class_one_example_and_equal_logits():
    assert el2n_of([[3.0], [-7.0]], [0, 0]).tolist() == [0, 0]  # nothing can be wrong
    assert el2n_of([[0.0, 0.0]], [1]) == pytest.approx([0.5**0.5])
    equal = el2n_of(np.zeros((9, 4)), [0, 1, 2, 3] * 2 + [0])
    assert equal == pytest.approx([0.75**0.5] * 9) and len(set(equal)) == 1  # a tie is a tie, whatever the label
    assert el2n_of([[1e9, 0.0], [-1e9, 0.0]], [0, 0]).tolist() == pytest.approx([0, 2**0.5])  # right, and wrong


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_output_that_is_no_number_is_not_scored_as_one(bad):
    """It comes out as NaN, which `select` refuses, and not as some score that would be kept or dropped in silence."""
    assert np.isnan(el2n_of([[bad, 0.0, 1.0]], [1])).all()
    with pytest.raises(SelectionError, match="1 of 2 scores are NaN"):
        select(el2n_of([[bad, 0.0], [1.0, 0.0]], [1, 1]), 0.5)


@pytest.mark.parametrize("method", ["el2n", "loss"])
def test_scoring_is_repeatable_and_independent_of_batches(model, demo_data, method):
    model.train()
    dev = demo_data.evaluation["dev"]
    one, two, small = (score(model, dev, method, tokens=tokens) for tokens in (None, None, 99))
    assert one.dtype == torch.float32 and one.shape == (500,) and model.training
    assert torch.equal(one, two)
    torch.testing.assert_close(small, one, atol=1e-5, rtol=1e-5)
    some = np.array([400, 3, 77])
    part = score(model, dev, method, some)
    torch.testing.assert_close(part[some], one[some], atol=1e-5, rtol=1e-5)
    assert part.count_nonzero() == 3 and not score(model, dev, method, np.empty(0, int)).any()
    batch = dev.batch(np.array([123]))
    with torch.inference_mode():
        torch.testing.assert_close(SCORES[method](model.eval()(batch), batch)[0], one[123], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("in_training", [False, True])
@pytest.mark.parametrize("task", ["intent and slots", "classification"])
def test_grand_is_the_norm_of_the_gradient_of_every_weight(tiny, tokenizer, demo_data, task, in_training):
    """Against autograd through transformers' own encoder and the whole embedding table, one example at a time."""
    if task == "classification":
        demo_data = replace(demo_data, train=replace(demo_data.train, tags=None), tags=[], n_tags=0)
    some = np.array([5, 0, 17, 300])
    plain, ours = (NLUModel.build(tiny, tokenizer, demo_data, seed=3) for _ in range(2))
    plain.run_encoder, wanted = hugging_face, []
    for i in some:
        batch = demo_data.train.batch(np.array([i]))
        gradients = torch.autograd.grad(losses(plain.eval()(batch), batch)[0], list(plain.parameters()))
        wanted.append(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    if in_training:  # with the word embeddings of the data alone, and gradients taken aside for the optimizer
        limit_vocabulary(ours, demo_data)
        optimizer = FlatAdamW(ours, "fp32", 1.0)
    scores = score(ours.train(), demo_data.train, "grand", some)
    torch.testing.assert_close(scores[some], torch.stack(wanted), rtol=1e-4, atol=0)
    assert scores.count_nonzero() == 4 and ours.training
    if in_training:  # nothing is left over for the next step
        before = optimizer.master.clone()
        optimizer.step(1e-3)
        assert torch.equal(optimizer.master, before)


def slow_forgetting(history):
    """Toneva et al. (2019) for one example: history, whether it was right at each of its steps."""
    events = sum(was and not now for was, now in pairwise(history))
    return (events - 0.5 * history[-1]) if any(history) else NEVER


def answers(right, tagged):
    """Outputs and batch of as many examples, which are right in intent and tags where `right` says so."""
    n, right = len(right), torch.tensor(right)
    labels, tags = torch.zeros(n, dtype=int), torch.tensor([[1, IGNORE, 0]] * n)
    logits = torch.nn.functional.one_hot((~right).long() if not tagged else labels, 3).float()
    guess = tags.where(tags != IGNORE, 2)
    guess[~right, 2] = 1
    tag_logits = torch.nn.functional.one_hot(guess, 3).float() if tagged else None
    return (logits, tag_logits), Batch(np.arange(n), None, None, None, labels, tags if tagged else None)


@pytest.mark.parametrize("tagged", [False, True])
def test_forgetting_counts_what_a_slow_reader_of_the_history_counts(rng, tagged):
    history = rng.random((9, 40)) < 0.5
    history[:, 0], history[:, 1], history[:3, 2] = False, True, False
    scores = torch.full((40,), NEVER)
    for step, right in enumerate(history):
        scores = forgetting(*answers(right, tagged), scores)
        assert scores.tolist() == [slow_forgetting(history[: step + 1, i].tolist()) for i in range(40)]
    assert scores[0] == NEVER > scores[1:].max() and scores[1] == -0.5


class Fixed:
    """A split of n examples that nothing is read from."""

    def __init__(self, n):
        self.tokens, self.n = torch.zeros(1), n

    def __len__(self):
        return self.n


@pytest.mark.parametrize("rescore", ["all", "untrained", "none"])
def test_a_pass_scores_what_it_is_told_and_training_the_rest(monkeypatch, rng, rescore):
    """Of 6 examples 0, 2 and 4 are trained on, and come out with a loss of −1 there; a pass gives every one 9."""
    passed = []

    def made_up(model, split, method, indices):
        passed.extend(indices)
        return torch.zeros(6).index_fill(0, torch.as_tensor(indices), 9.0)

    monkeypatch.setattr("scoring.score", made_up)
    monkeypatch.setitem(SCORES, "loss", lambda outputs, batch: -torch.ones(3))
    scorer, trained = Scorer(Fixed(6), "loss", rescore), np.array([0, 2, 4])
    scorer.watch(None, Batch(trained, None, None, None, None, None))
    scorer.gather()
    scores = scorer(None, trained, rng)
    wanted = {"all": [9] * 6, "untrained": [-1, 9] * 3, "none": [-1, NEVER] * 3}[rescore]
    assert scores.tolist() == wanted and scores.dtype == np.float32
    assert passed == {"all": [0, 1, 2, 3, 4, 5], "untrained": [1, 3, 5], "none": []}[rescore]
    scores[:] = 0  # the caller's own
    assert scorer(None, trained, rng).tolist() == wanted


def test_only_what_a_selection_asks_for_is_watched():
    """Selections are before epochs 2, 4 and 6, and the last epoch is full again."""
    schedule = Schedule(8, 2, 2, 0.5, full_end=1)
    wanted = {("el2n", "untrained"): [1, 3, 5], ("loss", "none"): [1, 3, 5], ("infobatch", "none"): [1, 3, 5],
              ("el2n", "all"): [], ("forgetting", "none"): [0, 1, 2, 3, 4, 5]}  # fmt: skip
    for (method, rescore), epochs in wanted.items():
        scorer = Scorer(Fixed(1), method, rescore)
        assert [epoch for epoch in range(8) if scorer.watches(schedule, epoch)] == epochs
    assert not any(Scorer(Fixed(1), "full", "untrained").watches(Schedule(8, 2, 2, 1.0), epoch) for epoch in range(8))


def test_of_equally_forgotten_examples_chance_decides_and_nothing_else(rng):
    scorer = Scorer(Fixed(4), "forgetting", "none")
    scorer.scores[:] = torch.tensor([0.0, -0.5, -0.5, 1.0])
    orders = {tuple(np.argsort(-scorer(None, None, rng))) for _ in range(50)}
    assert orders == {(3, 0, 1, 2), (3, 0, 2, 1)}


def test_random_scores_take_no_pass(rng):
    assert Scorer(Fixed(100), "random", "all")(None, None, rng).shape == (100,)


def share_found(scores, share):
    top = np.argsort(-scores, kind="stable")[: round(share * len(scores))]
    return np.isin(demo.planted_errors(), top).mean()


def test_el2n_finds_planted_label_errors_after_training_and_not_before(tmp_path):
    """The embedded model after two epochs: most errors among the 2 % of highest scores, nearly all among 4 %."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    data = load("demo", tokenizer)
    untrained = NLUModel.build(DEFAULT_MODEL, tokenizer, data, seed=0)
    assert share_found(score(untrained, data.train, "el2n").numpy(), 0.04) < 0.2
    row = train.run(train.parse(["--epochs", "3", "--full-epochs", "2", "--keep", "0.1", "--rescore",
                                 "all", "--out", str(tmp_path)]))
    with np.load(Path(row["folder"]) / "rounds" / "epoch-003.npz") as scored:
        scores = scored["scores"]
    assert share_found(scores, 0.02) > 0.5
    assert share_found(scores, 0.04) > 0.8
    assert demo.errors_found(scores) == (round(80 * share_found(scores, 0.02)), 80)
