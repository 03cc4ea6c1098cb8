"""Each fast function agrees with its slow, obvious twin: operations, encoder, embedding, optimizer."""

import re

import numpy as np
import pytest
import torch
from conftest import GPU
from torch.optim import AdamW
from transformers import BertConfig, BertModel, MPNetConfig, MPNetModel, RobertaConfig, RobertaModel

import bench
import engine
from engine import FlatAdamW, dropout, limit_vocabulary, linear, norm, restore_vocabulary, set_matmul_backend, softmax
from models import build_model, infer, losses

# ---- operations


@pytest.mark.parametrize("p", [0.0, 2**-18, 2**-16, 0.1, 0.5, 1 - 2**-15, 1 - 2**-16, 1 - 2**-17, 1 - 2**-18, 1.0])
def test_dropout_drops_p_keeps_the_mean_and_its_gradient_is_its_mask(p):
    """It used to fail for p ≥ 1 − 2⁻¹⁷."""
    torch.manual_seed(0)
    x = torch.ones(2**10, 2**10, requires_grad=True)
    y = dropout(x, p)
    y.sum().backward()
    assert (y == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p)) ** 0.5 / 2**10 + 2**-16)
    assert p == 1 or torch.allclose(y[y != 0], torch.tensor(1 / (1 - p)), rtol=1e-3)
    assert torch.equal(x.grad, y)
    assert (y == 0).float().mean(0).std() < 0.02  # √0.25 / 32 = 0.0156 at most: no column is favoured


