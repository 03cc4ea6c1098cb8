"""The model's parts do what they say: losses, heads, inference, predict, save and load."""

from functools import partial

import numpy as np
import pytest
from conftest import refused_with
from torch.nn import functional as F

from data import IGNORE, Sample, encode, load_tokenizer, sorted_batches
from models import NLUModel, build_model, losses, predictions


def test_losses_agree_with_one_utterance_at_a_time(model, demo_data):
    """½ intent + ½ sum over words, as in the paper."""
    batch = demo_data.train.batch(np.arange(40))
    logits, tag_logits = outputs = model.eval()(batch)
    for i, loss in enumerate(losses(outputs, batch)):
        words = (batch.tags[i] != IGNORE).nonzero().flatten()
        slots = sum(F.cross_entropy(tag_logits[i, t], batch.tags[i, t]).item() for t in words)
        intent = F.cross_entropy(logits[i], batch.labels[i]).item()
        assert loss.item() == pytest.approx(0.5 * intent + 0.5 * slots, rel=1e-5)


def test_predictions_are_in_dataset_order_without_words_that_were_cut_off(model, tokenizer, monkeypatch):
    monkeypatch.setattr("models.sorted_batches", partial(sorted_batches, tokens=12))  # several batches
    texts = [["play", "\u200b", "jazz"], ["wake", "me", "up", "at", "seven"], ["stop"]]
    samples = [Sample(words, "x", ["O"] * len(words)) for words in texts]
    labels, tags = predictions(model, encode(samples, tokenizer, 6, {}, {}))
    assert list(map(len, tags)) == [3, 4, 1]  # "seven" is cut off
    for i, sample in enumerate(samples):
        label, (row,) = predictions(model, encode([sample], tokenizer, 6, {}, {}))
        assert label == labels[i] and row.tolist() == tags[i].tolist()


# ---- predict

TEXTS = ["wake me up at seven", "play some jazz", "", " ", "stop"]
INPUTS = {"joint": TEXTS, "text": TEXTS, "pairs": [("a cat", "an animal"), ["a dog", ""]]}


@pytest.fixture
def kinds(model):
    """{name: model} of the three tasks, which share an encoder."""
    own = model.encoder, model.tokenizer, ["no", "maybe", "yes"]
    return {"joint": model.eval(), "text": NLUModel(*own).eval(), "pairs": NLUModel(*own, pairs=True).eval()}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("form", [iter, np.array])
def test_predict_takes_any_iterable(kinds, kind, form):
    """An iterator or an array, an empty text among them, or nothing at all."""
    predict, texts = kinds[kind].predict, INPUTS[kind]
    wanted = [predict([text])[0] for text in texts]
    assert predict(form(texts)) == wanted and predict(form([])) == []
    words = [[word for word, _ in row] for _, row in wanted]
    assert words == [text.split() if kind == "joint" else [] for text in texts]


@pytest.mark.parametrize(("kind", "texts"), [("text", ["a\nb\n"]), ("pairs", [("a\r\nb", "c")])])
def test_predict_takes_line_breaks_as_the_readers_do(kinds, monkeypatch, kind, texts):
    """A byte-level tokenizer gives them ids of their own, which no reader lets through."""
    seen = []
    monkeypatch.setattr("models.encode", lambda samples, *args: seen.extend(samples) or encode(samples, *args))
    kinds[kind].predict(texts)
    assert seen[0].text in ("a b", ("a b", "c"))


@pytest.mark.parametrize(("kind", "texts"), [
    ("joint", "one string"), ("joint", b"bytes"), ("joint", 7), ("joint", None), ("joint", [None]), ("joint", [["a"]]),
    ("text", [b"a"]), ("pairs", ["ab"]), ("pairs", ("a", "b")), ("pairs", [("a", "b", "c")]), ("pairs", [("a", 1)]),
])  # fmt: skip
def test_predict_refuses_anything_else_with_a_type_error(kinds, kind, texts):
    with pytest.raises(TypeError):
        kinds[kind].predict(texts)


# ---- save and load


def test_a_saved_model_takes_all_words_and_works_as_model(model, demo_data, tmp_path):
    """Also words that the tokenizer drops, and words beyond the longest input."""
    model.save(tmp_path)
    again = NLUModel.load(tmp_path)
    assert [word for word, _ in again.predict(["\u200b jazz"])[0][1]] == ["\u200b", "jazz"] and not again.training
    assert again.predict([" ".join(["seven"] * 200)])[0][1][-1] == ("seven", "O")
    assert build_model(str(tmp_path), load_tokenizer(str(tmp_path)), demo_data, seed=0)


def test_what_cannot_be_loaded_or_saved_is_refused_in_one_line(model, tmp_path):
    model.save(tmp_path)
    for content in ("", "[]", '{"labels": "x", "tags": []}', '{"labels": [1], "tags": []}', "\xff"):
        (tmp_path / "labels.json").write_text(content, encoding="latin-1")
        with refused_with():
            NLUModel.load(tmp_path)
    with refused_with(error=OSError):
        model.save(tmp_path / "labels.json" / "model")
