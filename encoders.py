"""Pretrained encoders: load one, and check before a run that it fits its tokenizer, the data and the precision."""

import copy

import numpy as np
import torch
from transformers import AutoModel

from data import pretrained
from engine import DTYPES, first_position
from errors import UserError, expect, one_line


def load_encoder(name):
    """Return the encoder of a hub id or local folder, in fp32, without pooler. UserError for any other model."""
    # Without dtype, a checkpoint in half precision would be trained in half precision.
    encoder, loaded = pretrained(AutoModel, name, dtype=torch.float32, output_loading_info=True)
    missing = [weight for weight in loaded["missing_keys"] if "pooler" not in weight]
    expect(not missing, f"--model {name}", f"weights are missing from its file ({', '.join(sorted(missing)[:3])})")
    fits = hasattr(encoder.config, "hidden_size") and not encoder.config.is_encoder_decoder
    expect(fits, f"--model {name}", f"{type(encoder).__name__} is no encoder; take one such as BERT or RoBERTa")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = torch.nn.Identity()  # our sentence head takes its place; some encoders would call None
    return encoder


def max_tokens(encoder, tokenizer):
    """Return the longest input of an encoder in tokens, special tokens included."""
    positions = getattr(encoder.config, "max_position_embeddings", 0) - first_position(encoder)
    return min(limit for limit in (tokenizer.model_max_length, positions, 2**15 - 1) if limit > 0)


def check_model(model, data, name, precision):
    """Raise UserError where a new NLUModel cannot be trained on `data` in `precision`. name: of its encoder."""
    splits, encoder, flag = data.splits.values(), model.encoder, f"--model {name}"
    highest = max(data.train.pad, *(int(split.tokens.max()) for split in splits))
    expect(highest < len(encoder.get_input_embeddings().weight), flag, f"its tokenizer has token {highest}, which its "
           "encoder cannot embed; take the tokenizer that belongs to the encoder")
    longest, limit = max(split.lengths.max() for split in splits), max_tokens(encoder, model.tokenizer)
    expect(longest <= limit, flag, f"takes at most {limit} tokens, but {data.name} has a sample of {longest}; add "
           f"--max-length {limit} to cut longer samples off")
    try:
        sees_last_token, ignores_padding = try_batch(model, padded_pair(data.train), precision)
    except Exception as error:  # whatever a foreign encoder raises
        advice = "take another model" if precision == "fp32" else "try --precision fp32, or another model"
        message = f"the encoder fails on a first batch in {precision} ({one_line(error)}); {advice}"
        raise UserError(f"{flag}: {message}") from None
    expect(sees_last_token, flag, "its first token does not see the last one, as in a causal decoder; take an encoder "
           "such as BERT or RoBERTa")
    expect(ignores_padding, flag, "its outputs depend on padding, so a score would depend on the batch; take an "
           "encoder such as BERT or RoBERTa")


def padded_pair(split):
    """Return the longest and the shortest sample of a split as a Batch with padding, of at most 16 tokens."""
    batch = split.batch(np.array([split.lengths.argmax(), split.lengths.argmin()]))
    tokens = batch.tokens[:, :16].clone()
    mask = torch.ones_like(tokens, dtype=torch.bool) if batch.mask is None else batch.mask[:, :16].clone()
    mask[1, -1], tokens[1, -1] = False, split.pad
    types, tags = (None if array is None else array[:, :16] for array in (batch.types, batch.tags))
    return batch._replace(tokens=tokens, types=types, mask=mask, tags=tags)


def try_batch(model, batch, precision):
    """Run a copy of a model forward and backward on the batch of `padded_pair`.

    Returns two booleans: whether a change of the last token changes the first sample, and whether it leaves the second
    one alone, whose last token is padding.
    """
    trial = copy.deepcopy(model).train().to(DTYPES[precision])
    torch.cat([logits.flatten() for logits in trial(batch) if logits is not None]).sum().backward()
    other = batch.tokens.clone()
    other[:, -1] = (other[:, -1] == 0).long()  # any other token
    model.eval()
    with torch.no_grad():  # in fp32, as bf16 may round a small difference away
        before, after = (model(batch._replace(tokens=tokens))[0] for tokens in (batch.tokens, other))
    # Encoders that approximate attention let a little of the padding through.
    return not torch.equal(before[0], after[0]), torch.allclose(before[1], after[1], rtol=0.01)
