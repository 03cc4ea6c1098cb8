"""Make a training step fast without changing its mathematics. `models.py` shows the model; nothing here has to be read
to understand the method.

Short utterances make short steps, and short steps consist of overhead. So there is one flat vector for all weights
(`FlatAdamW`), a BERT forward in few large operations (`fast_bert_forward`), an embedding table of the used rows only
(`UsedEmbedding`), and CPU products in the library that computes them fastest (`packed_linear`, `set_matmul_backend`).
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import BertModel, MPNetModel, RobertaModel

from distributed import all_reduce_sum

# ---- hardware

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def has_bf16(device):
    """Return whether the hardware computes in bf16 (a CPU: AVX512-BF16 or AMX). Emulated bf16 is slower than fp32."""
    if torch.device(device).type == "cuda":
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # missing in some PyTorch versions
    return torch.device(device).type == "cpu" and any(getattr(torch.cpu, probe, bool)() for probe in probes)


def onednn_is_faster(device):
    """Return whether oneDNN computes fp32 products faster than MKL: on AVX-512 CPUs, measured on AMD Zen 5."""
    kernels = torch.backends.cpu.get_cpu_capability()  # for example "AVX512"
    return torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available() and "AVX512" in kernels


def set_matmul_backend(precision, device):
    """Choose oneDNN or MKL for the fp32 products of this process.

    PyTorch selects oneDNN by the precision "medium". With AMX, oneDNN would round to bf16, so AMX keeps MKL. In bf16
    training only the small heads compute in fp32, and MKL is faster for them.
    """
    if torch.device(device).type == "cpu":
        may_round = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()
        use_onednn = precision == "fp32" and onednn_is_faster(device) and not may_round
        torch.set_float32_matmul_precision("medium" if use_onednn else "highest")


# ---- operations


def linear(x, *layers):
    """Apply linear layers side by side as one product, in the dtype of x. x: (…, in). Returns (…, sum of outs)."""
    return F.linear(x, *stacked(layers, x.dtype))


def stacked(layers, dtype):
    """Return the weight and the bias of several linear layers as one weight and one bias."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return [(torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype) for parts in (weights, biases)]


def packed_linear():
    """Return a `linear` for one inference pass, which brings each weight into oneDNN's blocked layout only once.

    Weights must not change during the pass. They are in memory twice until it ends. The two operations are private to
    PyTorch; torch.compile uses them for frozen models.
    """
    packed, onednn = {}, torch.ops.mkldnn

    def linear(x, *layers):
        key = (x.dtype, *layers)
        if key not in packed:
            weight, bias = stacked(layers, x.dtype)
            packed[key] = onednn._reorder_linear_weight(weight), bias
        return onednn._linear_pointwise(x, *packed[key], "none", [], "")

    return linear


def softmax(x):
    """Compute softmax over the last axis in fp32. Rows under 16 are padded: PyTorch takes 4 times longer for them."""
    short = max(0, 16 - x.shape[-1])
    rows = F.pad(x.float(), (0, short), value=-torch.inf) if short else x.float()
    return rows.softmax(-1)[..., : x.shape[-1]].to(x.dtype)


def dropout(x, p):
    """Apply inverted dropout. On a CPU one int16 decides for an element, where PyTorch draws a double; p has steps of
    2⁻¹⁶."""
    if p == 0:
        return x
    dropped = round(p * 2**16)  # the lowest `dropped` of the 2¹⁶ int16 values mean "drop"
    if not 0 < dropped < 2**16 or x.device.type != "cpu":
        return F.dropout(x, p)
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    last = dropped - 2**15 - 1  # the highest value that drops
    keep = bits[: x.numel()].view(x.shape).clamp_(last, last + 1).sub_(last)  # 0 or 1; a comparison is slower
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


# ---- the encoder


def encoder_forward(encoder):
    """Return the fastest forward function for an encoder: (encoder, batch, linear) to hidden states (B, L, width)."""
    is_bert = type(encoder) in (BertModel, RobertaModel, MPNetModel)
    plain = is_bert and encoder.config.hidden_act == "gelu" and not getattr(encoder.config, "is_decoder", False)
    return fast_bert_forward if plain else transformers_forward


