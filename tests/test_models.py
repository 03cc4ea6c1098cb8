"""The model's parts do what they say: losses, heads, the short embedding table, saving and loading."""

import copy
import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel, RobertaConfig, RobertaModel

from bench import textbook_step
from data import DEFAULT_MODEL, IGNORE, LOST, Dataset, Examples, ModelError, encode, load_tokenizer
from data.encoding import local_copy
from models import (
    EmbeddingRows,
    FlatAdamW,
    NLUModel,
    bert,
    choose_products,
    dropout,
    hugging_face,
    infer,
    is_bert,
    length,
    limit_vocabulary,
    linear,
    load_encoder,
    losses,
    onednn_is_faster,
    predictions,
    restore_vocabulary,
    softmax,
)


def test_the_embedded_model_is_the_hubs():
    weights = Path(local_copy(DEFAULT_MODEL)) / "model.safetensors"
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == (
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")


def test_without_the_package_the_hub_is_asked(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert local_copy(DEFAULT_MODEL) == "sentence-transformers/all-MiniLM-L6-v2"


def test_losses_agree_with_one_utterance_at_a_time(model, demo_data):
    batch = demo_data.train.batch(np.arange(40))
    outputs = model.eval()(batch)
    for i, loss in enumerate(losses(outputs, batch)):
        wanted = F.cross_entropy(outputs[0][i], batch.labels[i])
        for t in range(batch.tags.shape[1]):
            if batch.tags[i, t] != IGNORE:
                wanted = wanted + F.cross_entropy(outputs[1][i, t], batch.tags[i, t])
        assert loss.item() == pytest.approx(0.5 * wanted.item(), rel=1e-5)


def test_heads_follow_the_seed(tiny, tokenizer, demo_data):
    a, b, c = (NLUModel.build(tiny, tokenizer, demo_data, seed).classify.weight for seed in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_predictions_are_in_dataset_order_with_lost_words_marked(model, tokenizer):
    texts = [["play", "\u200b", "jazz"], ["wake", "me", "up", "at", "seven"], ["stop"]]
    examples = Examples(texts, ["x"] * 3, [["O"] * len(words) for words in texts])
    split = encode(examples, tokenizer, 6, {"x": 0}, {"O": 0})
    labels, tags = predictions(model, split, tokens=12)
    assert (tags == LOST).tolist() == [False] * 7 + [True, False]  # "seven" is cut off
    for i, words in enumerate(texts):
        alone = encode(examples.take([i]), tokenizer, 6, {"x": 0}, {"O": 0})
        label, alone_tags = predictions(model, alone)
        start = sum(map(len, texts[:i]))
        assert label[0] == labels[i] and alone_tags.tolist() == tags[start : start + len(words)].tolist()


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_our_encoder_is_transformers_encoder(kind, demo_data):
    """In fp32, on batches with and without padding, one short and one long, with segments too; and of the first token
    alone where a classifier reads no other."""
    torch.manual_seed(1)
    config = {BertModel: BertConfig, RobertaModel: RobertaConfig}[kind](
        vocab_size=5000, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=64, type_vocab_size=2, pad_token_id=0)
    encoder = kind(config, add_pooling_layer=False).eval()
    for parameter in encoder.parameters():  # biases and norms start as 0 and 1: then an error in them would not show
        torch.nn.init.normal_(parameter, std=0.3)
    assert is_bert(encoder)
    order = np.argsort(demo_data.train.lengths)
    for indices in (order[:1], order[-4:], order[[0, 5, -1]]):
        batch = demo_data.train.batch(indices)
        if kind is BertModel:
            batch = batch._replace(types=torch.randint(2, batch.tokens.shape))
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
        with torch.no_grad():
            wanted = hugging_face(encoder, batch, linear)
            ours, first = bert(encoder, batch, linear), bert(encoder, batch._replace(tags=None), linear)
        assert (ours - wanted).abs()[real].max() < 2e-5
        assert first.shape[1] == 1 and (first - wanted[:, :1]).abs().max() < 2e-5


@pytest.mark.parametrize("precision, close", [("fp32", 2e-5), ("bf16", 2e-2)])
def test_a_pass_packs_the_weights_as_they_are_now(model, demo_data, precision, close):
    """Weights are packed once a pass. The next one must not see those of the one before, and a training step between
    two batches of a pass none at all: packed ones have no gradient."""
    if not onednn_is_faster("cpu"):
        pytest.skip("this CPU has no AVX-512: no pass packs weights")
    choose_products(precision, "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    dev, model = demo_data.evaluation["dev"], copy.deepcopy(model).to(dtype).eval()
    for _ in range(2):
        for batch, outputs in infer(model, dev, [np.arange(9), np.arange(9, 50), np.arange(1)]):
            with torch.inference_mode():
                wanted = model(batch)
            for ours, plain in zip(outputs, wanted, strict=True):
                assert ours.dtype == torch.float32 and (ours - plain).abs().max() < close * plain.abs().max()
            batch = dev.batch(batch.indices)  # not one of inference mode, which no gradient goes through
            losses(model(batch), batch).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            model.zero_grad()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


def test_one_batch_is_not_worth_packing(model, demo_data, monkeypatch):
    """`predict` on one utterance takes four times as long with it."""
    packed = []
    monkeypatch.setattr("models.packed_linear", lambda: packed.append(1) or linear)
    dev = demo_data.evaluation["dev"]
    list(infer(model, dev, [np.arange(9)]))
    assert not packed
    list(infer(model, dev, [np.arange(9), np.arange(9)]))
    assert len(packed) == onednn_is_faster("cpu")


def test_products_of_fp32_training_are_not_rounded(monkeypatch):
    """oneDNN computes them only where it does so in fp32. bf16 would be wrong by 0.2, TF32 by 0.02."""
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    wanted = a.double() @ b.double()
    choose_products("fp32", "cpu")
    for ours in (a @ b, (b.T @ a.T).T, (a.view(2, 150, 300) @ b).flatten(0, 1), a[:7] @ b):
        assert (ours - wanted[: len(ours)]).abs().max() < 1e-3
    monkeypatch.setattr("models.onednn_is_faster", lambda device: True)
    for amx, precision, setting in ((False, "fp32", "medium"), (True, "fp32", "highest"), (False, "bf16", "highest")):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        choose_products(precision, "cpu")
        assert torch.get_float32_matmul_precision() == setting


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_encoder_of_another_kind_goes_through_transformers(tokenizer, demo_data, precision):
    torch.manual_seed(0)
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, n_layers=1, n_heads=2, hidden_dim=64)
    model = NLUModel(DistilBertModel(config), tokenizer, demo_data.labels, demo_data.tags)
    assert not is_bert(model.encoder)
    limit_vocabulary(model, demo_data)
    optimizer, curve = FlatAdamW(model.train(), precision, 1.0), []
    batch = demo_data.train.batch(np.arange(64))
    for _ in range(30):
        loss = losses(model(batch), batch).mean()
        loss.backward()
        optimizer.step(3e-3)
        curve.append(loss.item())
    assert curve[-1] < 0.5 * curve[0]


def test_dropout_drops_p_keeps_the_mean_and_its_gradient_is_its_mask():
    torch.manual_seed(0)
    x = torch.ones(1000, 333, requires_grad=True)
    y = dropout(x, 0.1)
    y.sum().backward()
    dropped = (y == 0).float().mean().item()
    assert abs(dropped - 0.1) < 0.002  # 4 standard deviations
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.9)) and torch.equal(x.grad, y)
    assert abs(dropout(torch.ones(2**20), 0.5).mean().item() - 1) < 0.004
    columns = (y == 0).float().mean(0)
    assert columns.std() < 0.012  # √(0.09 / 1000) = 0.0095: no column is favoured
    assert not torch.equal(dropout(x, 0.1), y)
    assert dropout(x, 0.0) is x and dropout(x[:0], 0.1).shape == (0, 333)


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 1_000_003])
def test_length_is_the_norm(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(length(x).double(), x.double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [1, 12, 15, 16, 17, 40])
def test_softmax_is_softmax(columns):
    x = torch.randn(3, 2, 5, columns)
    x[0, 0, :, columns // 2 + 1 :] = -torch.inf
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


def test_inference_is_without_dropout_and_leaves_the_mode_alone(model, demo_data):
    model.train()
    cut = [np.arange(99), np.arange(99, 120)]
    dev = demo_data.evaluation["dev"]
    one, two = (torch.cat([outputs[0] for _, outputs in infer(model, dev, cut)]) for _ in range(2))
    assert torch.equal(one, two) and model.training


def test_training_the_rows_in_use_is_training_the_whole_table(tiny, tokenizer, demo_data):
    def fit(limited):
        model = NLUModel.build(tiny, tokenizer, demo_data, seed=3)
        if limited:
            limit_vocabulary(model, demo_data)
            assert isinstance(model.encoder.get_input_embeddings(), EmbeddingRows)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0, fused=True)
        torch.manual_seed(0)
        history = []
        for start in range(0, 320, 32):
            batch = demo_data.train.batch(np.arange(start, start + 32))
            history.append(textbook_step(model.train(), optimizer, batch, clip=1.0).item())
        restore_vocabulary(model)
        return history, model.encoder.get_input_embeddings().weight

    (whole_losses, whole_table), (losses_, table) = fit(limited=False), fit(limited=True)
    np.testing.assert_allclose(losses_, whole_losses, rtol=1e-5)
    assert table.shape == whole_table.shape
    torch.testing.assert_close(table, whole_table, rtol=0, atol=1e-5)


def test_a_saved_model_predicts_the_same(model, tiny, tokenizer, demo_data, tmp_path):
    limit_vocabulary(model, demo_data)
    wanted = predictions(model.eval(), demo_data.evaluation["test"])
    model.save(tmp_path)
    again = NLUModel.load(tmp_path)
    got = predictions(again, demo_data.evaluation["test"])
    assert np.array_equal(wanted[0], got[0]) and np.array_equal(wanted[1], got[1])
    (label, tagged), = again.predict(["wake me up at seven"])
    assert label in demo_data.labels and [word for word, _ in tagged] == ["wake", "me", "up", "at", "seven"]
    assert [word for word, _ in again.predict(["\u200b jazz"])[0][1]] == ["\u200b", "jazz"]
    assert again.predict([" ".join(["seven"] * 200)])[0][1][-1] == ("seven", "O")  # beyond the longest input
    NLUModel.build(str(tmp_path), load_tokenizer(str(tmp_path)), demo_data, seed=0)  # the folder works as --model


def test_heads_with_a_layer_missing_are_refused(model, tmp_path):
    model.save(tmp_path)
    heads = load_file(tmp_path / "heads.safetensors")
    del heads["dense.weight"]
    save_file(heads, tmp_path / "heads.safetensors")
    with pytest.raises(ModelError, match=r"not a model folder that train.py wrote .*dense.weight"):
        NLUModel.load(tmp_path)


def test_an_encoder_with_weights_missing_is_refused(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of its weights are missing .*layer.1.output.dense.weight"):
        load_encoder(str(tmp_path))


def test_a_folder_that_cannot_be_written_is_said_in_one_line(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ModelError, match="could not be written"):
        model.save(tmp_path / "file" / "model")


def test_a_token_outside_the_limited_vocabulary_fails_loudly(model, demo_data):
    limit_vocabulary(model, demo_data)
    unused = int((model.encoder.get_input_embeddings().row == -1).nonzero()[0])
    with pytest.raises(IndexError):
        model.encoder.get_input_embeddings()(torch.tensor([[unused]]))


def classification(tokenizer, texts):
    """A Dataset of three identical splits in two classes."""
    split = encode(Examples(texts, ["yes", "no"] * (len(texts) // 2)), tokenizer, 128, {"no": 0, "yes": 1}, {})
    data = Dataset("two classes", split, {"dev": split, "test": split}, ["no", "yes"], 2, [], 0)
    data.pairs = isinstance(texts[0], tuple)
    return data


@pytest.mark.parametrize("texts", [["wake me", "play jazz"] * 8, [("wake me", "now"), ("play jazz", "please")] * 8])
def test_a_classifier_has_no_slots_and_learns(tiny, tokenizer, texts, tmp_path):
    data = classification(tokenizer, texts)
    model = NLUModel.build(tiny, tokenizer, data, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batch = data.train.batch(np.arange(16))
    for _ in range(30):
        losses(model.train()(batch), batch).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    labels, tags = predictions(model, data.evaluation["test"])
    assert labels.tolist() == data.evaluation["test"].labels.tolist() and tags is None
    model.save(tmp_path)
    again = NLUModel.load(tmp_path)
    assert [label for label, _ in again.predict(texts[:2])] == ["yes", "no"]
    assert again.pairs == isinstance(texts[0], tuple)
    if again.pairs:  # as JSON has them
        assert again.predict([list(texts[0])]) == again.predict(texts[:1])


@pytest.mark.parametrize(("pairs", "texts"), [
    (False, "one string"), (False, [("a", "b")]), (False, [None]), (False, [["a"]]), (True, ["a"]), (True, ["ab"]),
    (True, [("a", "b"), "a cat"]), (True, [("a", "b"), ("a",)]), (True, [("a", "b", "c")]), (True, [("a", 1)]),
])  # fmt: skip
def test_texts_of_another_kind_than_the_model_was_trained_on_are_refused(model, pairs, texts):
    model.pairs = pairs
    with pytest.raises(TypeError, match=f"takes a list of {'pairs of ' if pairs else ''}strings"):
        model.predict(texts)


@pytest.mark.parametrize("content", [None, "{", '{"model_type": "no-such-model"}', "[]"])
def test_a_folder_that_is_no_model_is_refused_in_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError) as caught:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError):
        NLUModel.load(tmp_path)


def test_too_long_examples_are_refused(tiny, tokenizer, demo_data):
    split = encode(Examples([["wake"] * 300], ["x"], [["O"] * 300]), tokenizer, 400, {"x": 0}, {"O": 0})
    data = Dataset("long", split, {"dev": split}, ["x"], 1, ["O"], 1)
    with pytest.raises(ModelError, match="takes at most 128 tokens, but long has one of 302; --max-length 128"):
        NLUModel.build(tiny, tokenizer, data, seed=0)
