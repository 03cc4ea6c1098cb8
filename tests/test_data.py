"""Datasets are loaded, encoded and batched as promised. Fast code agrees with slow, obvious twins."""

import hashlib
import json
from itertools import pairwise

import numpy as np
import pytest
import tokenizers
from conftest import one_line, write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench import padding
from data import IGNORE, LOST, ModelError, Samples, batches, demo, encode, load, load_tokenizer, read, sorted_batches
from data.encoding import number_names

# ---- batches


@given(st.lists(st.integers(1, 60), min_size=1, max_size=300), st.integers(1, 64), st.integers(0, 2**32))
def test_batches_hold_every_chosen_index_once_and_are_of_one_size(lengths, size, seed):
    """An epoch visits each chosen sample once, in as few batches as possible. The same seed gives the same batches."""
    chosen = np.unique([0, *np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.7)])
    one, two = (batches(np.array(lengths), chosen, size, np.random.default_rng(seed), window=3) for _ in range(2))
    assert sorted(np.concatenate(one)) == list(chosen) and len(one) == -(-len(chosen) // size)
    assert max(map(len, one)) - min(map(len, one)) <= 1
    assert all(map(np.array_equal, one, two))


def test_batches_are_shuffled_and_hardly_padded(demo_data, rng):
    """Sorting by length saves most of the padding. Two epochs have no batch in common."""
    lengths, everything = demo_data.train.lengths, np.arange(len(demo_data.train))
    one, two = (batches(lengths, everything, 32, rng) for _ in range(2))
    assert not any(map(np.array_equal, one, two))
    assert padding(lengths, one) < 0.05
    assert padding(lengths, rng.permutation(everything).reshape(-1, 32)) > 0.2


def test_no_sample_weighs_more_because_of_its_length(rng):
    """In the mean over a batch, a sample weighs 1 / B. A short last batch would favour the shortest texts."""
    lengths, weights = np.arange(1010) // 10 + 3, np.zeros(1010)
    for _ in range(400):
        for batch in batches(lengths, np.arange(1010), 64, rng):
            weights[batch] += 1 / len(batch) / 400
    assert weights[:101].mean() == pytest.approx(weights[-101:].mean(), rel=2e-3)


def test_batches_for_inference_start_with_the_longest_and_have_a_limit(demo_data):
    """No batch of inference needs more memory than the first, nor more than the limit."""
    split, lengths = demo_data.evaluation["dev"], demo_data.evaluation["dev"].lengths
    batch_list = sorted_batches(split, tokens=200)
    assert np.concatenate(batch_list).tolist() == np.argsort(-lengths, kind="stable").tolist()
    for batch, following in pairwise(batch_list):
        most = 200 // lengths[batch].max()
        assert len(batch) == most if most <= 16 else most - 16 < len(batch) <= most and len(batch) % 16 == 0
        assert lengths[following].max() <= lengths[batch].max()
    assert all(len(batch) == 1 for batch in sorted_batches(split, tokens=1))


# ---- encoding


def slow_encoding(words, tags, tokenizer, max_length):
    """Return the ids and tags of one utterance, word by word, and whether each word was cut off."""
    ids, out, lost = [tokenizer.cls_token_id], [IGNORE], []
    for word, tag in zip(words, tags):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces = (pieces or [tokenizer.unk_token_id])[: max_length - 1 - len(ids)]
        lost.append(not pieces)
        ids += pieces
        out += [tag, *[IGNORE] * (len(pieces) - 1)][: len(pieces)]
    return [*ids, tokenizer.sep_token_id], [*out, IGNORE], lost


@pytest.mark.parametrize("max_length", [6, 128])
def test_encoding_agrees_with_a_slow_twin(tokenizer, max_length):
    """Each word's first sub-token carries its tag, also where words are cut off or dropped by the tokenizer."""
    samples = demo.generate()["train"].take(range(300))
    samples.texts[0] = ["\u200b", "wake", "\x00", "me"]  # the tokenizer drops zero-width and control characters
    samples.tags[0] = ["O", "O", "O", "O"]
    tag_ids, _ = number_names((tag for tags in samples.tags for tag in tags), [])
    label_ids, _ = number_names(samples.labels, [])
    split = encode(samples, tokenizer, max_length, label_ids, tag_ids)
    batch, lost, truncated = split.batch(np.arange(300)), [], 0
    for i, (words, tags) in enumerate(zip(samples.texts, samples.tags)):
        ids, wanted, gone = slow_encoding(words, [tag_ids[tag] for tag in tags], tokenizer, max_length)
        padded = batch.mask.shape[1] - len(ids)
        lost += gone
        truncated += len(slow_encoding(words, tags, tokenizer, 999)[0]) > max_length
        assert split.lengths[i] == len(ids)
        assert batch.tokens[i].tolist() == ids + [tokenizer.pad_token_id] * padded
        assert batch.tags[i].tolist() == wanted + [IGNORE] * padded
        assert batch.mask[i].tolist() == [True] * len(ids) + [False] * padded
    assert (split.word_starts.numpy() == LOST).tolist() == lost
    assert split.truncated == truncated and bool(truncated) == (max_length == 6)
    assert not any(lost[:4]) and batch.tokens[0, 1] == batch.tokens[0, 3] == tokenizer.unk_token_id


def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer):
    """Both texts of a pair arrive, with their segments."""
    pairs = [("wake me", "at seven"), ("play jazz", "now please now")]
    split = encode(Samples(pairs, ["a", "b"]), tokenizer, 128, {"a": 0, "b": 1}, {})
    batch, wanted = split.batch(np.arange(2)), tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert batch.tokens.tolist() == wanted["input_ids"].tolist()
    assert batch.types.tolist() == wanted["token_type_ids"].tolist()
    assert batch.tags is None


