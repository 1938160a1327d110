"""A sweep by Optuna: its trials run on fastops' kernels, and find what they find on PyTorch's."""

import sys
from pathlib import Path

import pytest

import fastops

optuna = pytest.importorskip("optuna", reason="optuna is not installed: pip install fastops[automl]")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

import optuna_digits  # noqa: E402


@pytest.fixture(autouse=True)
def _quiet():
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    yield
    optuna.logging.set_verbosity(before)


def test_ways():
    """The same trials in each way; two of the 360 images may be read otherwise after other roundings."""
    studies, ops = {}, {}
    for way in optuna_digits.WAYS:
        with fastops.record() as calls:
            studies[way] = optuna_digits.sweep(way, trials=3, epochs=2)
        assert all(call.kernel != "aten" for call in calls)
        ops[way] = {call.op for call in calls}
    assert ops["plain"] == set()
    assert {"linear", "cross_entropy"} <= ops["enable"]
    assert "mlp" in ops["fuse"]
    for way in ("enable", "fuse"):
        for trial, plain in zip(studies[way].trials, studies["plain"].trials, strict=True):
            assert trial.params == plain.params
            assert trial.value == pytest.approx(plain.value, abs=2.5 / 360)


def test_what_a_sweep_finds():
    assert optuna_digits.sweep("enable", trials=4).best_value > 0.9
