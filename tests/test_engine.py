"""Each fast function agrees with its slow, obvious twin: operations, encoder, embedding, optimizer, batches."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import bench
import engine
from data import batches
from engine import (
    FlatAdamW,
    UsedEmbedding,
    dropout,
    encoder_forward,
    fast_bert_forward,
    limit_vocabulary,
    linear,
    norm,
    onednn_is_faster,
    restore_vocabulary,
    set_matmul_backend,
    softmax,
    transformers_forward,
)
from models import build_model, infer, losses

pytestmark = pytest.mark.usefixtures("one_thread")

# ---- operations


def test_dropout_drops_p_keeps_the_mean_and_its_gradient_is_its_mask():
    torch.manual_seed(0)
    x = torch.ones(1000, 333, requires_grad=True)
    y = dropout(x, 0.1)
    y.sum().backward()
    assert abs((y == 0).float().mean().item() - 0.1) < 0.002  # 4 standard deviations
    assert torch.allclose(y[y != 0], torch.tensor(1 / 0.9)) and torch.equal(x.grad, y)
    assert (y == 0).float().mean(0).std() < 0.012  # √(0.09 / 1000) = 0.0095: no column is favoured
    assert not torch.equal(dropout(x, 0.1), y)
    assert dropout(x, 0.0) is x and dropout(x[:0], 0.1).shape == (0, 333)


@pytest.mark.parametrize("p", [2.0**-18, 2.0**-16, 0.5, 1 - 2.0**-15, 1 - 2.0**-16, 1 - 2.0**-17, 1 - 2.0**-18, 1.0])
def test_dropout_works_for_every_p(p):
    """It used to fail for p ≥ 1 − 2⁻¹⁷."""
    torch.manual_seed(0)
    y = dropout(torch.ones(2**20), p)
    kept = y[y != 0]
    assert abs(len(kept) / 2**20 - (1 - p)) <= 5 * (p * (1 - p) / 2**20) ** 0.5 + 2.0**-16
    assert torch.allclose(kept, torch.tensor(1 / (1 - p) if p < 1 else 0.0), rtol=1e-3)


@pytest.mark.parametrize("columns", [1, 12, 15, 16, 17, 40])
def test_softmax_is_pytorchs(columns):
    x = torch.randn(3, 2, 5, columns)
    x[0, 0, :, columns // 2 + 1 :] = -torch.inf
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 1_000_003])
def test_norm_is_the_norm(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(norm(x).double(), x.double().norm(), rtol=1e-6, atol=0)


def test_fp32_products_are_not_rounded(monkeypatch):
    """bf16 would be wrong by 0.2, TF32 by 0.02. With AMX, oneDNN would round, so MKL stays."""
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    wanted = a.double() @ b.double()
    set_matmul_backend("fp32", "cpu")
    for ours in (a @ b, (b.T @ a.T).T, (a.view(2, 150, 300) @ b).flatten(0, 1), a[:7] @ b):
        assert (ours - wanted[: len(ours)]).abs().max() < 1e-3
    monkeypatch.setattr(engine, "onednn_is_faster", lambda device: True)
    for amx, precision, setting in ((False, "fp32", "medium"), (True, "fp32", "highest"), (False, "bf16", "highest")):
        monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda amx=amx: amx)
        set_matmul_backend(precision, "cpu")
        assert torch.get_float32_matmul_precision() == setting


@pytest.mark.skipif(not onednn_is_faster("cpu"), reason="no AVX-512: no pass packs weights")
@pytest.mark.parametrize("precision, close", [("fp32", 2e-5), ("bf16", 2e-2)])
def test_packed_linear_is_linear_with_the_weights_of_now(model, demo_data, precision, close):
    """Weights are packed once a pass: the next pass must see new ones. A training step between two batches works."""
    set_matmul_backend(precision, "cpu")
    model = copy.deepcopy(model).to({"fp32": torch.float32, "bf16": torch.bfloat16}[precision]).eval()
    dev = demo_data.evaluation["dev"]
    for _ in range(2):
        for batch, outputs in infer(model, dev, [np.arange(9), np.arange(9, 50), np.arange(1)]):
            with torch.inference_mode():
                wanted = model(batch)
            for ours, plain in zip(outputs, wanted, strict=True):
                assert ours.dtype == torch.float32 and (ours - plain).abs().max() < close * plain.abs().max()
            batch = dev.batch(batch.indices)  # a batch of inference mode has no gradient
            losses(model(batch), batch).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            model.zero_grad()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


# ---- the encoder


@pytest.mark.parametrize("kind", [BertModel, RobertaModel])
def test_fast_bert_forward_is_transformers(kind, demo_data):
    """With and without padding, with segments, and of the first token alone, where a classifier reads no other."""
    torch.manual_seed(1)
    config = {BertModel: BertConfig, RobertaModel: RobertaConfig}[kind](
        vocab_size=5000, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
        max_position_embeddings=64, type_vocab_size=2, pad_token_id=0)  # fmt: skip
    encoder = kind(config, add_pooling_layer=False).eval()
    for parameter in encoder.parameters():  # biases and norms start as 0 and 1, which would hide an error in them
        torch.nn.init.normal_(parameter, std=0.3)
    assert encoder_forward(encoder) is fast_bert_forward
    order = np.argsort(demo_data.train.lengths)
    for indices in (order[:1], order[-4:], order[[0, 5, -1]]):
        batch = demo_data.train.batch(indices)
        if kind is BertModel:
            batch = batch._replace(types=torch.randint(2, batch.tokens.shape))
        real = torch.ones_like(batch.tokens, dtype=torch.bool) if batch.mask is None else batch.mask
        with torch.no_grad():
            wanted = transformers_forward(encoder, batch, linear)
            ours, first = (fast_bert_forward(encoder, b, linear) for b in (batch, batch._replace(tags=None)))
        assert (ours - wanted).abs()[real].max() < 2e-5
        assert first.shape[1] == 1 and (first - wanted[:, :1]).abs().max() < 2e-5


# ---- training


def step(model, optimizer, batch, lr):
    """Train one batch. Returns its mean loss."""
    loss = losses(model(batch), batch).mean()
    loss.backward()
    optimizer.step(lr)
    return loss.item()


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_step_has_the_mathematics_of_the_textbook_loop(tiny, tokenizer, demo_data, clip):
    """UsedEmbedding and FlatAdamW against the whole table, clip_grad_norm_ and torch's AdamW: the same losses and the
    same weights after 20 steps, without dropout."""
    plain, ours = (build_model(tiny, tokenizer, demo_data, seed=3).eval() for _ in range(2))
    plain.run_encoder = transformers_forward
    adam = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    limit_vocabulary(ours, demo_data)
    assert isinstance(ours.encoder.get_input_embeddings(), UsedEmbedding)
    optimizer, curve, wanted = FlatAdamW(ours, "fp32", clip), [], []
    for indices in np.arange(640).reshape(20, 32):
        batch = demo_data.train.batch(indices)
        loss = losses(plain(batch), batch).mean()
        adam.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), clip)
        adam.step()
        wanted.append(loss.item())
        curve.append(step(ours, optimizer, batch, 1e-3))
    assert wanted[-1] < 0.7 * wanted[0]
    np.testing.assert_allclose(curve, wanted, rtol=1e-4)
    optimizer.release()
    restore_vocabulary(ours)
    for (name, weight), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=2e-4, msg=name)


def test_gradients_of_several_batches_add_up(model, demo_data):
    """A step without any batch has gradient 0: it is another process's turn."""

    def gradient(*parts):
        ours = copy.deepcopy(model).eval()
        limit_vocabulary(ours, demo_data)
        optimizer = FlatAdamW(ours, "fp32", 1e9)
        for batch in map(demo_data.train.batch, parts):
            (losses(ours(batch), batch).sum() / 32).backward()
        optimizer.step(1e-3)
        return optimizer.master.grad

    torch.testing.assert_close(gradient(np.arange(0, 32, 2), np.arange(1, 32, 2)), gradient(np.arange(32)),
                               rtol=0, atol=1e-6)  # fmt: skip
    assert gradient().count_nonzero() == 0


