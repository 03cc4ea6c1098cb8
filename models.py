"""A pretrained encoder with a sentence head and, for joint intent/slot data, a head on every word.

    from models import NLUModel
    model = NLUModel.load("runs/…/model")
    print(model.predict(["wake me up at seven"]))
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, BertModel, RobertaModel

from data import IGNORE, LOST, Dataset, Examples, ModelError, encode, load_tokenizer, sorted_batches
from data.encoding import one_line, pretrained
from data.parallel import add_up


def load_encoder(name):
    """The pretrained encoder of a hub id or local folder, in fp32, without pooler. ModelError where it is no encoder
    or the file lacks some of its weights."""
    # The dtype is said because a checkpoint in half precision would otherwise be trained in it.
    encoder, loaded = pretrained(AutoModel, name, dtype=torch.float32, output_loading_info=True)
    missing = [weight for weight in loaded["missing_keys"] if "pooler" not in weight]
    if missing:
        raise ModelError(f"--model {name}: {len(missing)} of its weights are missing ({min(missing)}, …)")
    if encoder.config.is_encoder_decoder or not hasattr(encoder.config, "hidden_size"):
        raise ModelError(f"--model {name}: an encoder such as BERT or RoBERTa is needed, not {type(encoder).__name__}")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # our sentence head takes its place
    return encoder


def max_tokens(encoder, tokenizer):
    """Longest input of an encoder, special tokens included."""
    positions = getattr(encoder.config, "max_position_embeddings", 0) - first_position(encoder)
    return min(limit for limit in (tokenizer.model_max_length, positions, 2**15 - 1) if limit > 0)


def first_position(encoder):
    """Where an encoder's position embeddings begin: RoBERTa's after those of padding, others' at 0."""
    positions = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    padding = getattr(positions, "padding_idx", None)
    return 0 if padding is None else padding + 1


def linear(x, *layers):
    """(…, in) through linear layers side by side, as one product in the type of x: (…, out of all together)."""
    return F.linear(x, *side_by_side(layers, x.dtype))


def side_by_side(layers, dtype):
    """Weight and bias of several linear layers as those of one."""
    weights, biases = [layer.weight for layer in layers], [layer.bias for layer in layers]
    return [(torch.cat(parts) if len(parts) > 1 else parts[0]).to(dtype) for parts in (weights, biases)]