SENTENCES = ["wake me up at 7:30", "play some jazz", "what's the weather like", "text mom that i'm late", "up up up"]


def trained(folder, model, trainer, pre_tokenizer, normalizer=None):
    """Write a small tokenizer of some kind to a folder. Returns the folder."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator(SENTENCES * 3, trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>").save_pretrained(folder)
    return folder


def kinds():
    """Return {name of a kind of tokenizer: arguments of `trained`}."""
    special = {"special_tokens": ["<pad>", "<unk>"], "vocab_size": 400, "show_progress": False}
    byte_bpe = trainers.BpeTrainer(**special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return {
        "byte-level (RoBERTa)": (models.BPE(), byte_bpe, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "byte-level without blank (ModernBERT)": (models.BPE(), byte_bpe, pre_tokenizers.ByteLevel(False)),
        "sentencepiece (XLM-R)": (models.Unigram(), trainers.UnigramTrainer(**special, unk_token="<unk>"),
                                  pre_tokenizers.Metaspace()),
        "blanks as letters (Gemma)": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**special),
                                      pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_words_are_tokenised_as_in_text(tmp_path, kind):
    """A pretrained encoder sees the words of slot data as it saw them in text. Else it is refused."""
    tokenizer = load_tokenizer(trained(tmp_path, *kinds()[kind]))
    words, labels = [text.split() for text in SENTENCES], ["a"] * len(SENTENCES)
    samples = Samples(words, labels, [["O"] * len(row) for row in words])
    assert len(encode(Samples(SENTENCES, labels), tokenizer, 99, {"a": 0}, {})) == 5  # texts are always fine
    if "Gemma" in kind:
        with one_line(ModelError, f"{tmp_path}.*words"):
            encode(samples, tokenizer, 99, {"a": 0}, {"O": 0})
    else:
        split = encode(samples, tokenizer, 99, {"a": 0}, {"O": 0})
        assert split.tokens.tolist() == [i for ids in tokenizer(SENTENCES)["input_ids"] for i in ids]


# ---- what a user is told


def tables(**splits):
    """Return .tsv files of {split: [label, …]}, with the texts "x 0", "x 1", …, as {name: lines}."""
    return {f"{split}.tsv": ["text\tlabel", *(f"x {i} now please\t{label}" for i, label in enumerate(labels))]
            for split, labels in splits.items()}  # fmt: skip


def test_what_a_user_may_not_expect_is_said(tmp_path, tokenizer, capsys):
    """One label only, labels and tags that train lacks, and texts that are cut off."""
    load(str(write(tmp_path / "a", tables(train=["on"] * 16, dev=["on", "On", "off"]))), tokenizer, max_length=4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(line.startswith(f"{tmp_path}/a: ") for line in said)
    assert "'on'" in said[0] and "16 of 16 train" in said[1] and "2 of 3 dev" in said[2] and "3 of 3 dev" in said[3]
    for split, tags in (("train", "O O B-x"), ("dev", "B-y I-y B-x")):
        write(tmp_path / "b" / split, {"seq.in": "a b c", "seq.out": tags, "label": "on"})
    load(str(tmp_path / "b"), tokenizer)
    (said,) = capsys.readouterr().out.splitlines()
    assert "2 dev words have a tag" in said


@pytest.mark.parametrize(("splits", "left"), [
    ({"dev": "ab", "test": ["-1", "-1"]}, {"train": 20, "dev": 2}),
    ({"dev": ["-1"], "test": "ab"}, {"train": 18, "dev": 2, "test": 2}),
    ({"dev": "ac", "test": "bc"}, {"train": 20, "dev": 2, "test": 2}),
])  # fmt: skip
def test_a_split_without_known_labels_is_no_result(tmp_path, capsys, splits, left):
    """Test sets are often published with the label -1. Such a split is left out, and dev held out if it was dev."""
    got = read(str(write(tmp_path, tables(train="ab" * 10, **splits))))
    assert {name: len(split) for name, split in got.items()} == left
    said = capsys.readouterr().out
    assert ("left out" in said) == (left != {"train": 20, "dev": 2, "test": 2})
    assert ("held out" in said) == (left["train"] == 18)


@pytest.mark.parametrize("tune", [False, True])
def test_a_part_of_train_is_held_out_where_there_is_no_dev_and_to_tune(tmp_path, tune):
    """--tune reads neither dev nor test. Samples.rows finds each sample again in the user's file."""
    splits = read(str(write(tmp_path, tables(train="ab" * 10, **{"dev": "a", "test": "b"} if tune else {}))), tune=tune)
    for samples in splits.values():
        assert samples.texts == [f"x {row} now please" for row in samples.rows]
    assert splits.keys() == {"train", "dev"} and len(splits["dev"]) == 2
    assert sorted(splits["train"].rows + splits["dev"].rows) == list(range(20))


# ---- demo


def test_demo_errors_are_where_it_says(monkeypatch):
    """planted_errors lists just the samples whose annotation is wrong, and errors_found counts them."""
    spoiled = demo.generate()["train"]
    monkeypatch.setattr(demo, "spoil", lambda *_: None)
    clean = demo.generate()["train"]
    differs = [i for i in range(4000) if (spoiled.labels[i], spoiled.tags[i]) != (clean.labels[i], clean.tags[i])]
    assert differs == demo.planted_errors().tolist() and len(differs) == 80
    assert spoiled.texts == clean.texts
    scores = np.isin(np.arange(4000), differs).astype(float)
    assert demo.errors_found(scores) == (80, 80) and demo.errors_found(-scores) == (0, 80)


def test_demo_is_as_it_was():
    """The published figures are of this data. Python's hash seed changes nothing."""
    splits = [[s.texts, s.labels, s.tags] for s in demo.generate().values()]
    assert hashlib.sha256(json.dumps(splits).encode()).hexdigest().startswith("129c7f38944f767e")
