"""Numbers about predictions. `slot_f1` is over spans, as conlleval counts them."""

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


def evaluate(data, name, labels, tags):
    """Return metrics of predictions on the split `name` of a Dataset, in percent.

    labels: (N,) ids. tags: for each sample the ids of its words. The last words may lack one. A word without a
    prediction breaks every span it is in, and is wrong even where O was right.
    """
    gold = data.gold[name]
    wanted_labels, labels = np.array([sample.label for sample in gold]), np.array(data.labels)[labels]
    if not data.tags:
        return {metric: 100 * CLASSIFICATION[metric](wanted_labels, labels) for metric in data.metrics}
    wanted = [sample.tags for sample in gold]
    found = [[data.tags[tag] for tag in row] for row in tags]
    found = [row + ["O-lost"] * (len(own) - len(row)) for row, own in zip(found, wanted)]  # no span, and not O
    frames = [label == own and row == names for label, own, row, names in zip(labels, wanted_labels, found, wanted)]
    right = [tag == own for row, names in zip(found, wanted) for tag, own in zip(row, names)]
    return {"intent_acc": 100 * accuracy(wanted_labels, labels), "slot_f1": 100 * span_f1(wanted, found),
            "frame_acc": 100 * float(np.mean(frames)), "slot_token_acc": 100 * float(np.mean(right))}  # fmt: skip