class NLUModel(nn.Module):
    """Encoder → dropout, dense, tanh, dropout, linear on the first token; dropout, linear on every token for slots.

    labels, tags: the names behind the outputs of the two heads; without tags it is a plain classifier, of texts or of
    pairs of texts.
    """

    def __init__(self, encoder, tokenizer, labels, tags=(), pairs=False):
        super().__init__()
        width = encoder.config.hidden_size
        self.encoder, self.tokenizer, self.labels, self.tags, self.pairs = encoder, tokenizer, labels, tags, pairs
        self.run_encoder = bert if is_bert(encoder) else hugging_face
        self.p = getattr(encoder.config, "hidden_dropout_prob", 0.1)
        self.dense = nn.Linear(width, width)
        self.classify = nn.Linear(width, len(labels))
        self.tag = nn.Linear(width, len(tags)) if tags else None
        for layer in (self.dense, self.classify, self.tag):
            if layer is not None:  # as BERT initialises its own layers
                nn.init.normal_(layer.weight, std=getattr(encoder.config, "initializer_range", 0.02))
                nn.init.zeros_(layer.bias)

    @classmethod
    def build(cls, name, tokenizer, data: Dataset, seed):
        """Pretrained encoder `name` (hub id or folder) with new heads for `data`, initialised under `seed`."""
        torch.manual_seed(seed)
        encoder, splits = load_encoder(name), data.splits.values()
        if max(split.tokens.max() for split in splits) >= encoder.get_input_embeddings().num_embeddings:
            raise ModelError(f"--model {name}: its tokenizer has tokens that the encoder has no embedding for")
        longest, limit = max(split.lengths.max() for split in splits), max_tokens(encoder, tokenizer)
        if longest > limit:
            raise ModelError(f"--model {name}: takes at most {limit} tokens, but {data.name} has one of {longest}; "
                             f"--max-length {limit} cuts them off")
        return cls(encoder, tokenizer, data.labels[: data.n_labels], data.tags[: data.n_tags], data.pairs)

    def forward(self, batch, linear=linear):
        """batch: data.Batch, for a model with tags one that has them. linear: this module's, or a `packed_linear()`.
        Returns fp32 logits (B, labels), and (B, L, tags) or None."""
        hidden, p = self.run_encoder(self.encoder, batch, linear), self.p * self.training
        sentence = dropout(torch.tanh(linear(dropout(hidden[:, 0], p), self.dense)), p)
        logits = linear(sentence.float(), self.classify)  # bf16 logits would blur the scores
        return logits, None if self.tag is None else linear(dropout(hidden, p).float(), self.tag)

    def predict(self, texts):
        """texts: utterances (of a classifier, pairs of strings too). Returns (label, [(word, tag), …]) for each, with
        an empty list where there are no slots; a word beyond the longest input is "O"."""
        kinds = {tuple(map(type, text)) if isinstance(text, (tuple, list)) else type(text) for text in texts}
        if isinstance(texts, str) or kinds - {(str, str) if self.pairs else str}:
            raise TypeError(f"this model takes a list of {'pairs of ' if self.pairs else ''}strings")
        if not texts:
            return []
        texts = [text.split() if self.tags else tuple(text) if self.pairs else text for text in texts]
        unknown = [["O"] * len(words) for words in texts] if self.tags else None
        examples = Examples(texts, ["?"] * len(texts), unknown)
        split = encode(examples, self.tokenizer, max_tokens(self.encoder, self.tokenizer), {"?": 0}, {"O": 0})
        labels, tags = predictions(self, split.to(self.dense.weight.device))
        if not self.tags:
            return [(self.labels[label], []) for label in labels]
        tag_names = [*self.tags, "O"]  # LOST is -1, the last
        names = iter(tag_names[tag] for tag in tags)
        return [(self.labels[label], [(word, next(names)) for word in words]) for label, words in zip(labels, texts)]

    def save(self, folder):
        """Write encoder and tokenizer in Hugging Face's layout, so that the folder works as --model, and our heads.
        Undoes `limit_vocabulary`, so it is for the end of training. ModelError where the folder cannot be written."""
        restore_vocabulary(self)
        heads = {k: v.contiguous() for k, v in self.state_dict().items() if not k.startswith("encoder.")}
        try:
            self.encoder.save_pretrained(folder)
            self.tokenizer.save_pretrained(folder)
            save_file(heads, Path(folder) / "heads.safetensors")
            names = {"labels": self.labels, "tags": self.tags, "pairs": self.pairs}
            Path(folder, "labels.json").write_text(json.dumps(names, indent=1))
        except Exception as error:  # safetensors' own is no OSError
            raise ModelError(f"{folder}: the model could not be written ({error})") from None

    @classmethod
    def load(cls, folder):
        """The model that `save` wrote, in evaluation mode on the CPU. ModelError where the folder is none of ours."""
        try:
            names = json.loads(Path(folder, "labels.json").read_text(encoding="utf-8"))
            if not all(isinstance(name, str) for name in [] + names["labels"] + names["tags"]):
                raise TypeError("labels.json: two lists of names were expected")
            encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
            model = cls(encoder, tokenizer, names["labels"], names["tags"], names.get("pairs") is True)
            weights = load_file(Path(folder, "heads.safetensors"))
            model.load_state_dict({**weights, **{f"encoder.{k}": v for k, v in encoder.state_dict().items()}})
        except Exception as error:
            raise ModelError(f"{folder}: not a model folder that train.py wrote ({one_line(error)})") from None
        return model.eval()


def hugging_face(encoder, batch, _linear):
    """(B, L, width) hidden states, as transformers computes them."""
    types = {} if batch.types is None else {"token_type_ids": batch.types}
    return encoder(batch.tokens, attention_mask=batch.mask, **types).last_hidden_state


def is_bert(encoder):
    """Whether `bert` computes what `encoder` does."""
    kind, config = type(encoder), encoder.config
    return kind in (BertModel, RobertaModel) and config.hidden_act == "gelu" and not config.is_decoder


