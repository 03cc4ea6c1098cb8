"""Datasets are loaded, encoded and batched as promised. Fast code agrees with slow, obvious twins."""

from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import pytest
from conftest import refused_with, write
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from bench import padding
from data import IGNORE, Sample, batches, demo, digest, encode, hold_out, load, load_tokenizer, read, sorted_batches
from data.encoding import PROBES

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
    one, two = (batches(lengths, everything, 8, rng) for _ in range(2))
    assert not any(map(np.array_equal, one, two))
    assert padding(lengths, one) < 0.05
    assert padding(lengths, rng.permutation(everything).reshape(-1, 8)) > 0.2


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
    """Return the ids and tags of one utterance, word by word."""
    ids, out = [tokenizer.cls_token_id], [IGNORE]
    for word, tag in zip(words, tags):
        pieces = tokenizer(word, add_special_tokens=False)["input_ids"]
        pieces = (pieces or [tokenizer.unk_token_id])[: max_length - 1 - len(ids)]
        ids += pieces
        out += [tag, *[IGNORE] * (len(pieces) - 1)][: len(pieces)]
    return [*ids, tokenizer.sep_token_id], [*out, IGNORE]


@pytest.mark.parametrize("max_length", [6, 128])
def test_encoding_agrees_with_a_slow_twin(tokenizer, max_length):
    """Each word's first sub-token carries its tag, also where words are cut off or dropped by the tokenizer."""
    samples = demo.generate()["train"][:300]  # the tokenizer drops zero-width and control characters
    samples[0] = Sample(["\u200b", "wake", "\x00", "me"], "an unknown label", ["O", "an unknown tag", "O", "O"])
    tag_ids = {tag: i for i, tag in enumerate({tag for sample in samples[1:] for tag in sample.tags})}
    label_ids = {label: i for i, label in enumerate({sample.label for sample in samples[1:]})}
    split = encode(samples, tokenizer, max_length, label_ids, tag_ids)
    batch, truncated = split.batch(np.arange(300)), 0
    for i, (words, label, tags, _) in enumerate(samples):
        numbers = [tag_ids.get(tag, len(tag_ids)) for tag in tags]
        ids, wanted = slow_encoding(words, numbers, tokenizer, max_length)
        padded = batch.mask.shape[1] - len(ids)
        truncated += len(slow_encoding(words, tags, tokenizer, 999)[0]) > max_length
        assert split.lengths[i] == len(ids)
        assert batch.tokens[i].tolist() == ids + [tokenizer.pad_token_id] * padded
        assert batch.tags[i].tolist() == wanted + [IGNORE] * padded
        assert batch.mask[i].tolist() == [True] * len(ids) + [False] * padded
        assert batch.labels[i] == label_ids.get(label, len(label_ids))
    assert split.truncated == truncated and bool(truncated) == (max_length == 6)
    assert split.tokens.element_size() == 4  # some vocabularies have more than 2¹⁵ tokens
    assert batch.tokens[0, 1] == batch.tokens[0, 3] == tokenizer.unk_token_id


def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer):
    """Both texts of a pair arrive, with their segments."""
    pairs = [("wake me", "at seven"), ("play jazz", "now please now")]
    split = encode([Sample(pair, "a") for pair in pairs], tokenizer, 128, {"a": 0}, {})
    batch, wanted = split.batch(np.arange(2)), tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert batch.tokens.tolist() == wanted["input_ids"].tolist()
    assert batch.types.tolist() == wanted["token_type_ids"].tolist()
    assert batch.tags is None
    with refused_with("--max-length 3: take at least 4"):  # the tokenizer would not cut anything then
        encode([Sample(pairs[0], "a")], tokenizer, 3, {"a": 0}, {})


SENTENCES = ["wake me up at 7:30", "play some jazz", "what's the weather like", "text mom that i'm late", "up up up"]