def transformers_forward(encoder, batch, _linear):
    """Return the hidden states, (B, L, width), as transformers computes them."""
    types = {} if batch.types is None else {"token_type_ids": batch.types}
    mask = None if batch.mask is None else batch.mask.long()  # some models compute with it
    return encoder(batch.tokens, attention_mask=mask, **types).last_hidden_state


def fast_bert_forward(encoder, batch, linear):
    """Compute the hidden states of BERT, RoBERTa or MPNet in few large operations: (B, L, width).

    Query, key and value are one product. A batch without padding needs no mask. A classifier reads only the first
    token, so the last layer computes no other: then the result is (B, 1, width).
    """
    tables, config, (B, L) = encoder.embeddings, encoder.config, batch.tokens.shape
    p, p_attention = (encoder.training * q for q in (config.hidden_dropout_prob, config.attention_probs_dropout_prob))
    added = tables.position_embeddings.weight[first_position(encoder) :][:L]
    if hasattr(tables, "token_type_embeddings"):
        types = tables.token_type_embeddings
        added = added + (types.weight[0] if batch.types is None else types(batch.types))
    x = dropout(tables.LayerNorm(tables.word_embeddings(batch.tokens) + added), p).flatten(0, 1)
    bias = attention_bias(encoder, batch, x.dtype)
    for layer in encoder.encoder.layer:
        query, key, value, output, layer_norm = attention_layers(layer.attention)
        query_key_value = linear(x, query, key, value).view(B, L, 3, config.num_attention_heads, -1)
        query, key, value = query_key_value.permute(2, 0, 3, 1, 4)
        if layer is encoder.encoder.layer[-1] and batch.tags is None:
            query, x = query[:, :, :1], x.view(B, L, -1)[:, 0]
        scores = query * query.shape[-1] ** -0.5 @ key.mT + bias[:, :, : query.shape[2]]
        context = (dropout(softmax(scores), p_attention) @ value).transpose(1, 2).reshape(len(x), -1)
        x = layer_norm(x + dropout(linear(context, output), p))
        wide = F.gelu(linear(x, layer.intermediate.dense))
        x = layer.output.LayerNorm(x + dropout(linear(wide, layer.output.dense), p))
    return x.unflatten(0, (B, -1))


def attention_layers(attention):
    """Return an attention block's query, key, value and output layers and its norm. MPNet has other names for them."""
    if hasattr(attention, "attn"):
        return attention.attn.q, attention.attn.k, attention.attn.v, attention.attn.o, attention.LayerNorm
    own, output = attention.self, attention.output
    return own.query, own.key, own.value, output.dense, output.LayerNorm


def attention_bias(encoder, batch, dtype):
    """Return what is added to attention scores, (B or 1, heads or 1, L or 1, L): MPNet's relative positions, −inf where
    there is padding."""
    bias = torch.zeros(1, 1, 1, 1, dtype=dtype, device=batch.tokens.device)
    if hasattr(encoder.encoder, "relative_attention_bias"):
        bias = encoder.encoder.compute_position_bias(batch.tokens[:1])
    return bias if batch.mask is None else bias.masked_fill(~batch.mask[:, None, None], -torch.inf)


def first_position(encoder):
    """Return where an encoder's position embeddings begin: after those of padding in RoBERTa, else 0."""
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1


# ---- the embedding rows that a dataset uses


class UsedEmbedding(nn.Module):
    """The rows of an embedding table that a dataset uses, as the only trainable rows. Token ids stay the same.

    No batch touches another row, so its gradient is zero and training is the same. The dense gradient of the whole
    table (47 MB for the default model) is neither filled nor read.
    """

    def __init__(self, table, used):
        super().__init__()
        self.table, self.used = [table], used  # in a list the table is no submodule: not trained, not moved
        self.register_buffer("row", torch.full((table.num_embeddings,), -1))  # looking up an unused token fails
        self.row[used] = torch.arange(len(used))
        self.weight = nn.Parameter(table.weight.detach()[used])

    def forward(self, tokens):
        sparse = self.weight.device.type in ("cpu", "cuda")  # the gradient holds the rows that were looked up
        return F.embedding(self.row[tokens], self.weight, sparse=sparse)


