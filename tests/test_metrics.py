"""Metrics agree with seqeval, with scikit-learn, and with loops over words."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from sklearn import metrics as sklearn

from data import Sample
from metrics import evaluate, f1, matthews, span_f1

TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"]
DATA = SimpleNamespace(labels=["x", "y"], tags=TAGS)  # what evaluate needs of a Dataset with slots
pytestmark = pytest.mark.filterwarnings("ignore")  # seqeval and scikit-learn warn where a class is absent


@settings(max_examples=50)
@given(st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=10), min_size=1))
def test_span_f1_agrees_with_seqeval(pairs):
    """Also of malformed sequences, where an I- follows anything."""
    gold, predicted = ([[pair[i] for pair in sentence] for sentence in pairs] for i in (0, 1))
    assert span_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, zero_division=0))


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=1, max_size=30))
def test_f1_and_matthews_agree_with_scikit_learn(pairs):
    gold, predicted = np.array(pairs).T
    assert f1(gold, predicted) == pytest.approx(sklearn.f1_score(gold, predicted, pos_label="1", zero_division=0))
    assert matthews(gold, predicted) == pytest.approx(sklearn.matthews_corrcoef(gold, predicted), abs=1e-9)


def slow_evaluate(gold, labels, tags):
    """Evaluate one utterance at a time. A word without a prediction is wrong, and ends a span as O does."""
    intents = [sample.label == DATA.labels[label] for sample, label in zip(gold, labels)]
    rows = [[[*(TAGS[tag] for tag in row), None, None, None, None, None][i] for i in range(len(sample.tags))]
            for sample, row in zip(gold, tags)]  # fmt: skip
    words = [tag == wanted for sample, row in zip(gold, rows) for tag, wanted in zip(row, sample.tags)]
    frames = [intent and row == sample.tags for intent, sample, row in zip(intents, gold, rows)]
    f1 = f1_score([sample.tags for sample in gold], [[tag or "O" for tag in row] for row in rows], zero_division=0)
    return {"intent_acc": 100 * np.mean(intents), "slot_f1": 100 * f1, "frame_acc": 100 * np.mean(frames),
            "slot_token_acc": 100 * np.mean(words)}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_evaluate_agrees_with_its_slow_twin(seed):
    """Some labels and tags are unknown to train. The last words may have no prediction, because they were cut off."""
    rng, gold, labels, tags = np.random.default_rng(seed), [], [], []
    for _ in range(20):
        own = rng.integers(len(TAGS) + 1, size=rng.integers(1, 6))
        found = np.where(rng.random(len(own)) < 0.9, own, rng.integers(len(TAGS), size=len(own)))
        tags.append(found.clip(max=len(TAGS) - 1)[: rng.integers(len(own) // 2, len(own) + 1)])
        gold.append(Sample([], rng.choice(["x", "y", "new"]), [[*TAGS, "B-new"][tag] for tag in own]))
        labels.append(rng.integers(2))
    data = SimpleNamespace(**vars(DATA), gold={"dev": gold})
    assert evaluate(data, "dev", np.array(labels), tags) == pytest.approx(slow_evaluate(gold, labels, tags))


@pytest.mark.parametrize("labels", [["0", "1"], ["1", "0"]])
def test_f1_is_of_the_label_1_whatever_its_id(labels):
    gold = [Sample("", label) for label in "1100"]
    data = SimpleNamespace(labels=labels, tags=[], metrics=("accuracy", "f1"), gold={"dev": gold})
    predicted = np.array([labels.index(label) for label in "1000"])
    assert evaluate(data, "dev", predicted, None) == pytest.approx({"accuracy": 75, "f1": 100 * 2 / 3})
