"""Numbers about predictions. `slot_f1` is over spans, as conlleval counts them."""

from itertools import pairwise

import numpy as np


def spans(tags):
    """{(first word, last word + 1, name)} of a BIO sequence. Like conlleval, an I-x that continues no x opens a span.

    tags: list of "O", "B-x" or "I-x".
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
    """Share of equal entries of two (N,) integer arrays."""
    return float(np.mean(gold == predicted))


def span_f1(gold, predicted):
    """Micro-averaged F1 over the spans of two lists of tag sequences: 2·TP / (gold + predicted); 0 without any span."""
    right = total = 0
    for wanted, got in zip(gold, predicted, strict=True):
        wanted, got = spans(wanted), spans(got)
        right += len(wanted & got)
        total += len(wanted) + len(got)
    return 2 * right / total if total else 0.0


def evaluate(split, labels, word_tags, tag_names):
    """Metrics of predictions on a split, in percent.

    labels: (N,) predicted; word_tags: (W,) predicted, LOST for a word without prediction, or None (classification).
    tag_names: the name of each tag id, those included that only dev or test have.
    A lost word has no tag: it breaks every span it is in, and is wrong even where O was right.
    """
    gold_labels = split.labels.cpu().numpy()
    if word_tags is None:
        return {"accuracy": 100 * accuracy(gold_labels, labels)}
    gold, offsets = split.word_tags.cpu().numpy(), split.word_offsets.cpu().numpy()
    wrong_words = np.add.reduceat(gold != word_tags, offsets[:-1])  # every utterance has at least one word
    frames = (gold_labels == labels) & (wrong_words == 0)
    names = [*tag_names, "O"]  # LOST is -1, the last: as a span boundary it reads as O

    def utterances(ids):
        return [[names[tag] for tag in ids[a:b]] for a, b in pairwise(offsets)]

    return {
        "intent_acc": 100 * accuracy(gold_labels, labels),
        "slot_f1": 100 * span_f1(utterances(gold), utterances(word_tags)),
        "frame_acc": 100 * float(np.mean(frames)),
        "slot_token_acc": 100 * accuracy(gold, word_tags),
    }
