"""What the functions of fastops.light say about arguments: which one, what it may be, what came."""

import re

import pytest
import torch
from torch import nn

from fastops import light


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


X = torch.zeros(2, 64)
NOT_A_FUNCTION = "filter_fn must be a function of a module and its name, or None, got int"
CALLS = {
    "quantize_": lambda: light.quantize_(mlp(), filter_fn=3),
    "prepare_qat_": lambda: light.prepare_qat_(mlp(), filter_fn=3),
    "sparsify_": lambda: light.sparsify_(mlp(), filter_fn=3),
    "low_rank_": lambda: light.low_rank_(mlp(), parameters=0.5, filter_fn=3),
    "prune_channels_": lambda: light.prune_channels_(mlp(), X, filter_fn=3),
    "prune_weights_": lambda: light.prune_weights_(mlp(), 0.5, filter_fn=3),
    "Pruner": lambda: light.Pruner(mlp(), 0.5, filter_fn=3),
}
CASES = [(call, TypeError, f"{name}: {NOT_A_FUNCTION}") for name, call in CALLS.items()] + [
    (
        lambda: light.prune_weights_(mlp(), 2),
        ValueError,
        "prune_weights_: sparsity must be from 0 to 1 for pattern (1, 1), got 2",
    ),
    (
        lambda: light.prune_weights_(mlp(), 0.5, scope="all"),
        ValueError,
        "prune_weights_: scope must be 'layer' or 'global', got 'all'",
    ),
    (lambda: light.prune_weights_(3, 0.5), TypeError, "prune_weights_: model must be a torch.nn.Module, got int"),
    (lambda: light.prune_weights_(nn.ReLU(), 0.5), ValueError, "prune_weights_: model has no linear layer"),
    (lambda: light.Pruner(mlp(), -1), ValueError, "Pruner: sparsity must be from 0 to 1 for pattern (1, 1), got -1"),
    (
        lambda: light.distill(mlp(), mlp(), [(X, None)], epochs=-1),
        ValueError,
        "distill: epochs must be a positive int, got -1",
    ),
    (lambda: light.sparsify_(mlp(), rows=True), ValueError, "sparsify_: rows must be a positive int, got True"),
    (
        lambda: light.prune_channels_(mlp(), X, importance=lambda name, layer: torch.full((64,), torch.nan)),
        ValueError,
        "prune_channels_: importance must give numbers for 0, got NaN",
    ),
    (
        lambda: light.save(mlp(), "no such folder/m.fops", X),
        ValueError,
        "save: path must be that of a file in a folder that exists, got 'no such folder/m.fops', which is in a folder "
        "that does not exist",
    ),
    (lambda: light.save(mlp(), "/", X), ValueError, "in a folder that exists, got '/', which is a folder"),
    (lambda: light.save(mlp(), 3, X), TypeError, "save: path must be that of a file, got int"),
    (
        lambda: light.prepare_qat_(mlp(), "int8_static", averaging=0),
        ValueError,
        "prepare_qat_: averaging must be more than 0 and at most 1, got 0",
    ),
    (
        lambda: light.prepare_qat_(mlp(), "int4"),
        ValueError,
        "prepare_qat_: config must be one of 'int8_dynamic', 'int8_static', 'int8_weight', 'int4_weight', "
        "'fp8_weight', got 'int4'",
    ),
    (
        lambda: light.prepare_qat_(mlp(), "int4_weight", group_size=7),
        ValueError,
        "prepare_qat_: group_size must be a power of two from 16 on, or None, got 7",
    ),
    (lambda: light.convert_qat_(mlp()), ValueError, "convert_qat_: model must have layers that prepare_qat_ has"),
]


@pytest.mark.parametrize(("call", "kind", "message"), CASES)
def test_message(call, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        call()
