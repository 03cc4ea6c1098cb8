"""Span F1 is seqeval's (conlleval's); the other numbers agree with loops over words."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from seqeval.metrics import f1_score
from seqeval.metrics.sequence_labeling import get_entities
from sklearn.metrics import f1_score as sklearn_f1
from sklearn.metrics import matthews_corrcoef

from data import LOST, Split
from metrics import evaluate, f1, matthews, span_f1, spans

TAGS = ["O", "B-a", "I-a", "B-b", "I-b", "B-a-b", "I-a-b"]
DATA = SimpleNamespace(tags=TAGS)  # what evaluate needs of a Dataset with slots


def test_spans_agree_with_seqeval_on_random_sequences(rng):
    for _ in range(5000):  # malformed ones included: an I- may follow anything
        tags = [TAGS[i] for i in rng.integers(len(TAGS), size=rng.integers(1, 12))]
        assert sorted(spans(tags)) == sorted((start, end + 1, name) for name, start, end in get_entities(tags))


@settings(max_examples=200)
@given(st.lists(st.lists(st.tuples(st.sampled_from(TAGS), st.sampled_from(TAGS)), min_size=1, max_size=10), min_size=1))
@pytest.mark.filterwarnings("ignore")  # seqeval warns where there are no spans
def test_span_f1_agrees_with_seqeval(pairs):
    gold = [[g for g, _ in sentence] for sentence in pairs]
    predicted = [[p for _, p in sentence] for sentence in pairs]
    assert span_f1(gold, predicted) == pytest.approx(f1_score(gold, predicted, zero_division=0))


def slow_evaluate(split, labels, word_tags, names):
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
            "frame_acc": 100 * frames / len(labels), "slot_token_acc": 100 * words / len(gold)}


def test_evaluate_agrees_with_a_slow_twin(rng):
    for _ in range(50):
        counts = rng.integers(1, 6, size=20)
        split = Split(torch.zeros(20), torch.arange(21), torch.as_tensor(rng.integers(3, size=20)), pad=0,
                      word_tags=torch.as_tensor(rng.integers(len(TAGS), size=counts.sum())),
                      word_offsets=torch.as_tensor(np.cumsum([0, *counts])))
        gold = split.word_tags.numpy()
        word_tags = np.where(rng.random(len(gold)) < 0.9, gold, rng.integers(LOST, len(TAGS), size=len(gold)))
        labels = np.where(rng.random(20) < 0.9, split.labels.numpy(), 0)
        got, wanted = evaluate(DATA, split, labels, word_tags), slow_evaluate(split, labels, word_tags, TAGS)
        assert got == pytest.approx(wanted)


def one_utterance(tags):
    return Split(torch.zeros(1), torch.arange(2), torch.tensor([0]), pad=0, word_tags=torch.tensor(tags),
                 word_offsets=torch.tensor([0, len(tags)]))


def test_a_lost_word_is_an_error_even_where_its_tag_is_o():
    metrics = evaluate(DATA, one_utterance([0, 1]), np.array([0]), np.array([LOST, 1]))
    assert metrics == {"intent_acc": 100, "slot_f1": 100, "frame_acc": 0, "slot_token_acc": 50}


def test_a_tag_that_train_lacks_is_an_error():
    """The head has outputs for the first 3 tags only, so whatever it says of a word with tag 5 is wrong."""
    metrics = evaluate(DATA, one_utterance([5, 0]), np.array([0]), np.array([1, 0]))
    assert metrics == {"intent_acc": 100, "slot_f1": 0, "frame_acc": 0, "slot_token_acc": 50}


def test_token_accuracy_is_not_span_f1():
    """The paper's code reports the first under the name of the second."""
    gold, predicted = ["B-a", "I-a", "I-a", "O"], ["B-a", "I-a", "O", "O"]
    assert span_f1([gold], [predicted]) == 0
    split = one_utterance([TAGS.index(tag) for tag in gold])
    metrics = evaluate(DATA, split, np.array([0]), np.array([TAGS.index(tag) for tag in predicted]))
    assert metrics["slot_token_acc"] == 75 and metrics["slot_f1"] == 0


# ---- classification


@given(st.lists(st.tuples(st.sampled_from("01"), st.sampled_from("01")), min_size=1, max_size=30))
@pytest.mark.filterwarnings("ignore")  # scikit-learn warns where a class is absent
def test_f1_and_matthews_agree_with_scikit_learn(pairs):
    gold, predicted = np.array(pairs).T
    assert f1(gold, predicted) == pytest.approx(sklearn_f1(gold, predicted, pos_label="1", zero_division=0))
    assert matthews(gold, predicted) == pytest.approx(matthews_corrcoef(gold, predicted), abs=1e-9)


@pytest.mark.parametrize("labels", [["0", "1"], ["1", "0"]])
def test_classification_has_the_metrics_of_its_dataset_whatever_the_order_of_labels(labels):
    """Ids depend on which labels train has; the F1 is that of the label "1" all the same."""
    data = SimpleNamespace(labels=labels, metrics=("accuracy", "f1"))
    gold, predicted = ([labels.index(label) for label in row] for row in ("1100", "1000"))
    split = Split(torch.zeros(4), torch.arange(5), torch.tensor(gold), pad=0)
    metrics = evaluate(data, split, np.array(predicted), None)
    assert metrics == pytest.approx({"accuracy": 75, "f1": 100 * 2 / 3})
