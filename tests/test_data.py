"""Datasets are loaded, encoded and batched as promised. Fast code agrees with slow, obvious twins."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data import IGNORE, LOST, ModelError, Samples, batches, demo, encode, load, load_tokenizer, read, sorted_batches
from data.encoding import number_names

# ---- batches


@given(st.lists(st.integers(1, 60), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 3))
def test_batches_hold_every_index_once(lengths, batch_size, seed):
    """An epoch visits each chosen sample once, in as few batches as possible."""
    lengths = np.array(lengths)
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.7)
    batch_list = batches(lengths, chosen, batch_size, np.random.default_rng(seed), window=3)
    assert sorted(np.concatenate([*batch_list, []])) == list(chosen)
    assert len(batch_list) == -(-len(chosen) // batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in batch_list)


def padding(lengths, batch_list):
    """Return the share of the computed tokens that is padding."""
    return 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batch_list)


def test_batches_are_shuffled_by_seed_and_hardly_padded(demo_data):
    """The same seed gives the same batches. Sorting by length saves most of the padding."""
    lengths, everything = demo_data.train.lengths, np.arange(len(demo_data.train))
    one, same, other = (batches(lengths, everything, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other))
    assert padding(lengths, one) < 0.05
    assert padding(lengths, np.random.default_rng(1).permutation(everything).reshape(-1, 32)) > 0.2


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


def test_ids_above_int16_are_kept(tmp_path):
    """The highest id decides about the type of the arrays, not the size of the vocabulary."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "wake": 2**15 - 1, "me": 2**15}
    made = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    split = encode(Samples(["wake me"], ["a"]), tokenizer, 9, {"a": 0}, {})
    assert split.tokens.tolist() == [2**15 - 1, 2**15]


SENTENCES = ["wake me up at 7:30", "play some jazz", "what's the weather like", "text mom that i'm late", "up up up"]


def trained(folder, model, trainer, pre_tokenizer, normalizer=None):
    """Write a small tokenizer of some kind to a folder. Returns the folder."""
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizer
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator(SENTENCES * 3, trainer)
    special = {"pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=made, **special).save_pretrained(folder)
    return folder


def kinds():
    """Return {name of a kind of tokenizer: arguments of `trained`}."""
    special = {"special_tokens": ["<pad>", "<unk>"], "vocab_size": 400, "show_progress": False}
    byte_bpe = trainers.BpeTrainer(**special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    return {
        "word pieces (BERT)": (models.WordPiece(unk_token="<unk>"), trainers.WordPieceTrainer(**special),
                               pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()),
        "byte-level (RoBERTa)": (models.BPE(), byte_bpe, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        "byte-level without blank (ModernBERT)": (models.BPE(), byte_bpe, pre_tokenizers.ByteLevel(False)),
        "sentencepiece (XLM-R)": (models.Unigram(), trainers.UnigramTrainer(**special, unk_token="<unk>"),
                                  pre_tokenizers.Metaspace()),
        "blanks as letters (Gemma)": (models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**special),
                                      pre_tokenizers.Split(" ", "merged_with_previous"), normalizers.Replace(" ", "▁")),
    }  # fmt: skip


@pytest.mark.parametrize("kind", kinds())
def test_words_are_tokenised_as_in_text(tmp_path, kind):
    """A pretrained encoder sees the words of slot data as it saw them in text; where it would not, it is refused."""
    tokenizer = load_tokenizer(trained(tmp_path, *kinds()[kind]))
    words, labels = [text.split() for text in SENTENCES], ["a"] * len(SENTENCES)
    samples = Samples(words, labels, [["O"] * len(row) for row in words])
    assert len(encode(Samples(SENTENCES, labels), tokenizer, 99, {"a": 0}, {})) == 5  # texts are always fine
    if "Gemma" in kind:
        with pytest.raises(ModelError, match=f"{tmp_path}.*words"):
            encode(samples, tokenizer, 99, {"a": 0}, {"O": 0})
    else:
        split = encode(samples, tokenizer, 99, {"a": 0}, {"O": 0})
        assert split.tokens.tolist() == [i for ids in tokenizer(SENTENCES)["input_ids"] for i in ids]


def test_names_only_test_has_come_after_those_of_train():
    """A head has outputs for the names of train alone."""
    ids, n = number_names(["b", "a", "b"], ["c", "a", "0"])
    assert ids == {"a": 0, "b": 1, "0": 2, "c": 3} and n == 2


# ---- what a user is told


def write_tables(folder, **splits):
    """Write .tsv files from {split: [label, …]}, with the texts "x 0", "x 1", …"""
    for split, labels in splits.items():
        rows = [f"x {i} now please\t{label}" for i, label in enumerate(labels)]
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *rows]))
    return str(folder)