@pytest.mark.parametrize("columns", [1, 12, 15, 16, 17, 40])
def test_softmax_is_pytorchs(columns):
    x = torch.randn(3, 2, 5, columns)
    x[0, 0, :, columns // 2 + 1 :] = -torch.inf
    torch.testing.assert_close(softmax(x), torch.softmax(x, -1))


@pytest.mark.parametrize("n", [0, 1, 4095, 4096, 1_000_003])
def test_norm_is_the_norm(n):
    x = torch.randn(n, generator=torch.Generator().manual_seed(n))
    torch.testing.assert_close(norm(x).double(), x.double().norm(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(("amx", "precision", "setting"),
                         [(False, "fp32", "medium"), (True, "fp32", "highest"), (False, "bf16", "highest")])
def test_fp32_products_are_not_rounded(monkeypatch, amx, precision, setting):
    """bf16 would be wrong by 0.2, TF32 by 0.02. With AMX, oneDNN would round to bf16, so MKL stays."""
    a, b = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    set_matmul_backend(precision, "cpu")
    assert (a @ b - a.double() @ b.double()).abs().max() < 1e-3
    monkeypatch.setattr(engine, "onednn_is_faster", lambda device: True)
    monkeypatch.setattr("torch.cpu._is_amx_tile_supported", lambda: amx)
    set_matmul_backend(precision, "cpu")
    assert torch.get_float32_matmul_precision() == setting


@pytest.mark.skipif(not engine.onednn_is_faster("cpu"), reason="no AVX-512: no pass packs weights")
@pytest.mark.parametrize(("precision", "close"), [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_packed_linear_is_linear_with_the_weights_of_now(model, demo_data, precision, close):
    """Weights are packed once a pass: the next pass must see new ones."""
    dev, model = demo_data.evaluation["dev"], model.to(precision).eval()
    for _ in range(2):
        for batch, outputs in infer(model, dev, [np.arange(9), np.arange(9, 50), np.arange(1)]):
            with torch.inference_mode():
                wanted = model(batch)
            for ours, plain in zip(outputs, wanted, strict=True):
                assert ours.dtype == torch.float32 and (ours - plain).abs().max() < close * plain.abs().max()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)


# ---- the encoder


@pytest.mark.parametrize(("kind", "config"), [(BertModel, BertConfig), (RobertaModel, RobertaConfig),
                                             (MPNetModel, MPNetConfig)])  # fmt: skip
def test_fast_bert_forward_is_transformers(kind, config, demo_data):
    """With and without padding, with segments, and of the first token alone, where a classifier reads no other."""
    torch.manual_seed(1)
    small = config(vocab_size=5000, hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96,
                   max_position_embeddings=64, pad_token_id=0)  # fmt: skip
    encoder = kind(small, add_pooling_layer=False).eval()
    for parameter in encoder.parameters():  # biases and norms start as 0 and 1, which would hide an error in them
        torch.nn.init.normal_(parameter, std=0.3)
    assert engine.encoder_forward(encoder) is engine.fast_bert_forward
    order = np.argsort(demo_data.train.lengths)
    for indices in (order[:1], order[-4:], order[[0, 5, -1]], order[[0, 99]]):
        batch = demo_data.train.batch(indices)
        if kind is BertModel:
            batch = batch._replace(types=torch.randint(2, batch.tokens.shape))
        with torch.no_grad():
            wanted = engine.transformers_forward(encoder, batch, linear)
            ours, first = (engine.fast_bert_forward(encoder, b, linear) for b in (batch, batch._replace(tags=None)))
        real = ... if batch.mask is None else batch.mask
        assert (ours - wanted).abs()[real].max() < 2e-5
        assert first.shape[1] == 1 and (first - wanted[:, :1]).abs().max() < 2e-5


# ---- training


def step(model, optimizer, batch, *lr, clip=None):
    """Train one batch. clip: the largest norm of the gradient; None: the optimizer clips. Returns the mean loss."""
    loss = losses(model(batch), batch).mean()
    loss.backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
    optimizer.step(*lr)
    model.zero_grad()
    return loss.item()


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_a_step_has_the_mathematics_of_the_textbook_loop(tiny, tokenizer, demo_data, clip):
    """UsedEmbedding and FlatAdamW against the whole table, clip_grad_norm_ and torch's AdamW: the same losses and the
    same weights after 20 steps, without dropout."""
    plain, ours = (build_model(tiny, tokenizer, demo_data, seed=3).eval() for _ in range(2))
    plain.run_encoder = engine.transformers_forward
    adam = AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0)
    limit_vocabulary(ours, demo_data)
    optimizer = FlatAdamW(ours, "fp32", clip)
    for indices in np.arange(640).reshape(20, 32):
        batch = demo_data.train.batch(indices)
        assert step(ours, optimizer, batch, 1e-3) == pytest.approx(step(plain, adam, batch, clip=clip), rel=1e-4)
    with pytest.raises(IndexError):  # a token outside the used vocabulary
        ours.encoder.get_input_embeddings()((ours.encoder.get_input_embeddings().row == -1).nonzero()[0])
    optimizer.release()
    restore_vocabulary(ours)
    for (name, weight), other in zip(plain.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(other, weight, rtol=0, atol=2e-4, msg=name)


def test_bf16_trains_a_rounded_copy_and_leaves_fp32_weights(model, demo_data):
    """Steps that are too small for bf16 are not lost. Without a batch the gradient is 0."""

    def weights():
        return torch.cat([weight.detach().flatten() for weight in model.parameters()])

    optimizer = FlatAdamW(model, "bf16", 1.0)
    before, rounded = optimizer.master.clone(), weights()
    step(model, optimizer, demo_data.train.batch(np.arange(16)), 1e-5)
    moved = optimizer.master != before
    assert moved.float().mean() > 0.5 and (moved & (rounded == weights())).any() and not torch.equal(rounded, weights())
    assert weights().dtype == torch.bfloat16 and torch.equal(weights(), optimizer.master.bfloat16())
    optimizer.step(1e-5)
    assert not optimizer.master.grad.any()
    optimizer.release()
    assert torch.equal(weights(), optimizer.master)


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_benchmark_gives_its_figures(tiny, device, capsys):
    assert bench.main(["--model", tiny, "--max-train", "200", "--rounds", "1", "--seconds", "0.05", "--device",
                       device]) == 0  # fmt: skip
    lines = re.findall(r"^fp32 (training|scoring) +(\d+) +(\d+) +(\d+\.\d+)$", capsys.readouterr().out, re.M)
    assert [phase for phase, *_ in lines] == ["training", "scoring"]
    assert all(int(ours) / int(plain) == pytest.approx(float(ratio), rel=0.1) for _, plain, ours, ratio in lines)
