"""Numbers about predictions. `slot_f1` is over spans, as conlleval counts them."""

from itertools import pairwise

import numpy as np


def spans(tags):
    """Return {(first word, last word + 1, name)} of a BIO sequence.

    Like conlleval, an I-x that continues no x opens a span. tags: list of "O", "B-x" or "I-x".
    """
    found, start, name = set(), None, None
    for i, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if name is not None and (prefix != "I" or kind != name):
            found.add((start, i, name))
            name = None
        if prefix != "O" and name is None:
            start, name = i, kind
    return found


def tag_names(split, ids, names):
    """Return the tags of each utterance of a split, as a list of names. ids: (W,) of its words."""
    return [[names[tag] for tag in ids[start:end].tolist()] for start, end in pairwise(split.word_offsets.tolist())]


def accuracy(gold, predicted):
    """Return the share of equal entries of two (N,) arrays."""
    return float(np.mean(gold == predicted))


def span_f1(gold, predicted):
    """Return micro-averaged F1 over the spans of lists of tag sequences, 2·TP / (gold + predicted); 0 without spans."""
    right = total = 0
    for wanted, got in zip(gold, predicted, strict=True):
        wanted, got = spans(wanted), spans(got)
        right += len(wanted & got)
        total += len(wanted) + len(got)
    return 2 * right / total if total else 0.0


def f1(gold, predicted):
    """Return F1 of the label "1" of two (N,) arrays of labels: 2·TP / (gold + predicted); 0 where neither has it."""
    gold, predicted = gold == "1", predicted == "1"
    total = gold.sum() + predicted.sum()
    return float(2 * (gold & predicted).sum() / total) if total else 0.0


def matthews(gold, predicted):
    """Return Matthews' correlation of two (N,) arrays of the labels "0" and "1"; 0 where one of them is constant."""
    constant = len(set(gold)) == 1 or len(set(predicted)) == 1
    return 0.0 if constant else float(np.corrcoef(gold == "1", predicted == "1")[0, 1])


CLASSIFICATION = {"accuracy": accuracy, "f1": f1, "matthews": matthews}


def evaluate(data, split, labels, word_tags):
    """Return metrics of predictions on a split of a Dataset, in percent.

    labels: (N,) predicted; word_tags: (W,) predicted, LOST for a word without prediction, or None (classification).
    A lost word has no tag: it breaks every span it is in, and is wrong even where O was right.
    """
    gold_labels = split.labels.cpu().numpy()
    if word_tags is None:
        classes = np.array(data.labels)
        return {name: 100 * CLASSIFICATION[name](classes[gold_labels], classes[labels]) for name in data.metrics}
    gold = split.word_tags.cpu().numpy()
    wrong_words = np.add.reduceat(gold != word_tags, split.word_offsets[:-1].cpu())  # each utterance has words
    frames = (gold_labels == labels) & (wrong_words == 0)
    names = [*data.tags, "O"]  # LOST is -1, the last: as a span boundary it reads as O
    return {
        "intent_acc": 100 * accuracy(gold_labels, labels),
        "slot_f1": 100 * span_f1(tag_names(split, gold, names), tag_names(split, word_tags, names)),
        "frame_acc": 100 * float(np.mean(frames)),
        "slot_token_acc": 100 * accuracy(gold, word_tags),
    }
