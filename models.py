"""The model of the paper: a pretrained encoder, a head on the sentence and, for intent and slots, a head on every word.

    from models import NLUModel
    model = NLUModel.load("runs/…/model")
    print(model.predict(["wake me up at seven"]))
"""

import json
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from data import IGNORE, Sample, encode, load_tokenizer, sorted_batches, without_breaks
from encoders import check_model, load_encoder, max_tokens
from engine import dropout, encoder_forward, linear, onednn_is_faster, packed_linear, restore_vocabulary
from errors import UserError, one_line


class NLUModel(nn.Module):
    """Encoder → dropout, dense, tanh, dropout, linear on the first token. With tags: dropout, linear on every token.

    labels, tags: the names behind the outputs of the two heads. Without tags the model is a classifier of texts, or
    with `pairs` of pairs of texts.
    """

    def __init__(self, encoder, tokenizer, labels, tags=(), pairs=False):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.tokenizer, self.labels, self.tags, self.pairs = encoder, tokenizer, labels, tags, pairs
        self.run_encoder = encoder_forward(encoder)
        self.p = getattr(encoder.config, "hidden_dropout_prob", 0.1)
        self.dense = nn.Linear(width, width)
        self.classify = nn.Linear(width, len(labels))
        self.tag = nn.Linear(width, len(tags)) if tags else None
        for layer in (self.dense, self.classify, self.tag):
            if layer is not None:  # as BERT initialises its own layers
                nn.init.normal_(layer.weight, std=getattr(encoder.config, "initializer_range", 0.02))
                nn.init.zeros_(layer.bias)

    def forward(self, batch, linear=linear):
        """Return fp32 logits (B, labels), and (B, L, tags) or None. batch: data.Batch. linear: from engine.py."""
        if getattr(self.encoder.config, "type_vocab_size", 0) < 2:  # it has no segment embeddings
            batch = batch._replace(types=None)
        hidden, p = self.run_encoder(self.encoder, batch, linear), self.p * self.training
        sentence = dropout(torch.tanh(linear(dropout(hidden[:, 0], p), self.dense)), p)
        logits = linear(sentence.float(), self.classify)  # bf16 logits would blur the scores
        return logits, None if self.tag is None else linear(dropout(hidden, p).float(), self.tag)

    def predict(self, texts):
        """Return (label, [(word, tag), …]) for each text; without slots the list is empty.

        texts: an iterable of strings, or of pairs of strings for a model of pairs. A word beyond the longest input is
        tagged "O". TypeError for anything else.
        """
        wanted = "pairs of strings" if self.pairs else "strings"
        texts = [None] if isinstance(texts, str) else list(texts)
        if not all(is_pair(text) if self.pairs else isinstance(text, str) for text in texts):
            raise TypeError(f"predict takes an iterable of {wanted}, such as a list or an open file")
        if not texts:
            return []
        if self.tags:
            texts = [text.split() for text in texts]
        elif self.pairs:
            texts = [tuple(map(without_breaks, pair)) for pair in texts]
        else:
            texts = [without_breaks(text.rstrip("\r\n")) for text in texts]
        samples = [Sample(text, "?", ["?"] * len(text) if self.tags else None) for text in texts]
        split = encode(samples, self.tokenizer, max_tokens(self.encoder, self.tokenizer), {}, {})
        labels, tags = predictions(self, split.to(self.dense.weight.device))
        words = texts if self.tags else [[]] * len(texts)
        return [(self.labels[label], list(zip_longest(row, (self.tags[tag] for tag in found), fillvalue="O")))
                for label, row, found in zip(labels, words, tags)]  # fmt: skip

    def save(self, folder):
        """Write encoder and tokenizer in Hugging Face's layout, and our heads. The folder works as --model.

        Call this after training: it undoes `limit_vocabulary`. OSError where the folder cannot be written.
        """
        restore_vocabulary(self)
        heads = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        try:
            self.encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save_file(heads, Path(folder) / "heads.safetensors")
            names = {"labels": self.labels, "tags": self.tags, "pairs": self.pairs}
            Path(folder, "labels.json").write_text(json.dumps(names, indent=1), encoding="utf-8")
        except Exception as error:  # safetensors raises errors that are no OSError
            raise OSError(f"{folder}: the model could not be written ({one_line(error)})") from None

    @classmethod
    def load(cls, folder):
        """Return the model that `save` wrote, in evaluation mode on the CPU. UserError for any other folder."""
        try:
            names = json.loads(Path(folder, "labels.json").read_text(encoding="utf-8"))
            if not all(isinstance(name, str) for name in [] + names["labels"] + names["tags"]):
                raise TypeError("labels.json: two lists of names were expected")
            encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
            model = cls(encoder, tokenizer, names["labels"], names["tags"], names.get("pairs") is True)
            weights = load_file(Path(folder, "heads.safetensors"))
            model.load_state_dict({**weights, **{f"encoder.{k}": v for k, v in encoder.state_dict().items()}})
        except Exception as error:
            raise UserError(f"{folder}: not a model folder that train.py wrote ({one_line(error)})") from None
        return model.eval()


def is_pair(text):
    """Return whether a text is a pair of strings."""
    return isinstance(text, (tuple, list, np.ndarray)) and [isinstance(part, str) for part in text] == [True, True]


def losses(outputs, batch):
    """Return the loss of each sample, (B,): cross-entropy; for intent and slots ½ intent + ½ sum over words, as in the
    paper."""
    logits, tag_logits = outputs
    intent = F.cross_entropy(logits, batch.labels, reduction="none")
    if tag_logits is None:
        return intent
    slots = F.cross_entropy(tag_logits.flatten(0, 1), batch.tags.flatten(), ignore_index=IGNORE, reduction="none")
    return 0.5 * (intent + slots.view_as(batch.tags).sum(1))


@torch.inference_mode()
def infer(model, split, batch_list):
    """Yield (batch, outputs) for each index array of `batch_list`. This turns dropout off, and it stays off."""
    model.eval()
    product = packed_linear() if len(batch_list) > 1 and onednn_is_faster(split.tokens.device) else linear
    for indices in batch_list:
        batch = split.batch(indices)
        yield batch, model(batch, product)


def predictions(model, split):
    """Return the most probable label of each sample, (N,) int64, and a list of the tags of its words, int64 arrays.

    Both are in dataset order. Words that were cut off have no tag, so an array may be shorter than its utterance.
    Without slots the arrays are empty.
    """
    labels, tags = np.empty(len(split), dtype=np.int64), [np.empty(0, dtype=np.int64)] * len(split)
    for batch, (logits, tag_logits) in infer(model, split, sorted_batches(split)):
        labels[batch.indices] = logits.argmax(-1).cpu()
        if tag_logits is not None:
            is_word, found = (batch.tags != IGNORE).cpu().numpy(), tag_logits.argmax(-1).cpu().numpy()
            for i, row, words in zip(batch.indices, found, is_word):
                tags[i] = row[words]
    return labels, tags


def build_model(name, tokenizer, data, seed, precision="fp32"):
    """Return the pretrained encoder `name` (hub id or folder) with new heads for `data`, initialised under `seed`.

    UserError where the encoder does not fit the tokenizer or the data, or fails in `precision`.
    """
    torch.manual_seed(seed)
    encoder = load_encoder(name)
    model = NLUModel(encoder, tokenizer, data.labels, data.tags, data.pairs)
    check_model(model, data, name, precision)
    return model