def bert(encoder, batch, linear):
    """The same function of BERT's or RoBERTa's weights in fewer and larger operations: one product for query, key and
    value, no mask where nothing is padded, cheaper dropout. Short steps are made of such overhead. Of a batch without
    tags, (B, 1, width): a classifier reads the first token alone, so the last layer computes no other."""
    tables, config, (B, L) = encoder.embeddings, encoder.config, batch.tokens.shape
    p, p_attention = (encoder.training * q for q in (config.hidden_dropout_prob, config.attention_probs_dropout_prob))
    types = tables.token_type_embeddings.weight[0] if batch.types is None else tables.token_type_embeddings(batch.types)
    positions = tables.position_embeddings.weight[first_position(encoder) :][:L]
    x = tables.word_embeddings(batch.tokens) + (positions + types)
    x = dropout(tables.LayerNorm(x), p).flatten(0, 1)
    bias = 0
    if batch.mask is not None:
        bias = torch.zeros_like(batch.mask, dtype=x.dtype).masked_fill_(~batch.mask, -torch.inf)[:, None, None]
    for layer in encoder.encoder.layer:
        own, output, heads = layer.attention.self, layer.attention.output, config.num_attention_heads
        query_key_value = linear(x, own.query, own.key, own.value)
        query, key, value = query_key_value.view(B, L, 3, heads, -1).permute(2, 0, 3, 1, 4)
        if layer is encoder.encoder.layer[-1] and batch.tags is None:
            query, x = query[:, :, :1], x.view(B, L, -1)[:, 0]
        attention = softmax(query * query.shape[-1] ** -0.5 @ key.mT + bias)
        seen = (dropout(attention, p_attention) @ value).transpose(1, 2).reshape(len(x), -1)
        x = output.LayerNorm(x + dropout(linear(seen, output.dense), p))
        wide = F.gelu(linear(x, layer.intermediate.dense))
        x = layer.output.LayerNorm(x + dropout(linear(wide, layer.output.dense), p))
    return x.unflatten(0, (B, -1))


def packed_linear():
    """`linear` for one pass over many batches, in inference mode, where `onednn_is_faster`; weights stay as they are.

    oneDNN computes with weights in blocks of its own, into which `F.linear` brings them at every product (and in fp32
    it takes MKL). Here it is done once a pass, by private operations that torch.compile uses for frozen models, too.
    Until the end of the pass the weights are in memory twice.
    """
    packed, onednn = {}, torch.ops.mkldnn

    def linear(x, *layers):
        key = (x.dtype, *layers)
        if key not in packed:
            weight, bias = side_by_side(layers, x.dtype)
            packed[key] = onednn._reorder_linear_weight(weight), bias
        return onednn._linear_pointwise(x, *packed[key], "none", [], "")  # no function after the product

    return linear


def onednn_is_faster(device):
    """Whether `device` is a CPU with AVX-512, and PyTorch has oneDNN. Measured on AMD's Zen 5 only."""
    kernels = torch.backends.cpu.get_cpu_capability()  # "AVX512", say
    return torch.device(device).type == "cpu" and torch.backends.mkldnn.is_available() and "AVX512" in kernels


def choose_products(precision, device):
    """Have fp32 products in a training on a CPU computed by oneDNN, not by MKL, which on AMD's Zen 5 takes twice as
    long. For the whole process. Not in bf16, where only the heads' are fp32, and small: there MKL is faster.

    PyTorch calls it "medium" precision, as oneDNN may then round to bf16. It does where there is AMX, which is left
    alone; elsewhere the products stay fp32's (a test and bench.py compare).
    """
    if torch.device(device).type == "cpu":
        may_round = getattr(torch.cpu, "_is_amx_tile_supported", lambda: True)()  # absent from some PyTorch versions
        use = precision == "fp32" and onednn_is_faster(device) and not may_round
        torch.set_float32_matmul_precision("medium" if use else "highest")


