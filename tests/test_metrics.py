"""Metrics agree with seqeval, with scikit-learn, and with loops over words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import matthews_corrcoef

from data import LOST, Split
from metrics import evaluate, f1, matthews, span_f1, spans

TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"]
DATA = SimpleNamespace(tags=TAGS)  # what evaluate needs of a Dataset with slots
pytestmark = pytest.mark.filterwarnings("ignore")  # seqeval and scikit-learn warn where a class is absent


def test_spans_agree_with_seqeval(rng):
    """Malformed sequences are included: an I- may follow anything."""
    for _ in range(2000):
        tags = [TAGS[i] for i in rng.integers(len(TAGS), size=rng.integers(1, 12))]
        assert sorted(spans(tags)) == sorted((start, end + 1, name) for name, start, end in get_entities(tags))


@given(st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=10), min_size=1))
def test_span_f1_agrees_with_seqeval(pairs):
    gold, predicted = ([[pair[i] for pair in sentence] for sentence in pairs] for i in (0, 1))
    assert span_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, zero_division=0))


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=1, max_size=30))
def test_f1_and_matthews_agree_with_scikit_learn(pairs):
    gold, predicted = np.array(pairs).T
    assert f1(gold, predicted) == pytest.approx(sklearn_f1(gold, predicted, pos_label="1", zero_division=0))
    assert matthews(gold, predicted) == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-9)


def slow_evaluate(split, labels, word_tags, names):
    """Count words, spans and frames one utterance at a time."""
    gold, offsets = split.word_tags.tolist(), split.word_offsets.tolist()
    intents = frames = words = 0
    wanted, got = [], []
    for i in range(len(labels)):
        mine = range(offsets[i], offsets[i + 1])
        right = [gold[w] == word_tags[w] for w in mine]
        intents += int(split.labels[i]) == labels[i]
        frames += int(split.labels[i]) == labels[i] and all(right)
        words += sum(right)
        wanted.append([names[gold[w]] for w in mine])
        got.append(["O" if word_tags[w] == LOST else names[word_tags[w]] for w in mine])
    return {"intent_acc": 100 * intents / len(labels), "slot_f1": 100 * f1_score(wanted, got, zero_division=0),
            "frame_acc": 100 * frames / len(labels), "slot_token_acc": 100 * words / len(gold)}  # fmt: skip


def tagged_split(labels, counts, tags):
    """Return a Split with these labels, numbers of words and word tags."""
    return Split(torch.zeros(len(labels)), torch.arange(len(labels) + 1), torch.as_tensor(labels), pad=0,
                 word_tags=torch.as_tensor(tags), word_offsets=torch.as_tensor(np.cumsum([0, *counts])))  # fmt: skip


def test_evaluate_agrees_with_its_slow_twin(rng):
    """Some predicted words are LOST, because the input was cut off."""
    for _ in range(50):
        counts = rng.integers(1, 6, size=20)
        split = tagged_split(rng.integers(3, size=20), counts, rng.integers(len(TAGS), size=counts.sum()))
        gold = split.word_tags.numpy()
        word_tags = np.where(rng.random(len(gold)) < 0.9, gold, rng.integers(LOST, len(TAGS), size=len(gold)))
        labels = np.where(rng.random(20) < 0.9, split.labels.numpy(), 0)
        got, wanted = evaluate(DATA, split, labels, word_tags), slow_evaluate(split, labels, word_tags, TAGS)
        assert got == pytest.approx(wanted)


@pytest.mark.parametrize(("gold", "predicted", "wanted"), [
    ([0, 1], [LOST, 1], (100, 0, 50)),  # a lost word is wrong, even where its tag is O
    ([5, 0], [1, 0], (0, 0, 50)),  # the head has no output for a tag that train lacks
    ([1, 2, 2, 0], [1, 2, 0, 0], (0, 0, 75)),  # most words are right, and no span is
])  # fmt: skip
def test_slot_metrics_of_one_utterance(gold, predicted, wanted):
    metrics = evaluate(DATA, tagged_split([0], [len(gold)], gold), np.array([0]), np.array(predicted))
    assert (metrics["slot_f1"], metrics["frame_acc"], metrics["slot_token_acc"]) == wanted


@pytest.mark.parametrize("labels", [["0", "1"], ["1", "0"]])
def test_f1_is_of_the_label_1_whatever_its_id(labels):
    data = SimpleNamespace(labels=labels, metrics=("accuracy", "f1"))
    gold, predicted = ([labels.index(label) for label in row] for row in ("1100", "1000"))
    split = Split(torch.zeros(4), torch.arange(5), torch.tensor(gold), pad=0)
    assert evaluate(data, split, np.array(predicted), None) == pytest.approx({"accuracy": 75, "f1": 100 * 2 / 3})