@pytest.mark.parametrize(("pre_tokenizer", "fits"), [
    (pre_tokenizers.ByteLevel(add_prefix_space=True), True),  # RoBERTa's
    (pre_tokenizers.ByteLevel(add_prefix_space=False), True),  # ModernBERT's, which is mended
    (pre_tokenizers.Metaspace(), True),  # XLM-R's
    (pre_tokenizers.Split(" ", "merged_with_previous"), False),  # Gemma's: blanks are letters
])  # fmt: skip
def test_words_are_tokenised_as_in_text(tmp_path, pre_tokenizer, fits):
    """A pretrained encoder sees the words of slot data as it saw them in text. Else it is refused."""
    made = Tokenizer(BPE(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizer
    made.train_from_iterator(SENTENCES, BpeTrainer(special_tokens=["<pad>", "<unk>"], show_progress=False,
                                                   initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))  # fmt: skip
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", unk_token="<unk>").save_pretrained(tmp_path)
    tokenizer, words = load_tokenizer(tmp_path), [text.split() for text in SENTENCES]
    assert len(encode([Sample(text, "a") for text in SENTENCES], tokenizer, 99, {}, {})) == 5  # texts are always fine
    with nullcontext() if fits else refused_with(f"{tmp_path}.*words"):
        split = encode([Sample(row, "a", ["O"] * len(row)) for row in words], tokenizer, 99, {}, {})
        assert split.tokens.tolist() == [i for ids in tokenizer(SENTENCES)["input_ids"] for i in ids]


def test_words_are_lost_at_the_end_only(tiny, tmp_path):
    """Predicted tags go to words from the first on, so no other word may be lost."""
    AutoTokenizer.from_pretrained(tiny, truncation_side="left").save_pretrained(tmp_path)
    assert load_tokenizer(tmp_path).truncation_side == "right"
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.train_from_iterator(["".join(PROBES)], BpeTrainer(special_tokens=["<pad>"], show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>").save_pretrained(tmp_path)
    with refused_with(r"drops \['é'\]"):
        encode([Sample(["we", "é", "a"], "a", ["O"] * 3)], load_tokenizer(tmp_path), 99, {}, {})


# ---- what a user is told


def tables(**splits):
    """Return .tsv files of {split: [label, …]}, with the texts "x 0", "x 1", …, as {name: lines}."""
    return {f"{split}.tsv": ["text\tlabel", *(f"x {i} now please\t{label}" for i, label in enumerate(labels))]
            for split, labels in splits.items()}  # fmt: skip


def test_what_a_user_may_not_expect_is_said(tmp_path, tokenizer, capsys):
    """One label only, labels and tags that train lacks, and texts that are cut off."""
    folder = str(write(tmp_path / "a", tables(train=["on"] * 16, dev=["on", "On", "off"])))
    assert load(folder, tokenizer, max_length=4).labels == ["on"]  # a head has no output for the others
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(line.startswith(f"{tmp_path}/a: ") for line in said)
    assert "'on'" in said[0] and "16 of 16 train" in said[1] and "2 of 3 dev" in said[2] and "3 of 3 dev" in said[3]
    for split, tags in (("train", "O O B-x"), ("dev", "B-y I-y B-x")):
        write(tmp_path / "b" / split, {"seq.in": "a b c", "seq.out": tags, "label": "on"})
    load(str(tmp_path / "b"), tokenizer)
    (said,) = capsys.readouterr().out.splitlines()
    assert "2 dev words have a tag" in said


@pytest.mark.parametrize(("splits", "tune", "left"), [
    ({"dev": "ab", "test": ["-1", "-1"]}, False, {"train": 20, "dev": 2}),
    ({"dev": ["-1"], "test": "ab"}, False, {"train": 18, "dev": 2, "test": 2}),
    ({"dev": "ac", "test": "bc"}, False, {"train": 20, "dev": 2, "test": 2}),
    ({}, False, {"train": 18, "dev": 2}),
    ({"dev": "a", "test": "b"}, True, {"train": 18, "dev": 2}),
])  # fmt: skip
def test_a_split_without_known_labels_is_left_out_and_dev_held_out(tmp_path, capsys, splits, tune, left):
    """Test sets are often published with the label -1. --tune reads neither dev nor test. Sample.row finds each sample
    again in the user's file."""
    got = read(str(write(tmp_path, tables(train="ab" * 10, **splits))), tune=tune)
    said, held_out = capsys.readouterr().out, left["train"] == 18
    assert {name: len(split) for name, split in got.items()} == left
    assert ("left out" in said) == ("-1" in str(splits)) and ("held out" in said) == held_out
    samples = sorted(got["train"] + got["dev"] * held_out, key=lambda sample: sample.row)
    assert [sample.text for sample in samples] == [f"x {row} now please" for row in range(20)]


def test_equal_texts_are_held_out_together():
    """Else dev would hold what train has shown."""
    samples = [Sample(["play", str(i % 30)], "a", ["O", "O"]) for i in range(90)]
    train, dev = hold_out(samples, 0.1)
    assert len(dev) == 9 and len(train) == 81 and not {str(s.text) for s in train} & {str(s.text) for s in dev}


def test_max_train_draws_at_random_and_keeps_the_order(tmp_path):
    """The first N of a sorted file would be of one label. The draw does not depend on the seed."""
    folder = str(write(tmp_path, tables(train="a" * 20 + "b" * 20, dev="a")))
    first, second = ([sample.row for sample in read(folder, max_train=20)["train"]] for _ in range(2))
    assert first == second == sorted(first) and 3 < sum(row < 20 for row in first) < 17


# ---- demo


def test_demo_errors_are_where_it_says(monkeypatch):
    """planted_errors lists just the samples whose annotation is wrong, and errors_found counts them."""
    spoiled = demo.generate()["train"]
    monkeypatch.setattr(demo, "spoil", lambda _, sample: sample)
    clean = demo.generate()["train"]
    differs = [one.row for one, other in zip(spoiled, clean) if one != other]
    assert differs == demo.planted_errors().tolist() and len(differs) == 20
    assert [sample.text for sample in spoiled] == [sample.text for sample in clean]
    scores = np.isin(np.arange(len(clean)), differs).astype(float)
    assert demo.errors_found(scores) == (20, 20) and demo.errors_found(-scores) == (0, 20)


def test_demo_is_as_it_was():
    """The published figures are of this data. Python's hash seed changes nothing."""
    assert digest(demo.generate()).startswith("d5fed04449ee71d2")
