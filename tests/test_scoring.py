"""EL2N is what the paper defines, whatever the batches, and finds label errors once a model has learned something."""

from pathlib import Path

import numpy as np
import pytest
import torch

import train
from data import DEFAULT_MODEL, IGNORE, Batch, demo, load, load_tokenizer
from models import NLUModel
from pruning import SelectionError, select
from scoring import SCORES, el2n, score


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


@pytest.mark.parametrize("method", SCORES)
def test_scoring_is_repeatable_and_independent_of_batches(model, demo_data, method, rng):
    model.train()
    one, two, small = (score(model, demo_data.evaluation["dev"], method, rng, size) for size in (None, None, 99))
    assert one.dtype == np.float32 and one.shape == (500,)
    assert np.array_equal(one, two)
    np.testing.assert_allclose(small, one, atol=1e-5, rtol=1e-5)
    batch = demo_data.evaluation["dev"].batch(np.array([123]))
    with torch.inference_mode():
        np.testing.assert_allclose(SCORES[method](model.eval()(batch), batch), one[123], rtol=1e-5)


def test_random_scores_take_no_pass(rng):
    assert score(None, range(100), "random", rng).shape == (100,)


def share_found(scores, share):
    top = np.argsort(-scores, kind="stable")[: round(share * len(scores))]
    return np.isin(demo.planted_errors(), top).mean()


def test_el2n_finds_planted_label_errors_after_training_and_not_before(tmp_path, rng):
    """The embedded model after two epochs: most errors among the 2 % of highest scores, nearly all among 4 %."""
    tokenizer = load_tokenizer(DEFAULT_MODEL)
    data = load("demo", tokenizer)
    untrained = NLUModel.build(DEFAULT_MODEL, tokenizer, data, seed=0)
    assert share_found(score(untrained, data.train, "el2n", rng), 0.04) < 0.2
    row = train.run(train.parse(["--epochs", "3", "--full-epochs", "2", "--keep", "0.1", "--out", str(tmp_path)]))
    with np.load(Path(row["folder"]) / "rounds" / "epoch-003.npz") as scored:
        scores = scored["scores"]
    assert share_found(scores, 0.02) > 0.5
    assert share_found(scores, 0.04) > 0.8
    assert demo.errors_found(scores) == (round(80 * share_found(scores, 0.02)), 80)
