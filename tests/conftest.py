"""Fixtures: a tiny BERT with random weights, so that whole runs take seconds, and the raw data where it is at hand."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may reach for the network

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from data import demo, load, load_tokenizer
from models import NLUModel

SHARED = Path(os.environ.get("DATA_DIR") or Path(__file__).parents[2] / "shared" / "data")


@pytest.fixture(scope="session")
def raw():
    """Folder of the raw datasets."""
    if not (SHARED / "snips").is_dir():
        pytest.skip(f"no raw data in {SHARED} (set DATA_DIR)")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Folder of the tiny BERT."""
    return tiny_bert(tmp_path_factory.mktemp("tiny"))


def tiny_bert(folder):
    """Write a two-layer BERT with random weights and a vocabulary of letters and a few hundred demo words."""
    texts = demo.generate()["train"].texts
    letters = sorted({letter for words in texts for word in words for letter in word})
    words = sorted({word for words in texts[:1500] for word in words})
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = list(dict.fromkeys([*special, *letters, *("##" + letter for letter in letters), *words]))
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizerFast(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2,
                        num_attention_heads=2, intermediate_size=128, max_position_embeddings=128)
    BertModel(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return load_tokenizer(tiny)


@pytest.fixture(scope="session")
def demo_data(tokenizer):
    return load("demo", tokenizer)


@pytest.fixture
def model(tiny, tokenizer, demo_data):
    return NLUModel.build(tiny, tokenizer, demo_data, seed=0)


@pytest.fixture
def one_thread():
    """For tiny models: threads would mostly wait for each other, very long where other programs keep the cores busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def rng():
    return np.random.default_rng(7)
