"""Metrics agree with seqeval, with scikit-learn, and with loops over words."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from sklearn import metrics as sklearn

from data import LOST, Split
from metrics import evaluate, f1, matthews, span_f1

TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"]
DATA = SimpleNamespace(tags=TAGS)  # what evaluate needs of a Dataset with slots
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


def slow_evaluate(split, labels, word_tags):
    """Evaluate one utterance at a time. A lost word is wrong, and ends a span as O does."""
    rows = [(split.word_tags[a:b].tolist(), list(word_tags[a:b])) for a, b in pairwise(split.word_offsets.tolist())]
    intents = [gold == label for gold, label in zip(split.labels.tolist(), labels)]
    words = [gold == tag for row in rows for gold, tag in zip(*row)]
    names = [[[TAGS[max(tag, 0)] for tag in row[i]] for row in rows] for i in (0, 1)]
    frames = [intent and row[0] == row[1] for intent, row in zip(intents, rows)]
    return {"intent_acc": 100 * np.mean(intents), "slot_f1": 100 * f1_score(*names, zero_division=0),
            "frame_acc": 100 * np.mean(frames), "slot_token_acc": 100 * np.mean(words)}  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_evaluate_agrees_with_its_slow_twin(seed):
    """Some predicted words are LOST, because the input was cut off."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(1, 6, size=20)
    split = Split(torch.zeros(20), torch.arange(21), torch.as_tensor(rng.integers(3, size=20)), pad=0,
                  word_tags=torch.as_tensor(rng.integers(len(TAGS), size=counts.sum())),
                  word_offsets=torch.as_tensor(np.cumsum([0, *counts])))  # fmt: skip
    gold = split.word_tags.numpy()
    word_tags = np.where(rng.random(len(gold)) < 0.9, gold, rng.integers(LOST, len(TAGS), size=len(gold)))
    labels = np.where(rng.random(20) < 0.9, split.labels.numpy(), 0)
    assert evaluate(DATA, split, labels, word_tags) == pytest.approx(slow_evaluate(split, labels, word_tags))


@pytest.mark.parametrize("labels", [["0", "1"], ["1", "0"]])
def test_f1_is_of_the_label_1_whatever_its_id(labels):
    data = SimpleNamespace(labels=labels, metrics=("accuracy", "f1"))
    gold, predicted = ([labels.index(label) for label in row] for row in ("1100", "1000"))
    split = Split(torch.zeros(4), torch.arange(5), torch.tensor(gold), pad=0)
    assert evaluate(data, split, np.array(predicted), None) == pytest.approx({"accuracy": 75, "f1": 100 * 2 / 3})
