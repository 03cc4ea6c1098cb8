"""Encoders of many kinds train, predict and load. What does not fit is refused in one line before a run."""

import hashlib
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused_with
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerFast

from data import DEFAULT_MODEL, Dataset, Sample, encode, load_tokenizer
from data.encoding import local_copy
from encoders import load_encoder
from engine import FlatAdamW, limit_vocabulary
from models import NLUModel, build_model, losses, predictions

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
BERT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64,
        "max_position_embeddings": 64, "pad_token_id": 0}  # fmt: skip
KINDS = {
    "bert": {}, "roberta": {"type_vocab_size": 1}, "xlm-roberta": {}, "mpnet": {}, "ibert": {},
    "electra": {"embedding_size": 16}, "albert": {"embedding_size": 16}, "convbert": {"embedding_size": 16},
    "longformer": {"attention_window": 16}, "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "funnel": {"block_sizes": [1, 1], "num_decoder_layers": 1, "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64,
               "num_hidden_layers": None, "architectures": ["FunnelModel"]},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 32, "num_feedforward_networks": 1},
    "deberta-v2": {"relative_attention": True}, "modernbert": {"global_attn_every_n_layers": 2},
    "squeezebert": {"embedding_size": 32},
    "xlnet": {"hidden_size": None, "num_hidden_layers": None, "num_attention_heads": None, "intermediate_size": None,
              "max_position_embeddings": None, "d_model": 32, "n_layer": 2, "n_head": 2, "d_inner": 64},
}  # fmt: skip
TEXTS = ["wake me up at seven", "play some jazz", "play jazz", "wake me"] * 4
TASKS = {
    "joint": [Sample(text.split(), text[:4], ["B-x"] + ["O"] * text.count(" ")) for text in TEXTS],
    "classification": [Sample(text, ["yes", "no"][i % 2]) for i, text in enumerate(TEXTS)],
    "pairs": [Sample((text, "me up"), ["yes", "no"][i % 2]) for i, text in enumerate(TEXTS)],
}


@pytest.fixture(scope="module")
def build(tiny, tmp_path_factory):
    """build("bert", flag=…) → folder of such an encoder with random weights, beside the tiny tokenizer."""

    @cache
    def go(kind, tokenizer=None, **flags):
        folder, tokenizer = tmp_path_factory.mktemp(kind), tokenizer or AutoTokenizer.from_pretrained(tiny)
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        config = {"vocab_size": len(tokenizer), **BERT, **KINDS.get(kind, {}), **flags}
        config = AutoConfig.for_model(kind, **{k: v for k, v in config.items() if v is not None})
        AutoModel.from_config(config).save_pretrained(folder)
        return str(folder)

    return go


def dataset(tokenizer, samples):
    """Return a Dataset whose splits are all the same samples."""
    labels, tags = sorted({sample.label for sample in samples}), ["B-x", "O"] if samples[0].tags else []
    label_ids, tag_ids = ({name: i for i, name in enumerate(names)} for names in (labels, tags))
    split = encode(samples, tokenizer, 99, label_ids, tag_ids)
    return Dataset("samples", split, {"dev": split}, {"dev": samples}, labels, tags, isinstance(samples[0].text, tuple))


def trained(folder, samples, steps=2, precision="fp32"):
    """Train a few steps as train.py does. Returns (model, dev split, dataset)."""
    tokenizer = load_tokenizer(folder)
    data = dataset(tokenizer, samples)
    model = build_model(folder, tokenizer, data, seed=0)
    limit_vocabulary(model, data)
    optimizer = FlatAdamW(model.train(), precision, 1.0)
    for _ in range(steps):
        batch = data.train.batch(np.arange(len(samples)))
        losses(model(batch), batch).mean().backward()
        optimizer.step(3e-3)
    optimizer.release()
    return model.eval(), data.evaluation["dev"], data