def softmax(x):
    """Softmax over the last axis, in fp32. Rows under 16 are padded: PyTorch takes four times as long for them."""
    short = max(0, 16 - x.shape[-1])
    rows = F.pad(x.float(), (0, short), value=-torch.inf) if short else x.float()
    return rows.softmax(-1)[..., : x.shape[-1]].to(x.dtype)


def dropout(x, p):
    """Inverted dropout. On a CPU, PyTorch draws a double for every element; 16 bits do, with p in steps of 2⁻¹⁶."""
    dropped = round(p * 2**16)  # how many of the 2¹⁶ values of an int16 mean "drop": the lowest ones
    if dropped == 0 or x.device.type != "cpu":
        return F.dropout(x, p) if dropped else x
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    last = dropped - 2**15 - 1  # the highest value that drops
    keep = bits[: x.numel()].view(x.shape).clamp_(last, last + 1).sub_(last)  # 0 or 1; comparisons are slower
    return x * keep.to(x.dtype).mul_(1 / (1 - p))


def losses(outputs, batch):
    """(B,) loss of each example: cross-entropy; for joint data ½ intent + ½ sum over words, as in the paper."""
    logits, tag_logits = outputs
    intent = F.cross_entropy(logits, batch.labels, reduction="none")
    if tag_logits is None:
        return intent
    slots = F.cross_entropy(tag_logits.flatten(0, 1), batch.tags.flatten(), ignore_index=IGNORE, reduction="none")
    return 0.5 * (intent + slots.view_as(batch.tags).sum(1))


@torch.inference_mode()
def infer(model, split, cut):
    """Yield (batch, outputs) for each index array of the list `cut`, with dropout off."""
    training = model.training
    model.eval()
    product = packed_linear() if len(cut) > 1 and onednn_is_faster(split.tokens.device) else linear
    try:
        for indices in cut:
            batch = split.batch(indices)
            yield batch, model(batch, product)
    finally:
        model.train(training)


def predictions(model, split, tokens=None):
    """Most probable label of each example, (N,) int64, and tag of each word, (W,) int64 with LOST where the word is
    lost (None without slots), both in dataset order."""
    labels = np.empty(len(split), dtype=np.int64)
    tags = None if split.word_tags is None else np.full((len(split), split.lengths.max() + 1), LOST)
    for batch, (logits, tag_logits) in infer(model, split, sorted_batches(split, tokens=tokens)):
        labels[batch.indices] = logits.argmax(-1).cpu()
        if tags is not None:
            tags[batch.indices, : batch.tokens.shape[1]] = tag_logits.argmax(-1).cpu()
    if tags is None:
        return labels, None
    owner = np.repeat(np.arange(len(split)), split.word_offsets.diff().cpu())
    return labels, tags[owner, split.word_starts.cpu()]  # LOST is -1: the last column, where nothing was written


class EmbeddingRows(nn.Module):
    """The rows of an embedding table that a dataset uses, as the only trainable ones; token ids stay as they are.

    The gradient of a row that no batch can touch is zero, so training is the same, but the dense gradient of the
    whole table (47 MB for the default model's) is neither filled nor read in every step.
    """

    def __init__(self, table, used):
        super().__init__()
        self.table, self.used = [table], used  # in a list, the table is no submodule: not trained, not moved
        self.register_buffer("row", torch.full((table.num_embeddings,), -1))  # looking up any other token fails
        self.row[used] = torch.arange(len(used))
        self.weight = nn.Parameter(table.weight.detach()[used])
        self.looked_up = None  # FlatAdamW makes it a list of (rows, vectors): gradients then wait for add_gradient

    def forward(self, tokens):
        rows = self.row[tokens]
        if self.looked_up is None or not torch.is_grad_enabled():
            return F.embedding(rows, self.weight)
        vectors = F.embedding(rows, self.weight.detach()).requires_grad_()
        self.looked_up.append((rows.flatten(), vectors))
        return vectors.clone()  # a leaf cannot be changed in place, as an encoder may do

    def add_gradient(self, total):
        """Add the gradient since the last call to `total`, (rows, width) fp32: in place, no dense one is made."""
        for rows, vectors in self.looked_up:
            if vectors.grad is not None:
                total.index_add_(0, rows, vectors.grad.flatten(0, 1).float())
        self.looked_up.clear()


