"""Neural imputation of missing metadata, without the label.

The imputation cited by the paper reads the diagnosis among its inputs and so writes it into the filled fields. This one
sees the other metadata fields of the training rows and nothing else: a small network is trained to rebuild fields that
were hidden from it on purpose. (`label_leaking` gives it the diagnosis as one more field, to show what that does.)
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from dualrefnet.runtime.imputer import NeuralImputer, Span, network

Array = NDArray[np.float32]

HIDDEN = 64
STEPS = 400
BATCH = 512
# Of 600 distinct observed numbers a filled value needs no finer choice than 200 quantiles.
MOST_VALUES = 200
# Imputers fitted in this process: a suite trains many methods on the same rows, and the same question has the same answer.
REMEMBERED = 32
_remembered: dict[str, NeuralImputer] = {}


def fit_imputer(columns: Array, missing: NDArray[np.bool_], spans: list[Span], seed: int) -> NeuralImputer:
    """Train on the training rows, or remember what the same rows, spans and seed gave in this process.

    Args:
        columns: (N, K) standardised numbers and indicators, zero where missing.
        missing: (N, F) which fields are missing.
        spans: the F fields.
        seed: of initial weights, batches and hidden fields.
    """
    key = hashlib.sha256(columns.tobytes() + missing.tobytes() + repr((columns.shape, spans, seed, STEPS)).encode()).hexdigest()
    if key not in _remembered:
        while len(_remembered) >= REMEMBERED:
            _remembered.pop(next(iter(_remembered)))
        _remembered[key] = _train(columns, missing, spans, seed)
    return _remembered[key]


def _train(columns: Array, missing: NDArray[np.bool_], spans: list[Span], seed: int) -> NeuralImputer:
    import torch
    from torch.nn import functional

    generator = torch.Generator().manual_seed(seed)
    x, hidden_fields = torch.from_numpy(columns), torch.from_numpy(missing)
    count, fields = missing.shape
    sizes = [(columns.shape[1] + fields, HIDDEN), (HIDDEN,), (HIDDEN, columns.shape[1]), (columns.shape[1],)]
    weights = [torch.randn(size, generator=generator) * (size[0] ** -0.5 if len(size) == 2 else 0.0) for size in sizes]
    for weight in weights:
        weight.requires_grad_()
    # (F, K): which columns belong to which field.
    owner = torch.zeros(fields, columns.shape[1])
    for index, span in enumerate(spans):
        owner[index, span.start : span.stop] = 1
    optimizer = torch.optim.Adam(weights, lr=0.01)
    # The steps are tiny: several threads only wait for each other, and one gives the same numbers on any machine.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(STEPS):
            rows = torch.randint(count, (min(BATCH, count),), generator=generator)
            # A row hides between none and all of its fields, so that any pattern of gaps is met in training.
            share = torch.rand(len(rows), 1, generator=generator)
            hide = hidden_fields[rows] | (torch.rand(len(rows), fields, generator=generator) < share)
            output = network(torch.cat([x[rows] * (1 - hide.float() @ owner), hide.float()], dim=1), weights, torch)
            loss = 0 * output.sum()  # A batch may hold rows without a single answer.
            for index, span in enumerate(spans):
                known = ~hidden_fields[rows, index]
                if not known.any():
                    continue
                guess, truth = output[known, span.start : span.stop], x[rows][known, span.start : span.stop]
                loss = loss + (functional.mse_loss(guess, truth) if span.numeric else functional.cross_entropy(guess, truth))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    finally:
        torch.set_num_threads(threads)
    values = []
    for index, span in enumerate(spans):
        observed = np.unique(columns[~missing[:, index], span.start]) if span.numeric else np.empty(0, np.float32)
        if len(observed) > MOST_VALUES:
            observed = np.quantile(observed, np.linspace(0, 1, MOST_VALUES), method="nearest").astype(np.float32)
        values.append(observed)
    return NeuralImputer(tuple(spans), tuple(weight.detach().numpy() for weight in weights), tuple(values))
