"""How fast is the engine? Our training step and scoring pass against the textbook's, in one run.

    python bench.py --dataset snips --data-dir …

Every figure is a median over rounds in which all variants take turns, so that a noisy machine is noisy for all of them.
"""


import numpy as np
import torch

import report
import train
from data import batches
from models import NLUModel, hugging_face, infer, limit_vocabulary, losses
from scoring import SCORES


def textbook(args, tokenizer, data):
    """Generators that train one batch, and score one batch, at every next(): as one would write it without a thought
    for speed. The model is transformers', batches come from one shuffle and are padded to their longest example."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed).to(args.device)
    model.encode = hugging_face
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    n, size = len(data.train), args.batch_size

    def training():
        while True:
            order = np.random.permutation(n)
            for start in range(0, n - size + 1, size):
                model.train()
                batch = data.train.batch(order[start : start + size])
                loss = losses(model(batch), batch).mean()
                optimizer.zero_grad()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                yield size

    def scoring():
        while True:
            for start in range(0, n - size + 1, size):
                model.eval()
                batch = data.train.batch(np.arange(start, start + size))
                with torch.no_grad():
                    SCORES["el2n"](model(batch), batch)
                yield size

    return training(), scoring()


def engine(args, tokenizer, data, precision, parts=None):
    """The same of train.py's own loop and scoring.py's own pass. parts: seconds by part of the step are added to it."""
    model = NLUModel.build(args.model, tokenizer, data, args.seed)
    limit_vocabulary(model, data)
    optimizer = train.FlatAdamW(model.to(args.device), precision, args.clip)
    clock = report.Clock(args.device)
    rng, everything = np.random.default_rng(args.seed), np.arange(len(data.train))

    def training():
        while True:
            for indices in batches(data.train.lengths, everything, args.batch_size, rng):
                model.train()
                with clock("batch"):
                    batch = data.train.batch(indices)
                with clock("forward"):
                    loss = losses(model(batch), batch).mean()
                with clock("backward"):
                    loss.backward()
                with clock("optimizer"):
                    optimizer.step(args.lr)
                yield len(indices)

    def scoring():
        while True:
            cut = batches(data.train.lengths, everything, 256)
            for i in rng.permutation(len(cut)):
                for batch, outputs in infer(model, data.train, [cut[i]]):
                    SCORES["el2n"](outputs, batch)
                yield len(cut[i])

    return training(), scoring(), model, clock