def limit_vocabulary(model, data: Dataset):
    """Train only the word embeddings of tokens that occur in `data`. The optimizer must be made after this.

    Leaves an embedding that does more than look up (a scaled one, say) as it is.
    """
    table = model.encoder.get_input_embeddings()
    if type(table) is nn.Embedding:
        used = torch.zeros(table.num_embeddings, dtype=torch.bool)
        used[data.train.pad] = True
        for split in data.splits.values():
            used[split.tokens.int().cpu()] = True
        model.encoder.set_input_embeddings(EmbeddingRows(table, used.nonzero().squeeze(1)))


def restore_vocabulary(model):
    """Undo `limit_vocabulary`: the whole table again, with the trained rows in it."""
    rows = model.encoder.get_input_embeddings()
    if isinstance(rows, EmbeddingRows):
        table = rows.table[0]
        table.weight.data[rows.used] = rows.weight.data.to(table.weight.device)
        model.encoder.set_input_embeddings(table.to(rows.weight.device))


def length(x):
    """‖x‖₂ of a long fp32 vector, (). By rows, as PyTorch's own norm of it takes twice as long and loses digits."""
    whole = len(x) // 4096 * 4096
    rows = torch.linalg.vector_norm(x[:whole].view(-1, 4096), dim=1)
    return torch.linalg.vector_norm(torch.cat([rows, x[whole:]]))


class FlatAdamW:
    """torch.optim.AdamW after clip_grad_norm_, on one flat fp32 vector of all weights; the model works with a copy.

    One vector is one kernel for the step, three for the norm and one message between processes, not hundreds; a bf16
    copy is cast once a step, not at every use (mixed precision with master weights, Micikevicius et al. 2018).
    A weight that a step does not use has the gradient 0.
    """

    def __init__(self, model, precision, clip):
        self.weights, self.clip = list(model.parameters()), clip
        self.master = torch.cat([weight.detach().flatten().float() for weight in self.weights])
        self.master.grad = torch.zeros_like(self.master)
        self.copy = self.master.to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision])  # itself in fp32
        self.adam = torch.optim.AdamW([self.master], weight_decay=0.0, fused=True)
        self.gradients = dict(zip(self.weights, self.views(self.master.grad)))
        for weight, view in zip(self.weights, self.views(self.copy)):
            weight.data = view
        self.tables = [module for module in model.modules() if isinstance(module, EmbeddingRows)]
        for table in self.tables:
            table.looked_up = []

    def views(self, flat):
        """A flat vector as one view for each weight, in the weight's shape."""
        parts = flat.split([weight.numel() for weight in self.weights])
        return [part.view(weight.shape) for part, weight in zip(parts, self.weights)]

    def step(self, lr):
        """Update all weights from their gradients, and clear those."""
        for weight, gradient in self.gradients.items():
            gradient.zero_() if weight.grad is None else gradient.copy_(weight.grad)
            weight.grad = None
        for table in self.tables:
            table.add_gradient(self.gradients[table.weight])
        add_up(self.master.grad)
        self.adam.param_groups[0]["lr"] = lr
        norm = length(self.master.grad)
        # A fused step divides gradients by grad_scale, which GradScaler would set: clipping takes no pass of its own.
        self.adam.grad_scale = ((norm + 1e-6) / self.clip).clamp(min=1.0)
        self.adam.step()
        self.copy.copy_(self.master)

    def state(self):
        """What the next step depends on, as fp32 arrays: master, exp_avg and exp_avg_sq, each (W,), and step, ()."""
        return {name: x.cpu().numpy() for name, x in {"master": self.master, **self.adam.state[self.master]}.items()}

    def load(self, state):
        """Go on from what `state` returned."""
        adam = {name: torch.from_numpy(x).to(self.master.device) for name, x in state.items()}
        self.master.copy_(adam.pop("master"))
        self.copy.copy_(self.master)
        self.adam.state[self.master] = adam

    def restore(self):
        """Give the model its weights in fp32; the optimizer is of no use after this."""
        for weight, view in zip(self.weights, self.views(self.master)):
            weight.data = view
        for table in self.tables:
            table.looked_up = None