def test_what_a_user_may_not_expect_is_said(tmp_path, tokenizer, capsys):
    """One label only, labels and tags that train lacks, and texts that are cut off."""
    load(write_tables(tmp_path, train=["on"] * 16, dev=["on", "On", "off"]), tokenizer, max_length=4)
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 4 and all(line.startswith(str(tmp_path)) for line in said)
    assert "'on'" in said[0] and "16 of 16 train" in said[1] and "2 of 3 dev" in said[2] and "3 of 3 dev" in said[3]
    for split, tags in (("train", "O O B-x"), ("dev", "B-y I-y B-x")):
        (tmp_path / "joint" / split).mkdir(parents=True)
        for file, text in (("seq.in", "a b c"), ("seq.out", tags), ("label", "on")):
            (tmp_path / "joint" / split / file).write_text(text)
    load(str(tmp_path / "joint"), tokenizer)
    (said,) = capsys.readouterr().out.splitlines()
    assert "2 dev words have a tag" in said


@pytest.mark.parametrize(("splits", "left"), [
    ({"dev": "ab", "test": ["-1", "-1"]}, {"train": 20, "dev": 2}),
    ({"dev": ["-1"], "test": "ab"}, {"train": 18, "dev": 2, "test": 2}),
    ({"dev": "ac", "test": "bc"}, {"train": 20, "dev": 2, "test": 2}),
])  # fmt: skip
def test_a_split_without_known_labels_is_no_result(tmp_path, capsys, splits, left):
    """Test sets are often published with the label -1. Such a split is left out, and dev held out if it was dev."""
    got = read(write_tables(tmp_path, train="ab" * 10, **splits))
    assert {name: len(split) for name, split in got.items()} == left
    said = capsys.readouterr().out
    assert ("left out" in said) == (left != {"train": 20, "dev": 2, "test": 2})
    assert ("held out" in said) == (left["train"] == 18)


def test_samples_are_found_again_in_the_users_file(tmp_path):
    """Samples.rows counts rows of the file, also after a part of train was held out."""
    splits = read(write_tables(tmp_path, train="ab" * 10))
    for samples in splits.values():
        assert samples.texts == [f"x {row} now please" for row in samples.rows]
    assert sorted(splits["train"].rows + splits["dev"].rows) == list(range(20)) and len(splits["dev"]) == 2


# ---- demo


def test_demo_is_what_it_says():
    """Sizes, intents and slots, and a redundancy like that of real logs."""
    splits = demo.generate()
    assert {split: len(samples) for split, samples in splits.items()} == demo.SIZES
    slots = {tag[2:] for tags in splits["train"].tags for tag in tags if tag != "O"}
    assert len(set(splits["train"].labels)) == 7 and len(slots) == 32
    assert 0.4 < len({" ".join(words) for words in splits["train"].texts}) / 4000 < 0.7


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
    """The published figures are of this data. Python's hash seed, which differs between runs, changes nothing."""
    splits = [[s.texts, s.labels, s.tags] for s in demo.generate().values()]
    assert hashlib.sha256(json.dumps(splits).encode()).hexdigest().startswith("129c7f38944f767e")


def test_a_folder_without_tokenizer_files_is_refused(tiny, tmp_path):
    """transformers makes up a tokenizer that knows special tokens only: everything would be [UNK]."""
    (tmp_path / "config.json").write_bytes((Path(tiny) / "config.json").read_bytes())
    with pytest.raises(ModelError):
        load_tokenizer(str(tmp_path))