def test_bf16_trains_a_rounded_copy_and_leaves_fp32_weights(model, demo_data):
    def weights():
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    optimizer, batch = FlatAdamW(model, "bf16", 1.0), demo_data.train.batch(np.arange(16))
    before, rounded = optimizer.master.clone(), optimizer.copy.clone()
    step(model, optimizer, batch, 1e-5)
    moved = optimizer.master != before
    assert moved.float().mean() > 0.5 and not torch.equal(rounded, optimizer.copy)
    assert (moved & (rounded == optimizer.copy)).any()  # steps that are too small for bf16 are not lost
    assert weights().dtype == torch.bfloat16 and torch.equal(weights(), optimizer.master.bfloat16())
    optimizer.release()
    assert torch.equal(weights(), optimizer.master)


def test_a_token_outside_the_used_vocabulary_fails_loudly(model, demo_data):
    limit_vocabulary(model, demo_data)
    unused = int((model.encoder.get_input_embeddings().row == -1).nonzero()[0])
    with pytest.raises(IndexError):
        model.encoder.get_input_embeddings()(torch.tensor([[unused]]))


# ---- batches


@given(st.integers(1, 300), st.integers(1, 64), st.integers(0, 2**32))
def test_batches_hold_every_sample_once_and_are_of_one_size(n, size, seed):
    lengths = np.random.default_rng(seed).integers(3, 60, n)
    parts = batches(lengths, np.arange(n), size, np.random.default_rng(seed))
    assert sorted(np.concatenate(parts)) == list(range(n)) and len(parts) == -(-n // size)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_sample_weighs_more_because_of_its_length(rng):
    """In the mean over a batch, a sample weighs 1 / B. The last, short batch used to hold the shortest texts."""
    lengths, weights = np.arange(1010) // 10 + 3, np.zeros(1010)
    for _ in range(400):
        for batch in batches(lengths, np.arange(1010), 64, rng):
            weights[batch] += 1 / len(batch) / 400
    assert weights[:101].mean() == pytest.approx(weights[-101:].mean(), rel=2e-3)


def test_the_benchmark_gives_its_figures(tiny, tmp_path, capsys):
    assert bench.main(["--model", tiny, "--max-train", "200", "--rounds", "1", "--seconds", "0.05", "--device", "cpu",
                       "--json", str(tmp_path / "bench.json")]) == 0  # fmt: skip
    result, printed = json.loads((tmp_path / "bench.json").read_text()), capsys.readouterr().out
    assert all(name in printed for name in ("fp32 training", "fp32 scoring", "padding"))
    assert all(rate > 0 for rate in result["rates"].values())
