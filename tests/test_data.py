"""Encoding and batching agree with slow, obvious twins; demo is what it says."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data import (
    DEFAULT_MODEL,
    IGNORE,
    LOST,
    Examples,
    batches,
    demo,
    encode,
    load,
    load_tokenizer,
    sorted_batches,
)
from data.encoding import number_names
from data.parallel import share

# ---- batches


@given(st.lists(st.integers(1, 60), min_size=1, max_size=400), st.integers(1, 40), st.integers(0, 3))
def test_batches_hold_every_index_once(lengths, batch_size, seed):
    lengths = np.array(lengths)
    chosen = np.flatnonzero(np.random.default_rng(seed).random(len(lengths)) < 0.7)
    cut = batches(lengths, chosen, batch_size, np.random.default_rng(seed), window=3)
    assert sorted(np.concatenate([*cut, []])) == list(chosen)
    assert len(cut) == -(-len(chosen) // batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in cut)


def test_batches_are_shuffled_by_seed_and_hardly_padded(demo_data):
    lengths, everything = demo_data.train.lengths, np.arange(len(demo_data.train))
    one, same, other = (batches(lengths, everything, 32, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(one, same))
    assert any(not np.array_equal(a, b) for a, b in zip(one, other))
    computed = sum(len(batch) * lengths[batch].max() for batch in one)
    assert 1 - lengths.sum() / computed < 0.05
    plain = np.random.default_rng(1).permutation(everything).reshape(-1, 32)
    assert 1 - lengths.sum() / sum(32 * lengths[batch].max() for batch in plain) > 0.2  # what bucketing is for


def test_batches_for_inference_start_with_the_longest_and_have_a_limit(demo_data):
    split, lengths = demo_data.evaluation["dev"], demo_data.evaluation["dev"].lengths
    cut = sorted_batches(split, tokens=200)
    assert np.concatenate(cut).tolist() == np.argsort(-lengths, kind="stable").tolist()
    sizes = set()
    for batch, following in pairwise(cut):
        longest, most = lengths[batch].max(), 200 // lengths[batch].max()
        assert len(batch) == most if most <= 16 else most - 16 < len(batch) <= most and len(batch) % 16 == 0
        assert lengths[following].max() <= longest
        sizes.add(len(batch))
    assert min(sizes) < 16 <= max(sizes)
    assert all(len(batch) == 1 for batch in sorted_batches(split, tokens=1))


def test_every_process_has_its_share(monkeypatch):
    assert share([1, 2, 3]) == [1, 2, 3]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        shares.append(share(np.arange(7)).tolist())
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]


# ---- encoding


def slow_encoding(words, tags, tokenizer, max_length):
    """Ids and tags of one utterance, word by word."""
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
    examples = demo.generate()["train"].take(range(300))
    examples.texts[0] = ["\u200b", "wake", "\x00", "me"]  # the tokenizer drops zero-width and control characters
    examples.tags[0] = ["O", "O", "O", "O"]
    tag_ids, _ = number_names((tag for tags in examples.tags for tag in tags), [])
    label_ids, _ = number_names(examples.labels, [])
    split = encode(examples, tokenizer, max_length, label_ids, tag_ids)
    batch = split.batch(np.arange(300))
    lost = []
    for i, (words, tags) in enumerate(zip(examples.texts, examples.tags)):
        ids, wanted, gone = slow_encoding(words, [tag_ids[tag] for tag in tags], tokenizer, max_length)
        lost += gone
        assert split.lengths[i] == len(ids)
        assert batch.tokens[i, : len(ids)].tolist() == ids
        assert batch.tags[i, : len(ids)].tolist() == wanted
        assert batch.mask[i].tolist() == [True] * len(ids) + [False] * (batch.mask.shape[1] - len(ids))
        assert set(batch.tokens[i, len(ids) :].tolist()) <= {tokenizer.pad_token_id}
        assert set(batch.tags[i, len(ids) :].tolist()) <= {IGNORE}
    assert (split.word_starts.numpy() == LOST).tolist() == lost and split.lost == sum(lost)
    assert not any(lost[:4]) and batch.tokens[0, 1] == batch.tokens[0, 3] == tokenizer.unk_token_id
    assert any(lost) == (max_length == 6)


def test_a_batch_is_the_same_whatever_is_beside_it(demo_data):
    indices = np.array([17, 3, 3999])
    batch = demo_data.train.batch(indices)
    for row, i in enumerate(indices):
        alone, length = demo_data.train.batch(np.array([i])), demo_data.train.lengths[i]
        assert batch.tokens[row, :length].tolist() == alone.tokens[0].tolist()
        assert batch.tags[row, :length].tolist() == alone.tags[0].tolist()
        assert batch.labels[row] == alone.labels[0]


def test_pairs_are_encoded_as_the_tokenizer_does(tokenizer):
    pairs = [("wake me", "at seven"), ("play jazz", "now please now")]
    split = encode(Examples(pairs, ["a", "b"]), tokenizer, 128, {"a": 0, "b": 1}, {})
    batch, wanted = split.batch(np.arange(2)), tokenizer(*map(list, zip(*pairs)), padding=True, return_tensors="pt")
    assert batch.tokens.tolist() == wanted["input_ids"].tolist()
    assert batch.types.tolist() == wanted["token_type_ids"].tolist()
    assert batch.tags is None


def test_names_only_test_has_come_after_those_of_train():
    ids, n = number_names(["b", "a", "b"], ["c", "a", "0"])
    assert ids == {"a": 0, "b": 1, "0": 2, "c": 3} and n == 2


# ---- demo


def test_demo_is_what_it_says():
    splits = demo.generate()
    assert {split: len(examples.labels) for split, examples in splits.items()} == demo.SIZES
    assert len(set(splits["train"].labels)) == 7
    slots = {tag[2:] for tags in splits["train"].tags for tag in tags if tag != "O"}
    assert slots == set(demo.VALUES) and len(slots) == 32
    distinct = len({" ".join(words) for words in splits["train"].texts})
    assert 0.4 < distinct / 4000 < 0.7  # redundant, with a long tail


def test_demo_errors_are_where_it_says(monkeypatch):
    spoiled = demo.generate()["train"]
    monkeypatch.setattr(demo, "spoil", lambda *_: None)
    clean = demo.generate()["train"]
    differs = [i for i in range(4000) if (spoiled.labels[i], spoiled.tags[i]) != (clean.labels[i], clean.tags[i])]
    assert differs == demo.planted_errors().tolist() and len(differs) == 80
    assert spoiled.texts == clean.texts


def test_demo_is_the_same_everywhere():
    """Under another hash seed, and as it was when the README's figures were taken."""
    code = "from data import demo; import hashlib; print(hashlib.sha256(repr(demo.generate()).encode()).hexdigest())"

    def run(seed):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        return subprocess.check_output([sys.executable, "-c", code], cwd=Path(__file__).parents[1], env=environment)

    assert run("1") == run("2")
    assert run("1").startswith(b"2f82e68a3e3979e1")


@pytest.mark.parametrize("dataset", ["snips", "atis"])
def test_real_data_is_hardly_padded(raw, dataset):
    lengths = load(dataset, load_tokenizer(DEFAULT_MODEL), raw).train.lengths
    cut = batches(lengths, np.arange(len(lengths)), 32, np.random.default_rng(0))
    assert 1 - lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in cut) < 0.05