def limit_vocabulary(model, data):
    """Train only the word embeddings of tokens that occur in `data`. Call this before making the optimizer.

    An embedding that does more than look up (scaling, for example) stays as it is.
    """
    table = model.encoder.get_input_embeddings()
    if type(table) is nn.Embedding:
        used = torch.zeros(table.num_embeddings, dtype=torch.bool)
        used[data.train.pad] = True
        for split in data.splits.values():
            used[split.tokens.cpu()] = True
        model.encoder.set_input_embeddings(UsedEmbedding(table, used.nonzero().squeeze(1)))


def restore_vocabulary(model):
    """Put the whole table back, with the trained rows in it."""
    rows = model.encoder.get_input_embeddings()
    if isinstance(rows, UsedEmbedding):
        table = rows.table[0]
        table.weight.data[rows.used] = rows.weight.data.to(table.weight.device)
        model.encoder.set_input_embeddings(table.to(rows.weight.device))


# ---- the optimizer


def norm(x):
    """Compute ‖x‖₂ of a long fp32 vector by rows: PyTorch's norm of it takes twice as long and loses digits."""
    whole = len(x) // 4096 * 4096
    rows = torch.linalg.vector_norm(x[:whole].view(-1, 4096), dim=1)
    return torch.linalg.vector_norm(torch.cat([rows, x[whole:]]))


class FlatAdamW:
    """torch.optim.AdamW after clip_grad_norm_, on one flat fp32 vector of all weights. The model computes with a copy.

    One vector takes one kernel for the step, three for the norm, and one message between processes. The bf16 copy is
    cast once a step (mixed precision with master weights, Micikevicius et al. 2018). An unused weight has gradient 0.
    """

    def __init__(self, model, precision, clip):
        self.weights, self.clip = list(model.parameters()), clip
        self.master = torch.cat([weight.detach().flatten().float() for weight in self.weights])
        self.master.grad = torch.zeros_like(self.master)
        self.copy = self.master.to(DTYPES[precision])  # itself in fp32
        self.adam = torch.optim.AdamW([self.master], weight_decay=0.0, fused=True)
        self.gradients = dict(zip(self.weights, self.views(self.master.grad)))
        for weight, view in zip(self.weights, self.views(self.copy)):
            weight.data = view

    def views(self, flat):
        """Return a flat vector as one view for each weight, in the weight's shape."""
        parts = flat.split([weight.numel() for weight in self.weights])
        return [part.view(weight.shape) for part, weight in zip(parts, self.weights)]

    def step(self, lr):
        """Update all weights from their gradients, then clear the gradients."""
        for weight, gradient in self.gradients.items():
            if weight.grad is None:
                gradient.zero_()
            elif weight.grad.is_sparse:  # adding it as it is would round sums to the dtype of the copy
                gradient.zero_().index_add_(0, weight.grad._indices()[0], weight.grad._values().float())
            else:
                gradient.copy_(weight.grad)
            weight.grad = None
        all_reduce_sum(self.master.grad)
        self.adam.param_groups[0]["lr"] = lr
        scale = ((norm(self.master.grad) + 1e-6) / self.clip).clamp(min=1.0)
        if self.master.device.type in ("cpu", "cuda"):
            self.adam.grad_scale = scale  # a fused step divides gradients by it: clipping takes no extra pass
        else:
            self.master.grad /= scale
        self.adam.step()
        self.copy.copy_(self.master)

    def state_dict(self):
        """Return everything that the next step depends on: master, exp_avg, exp_avg_sq, each (W,) fp32, and step."""
        return {"master": self.master, **self.adam.state[self.master]}

    def load_state_dict(self, state):
        """Go on from what `state_dict` returned."""
        state = {name: x.to(self.master.device) for name, x in state.items()}
        self.master.copy_(state.pop("master"))
        self.copy.copy_(self.master)
        self.adam.state[self.master] = state

    def release(self):
        """Give the model its fp32 weights. The optimizer cannot be used after this."""
        for weight, view in zip(self.weights, self.views(self.master)):
            weight.data = view