@pytest.mark.parametrize("task", ["joint", "pairs"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_trains_and_predicts_the_same_after_loading(build, tmp_path, kind, task):
    """A run's metrics are those of its saved model. `predict` gives the same names."""
    model, dev, data = trained(build(kind), TASKS[task])
    labels, tags = predictions(model, dev)
    model.save(tmp_path)
    again = NLUModel.load(tmp_path)
    loaded = predictions(again, dev)
    assert np.array_equal(loaded[0], labels) and all(map(np.array_equal, loaded[1], tags))
    named = again.predict(TEXTS if task == "joint" else [sample.text for sample in TASKS[task]])
    assert [label for label, _ in named] == [data.labels[label] for label in labels]
    assert [[tag for _, tag in words] for _, words in named] == [[data.tags[tag] for tag in row] for row in tags]


@pytest.mark.parametrize(("kind", "task", "precision"), [("bert", "pairs", "fp32"),
                                                         ("distilbert", "classification", "bf16")])
def test_a_classifier_learns(build, kind, task, precision):
    model, dev, _ = trained(build(kind), TASKS[task], 30, precision)
    assert np.mean(predictions(model, dev)[0] == dev.labels.numpy()) > 0.9


@pytest.mark.parametrize("first", [4, 2**15 - 1])
def test_tables_beyond_int16_train(build, first):
    """A table may be larger than its vocabulary. A few words may have ids of 32,768 and up."""
    names = {"[PAD]": 0, "[UNK]": 1} | {name: first + i for i, name in enumerate(sorted(set(" ".join(TEXTS).split())))}
    made = Tokenizer(WordLevel(names, unk_token="[UNK]"))
    made.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    model, dev, _ = trained(build("bert", tokenizer, vocab_size=40_000), TASKS["joint"])
    assert dev.tokens.max() == max(names.values()) and len(predictions(model, dev)[0]) == 16


# ---- refusals


@pytest.mark.parametrize("task", ["joint", "pairs"])
@pytest.mark.parametrize(("kind", "flags", "precision"), [
    ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}, "fp32"), ("llama", {}, "fp32"),  # causal decoders
    ("bert", {"is_decoder": True}, "fp32"), ("bart", {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}, "fp32"),
    ("bert", {"pad": "[new]"}, "fp32"),  # the added padding token has no embedding
    ("fnet", {}, "bf16"), ("fnet", {}, "fp32"),  # fails on a batch; reads the padding
    ("bert", {"max_position_embeddings": 6}, "fp32"),  # texts are too long
])  # fmt: skip
def test_an_encoder_that_cannot_work_is_refused_in_one_line(build, tiny, kind, flags, precision, task):
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    tokenizer.pad_token = flags.get("pad", "[PAD]")
    tokenizer.add_special_tokens({"pad_token": tokenizer.pad_token})
    folder = build(kind, tokenizer, **({"vocab_size": len(tokenizer) - 1} if "pad" in flags else flags))
    tokenizer = load_tokenizer(folder)
    with refused_with(f"--model {folder}"):
        build_model(folder, tokenizer, dataset(tokenizer, TASKS[task]), 0, precision)


def test_an_encoder_with_weights_missing_is_refused(build, tmp_path):
    folder = shutil.copytree(build("bert"), tmp_path / "bert")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with refused_with(r"layer\.1\.output\.dense\.weight"):
        load_encoder(str(folder))


@pytest.mark.parametrize("load", [load_tokenizer, load_encoder, NLUModel.load])
def test_a_folder_that_is_no_model_is_refused_in_one_line(tiny, tmp_path, load):
    """With a right config.json alone, transformers would make up a tokenizer to which every word is unknown."""
    for content in ("{", '{"model_type": "no-such-model"}', "[]", Path(tiny, "config.json").read_text()):
        (tmp_path / "config.json").write_text(content)
        with refused_with():
            load(str(tmp_path))


def test_the_embedded_default_model_is_the_hubs():
    weights = Path(local_copy(DEFAULT_MODEL)) / "model.safetensors"
    digest = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == digest
