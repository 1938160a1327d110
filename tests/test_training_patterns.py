"""Transfer learning, two heads, ensembles: the examples, on fastops as on PyTorch."""

import sys
from pathlib import Path

import pytest
import torch
from training import assert_trained_alike

import fastops

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import ensemble
import multi_task
import transfer


def recorded(function, *args, **kwargs):
    with fastops.record() as calls:
        result = function(*args, **kwargs)
    assert all(call.kernel != "aten" for call in calls)
    return result, {call.op for call in calls}


def test_transfer():
    (exact, _), (theirs, _) = transfer.run("plain", 8, torch.float64), transfer.run("plain", 8)
    (ours, figures), ops = recorded(transfer.run, "fastops", 8)
    assert {"conv2d", "conv2d_backward_weight", "batch_norm", "linear_backward"} <= ops
    assert_trained_alike(ours, theirs, exact)
    # The backbone stays what it was when it was frozen.
    before, _ = transfer.run("plain", 8)
    assert all(torch.equal(p, q) for p, q in zip(theirs[0].parameters(), before[0].parameters(), strict=True))
    assert not any(p.requires_grad for p in ours[0].parameters())
    assert set(figures) == {"ms a step, all", "accuracy, 0 to 4", "ms a step, head", "accuracy, 5 to 9"}


def test_what_transfer_learns():
    figures = transfer.run("fastops", 40)[1]
    assert figures["accuracy, 0 to 4"] > 0.9
    assert figures["accuracy, 5 to 9"] > 0.85


@pytest.mark.parametrize("way", ["replace_", "fuse"])
def test_two_heads(way):
    (exact, _), (theirs, _) = multi_task.run("plain", 10, torch.float64), multi_task.run("plain", 10)
    (ours, _), ops = recorded(multi_task.run, way, 10)
    assert ({"gelu", "linear"} if way == "replace_" else {"mlp"}) <= ops
    assert_trained_alike(ours, theirs, exact)


def test_what_two_heads_learn():
    _, figures = multi_task.run("fuse")
    assert figures["accuracy"] > 0.85
    assert figures["share of the ink's variance explained"] > 0.85


@pytest.mark.parametrize("way", ["stacked", "in turn"])
def test_ensemble(way):
    (exact, _), (theirs, _) = ensemble.run(way, 3, 10, torch.float64), ensemble.run(way, 3, 10)
    (ours, _), ops = recorded(ensemble.run, f"{way}, fastops", 3, 10)
    assert ops
    assert_trained_alike(ours, theirs, exact)


def test_what_an_ensemble_learns():
    models, _ = ensemble.run("in turn, fastops", 4)
    one, together = ensemble.accuracies(models)
    assert 0.7 < one <= together


def test_replaced_networks_can_be_stacked():
    """Slower than PyTorch's, but the same numbers."""
    plain, ours = ensemble.networks(2), ensemble.networks(2)
    for model in ours:
        fastops.replace_(model)
    ensemble.train_stacked(plain, 2)
    ensemble.train_stacked(ours, 2)
    for one, two in zip(plain, ours, strict=True):
        for p, q in zip(one.parameters(), two.parameters(), strict=True):
            torch.testing.assert_close(p, q, atol=1e-6, rtol=1e-5)
