"""Keras 3 on its torch backend under fastops.enable(): the numbers of PyTorch's kernels, on ours."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from modes import ENVIRONMENT

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("keras") is None, reason="keras is not installed: pip install fastops[keras]"
)

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

# Keras chooses its backend when it is imported, so this has a process of its own; one, which takes 5 seconds to start.
PROGRAM = """
import contextlib, json, sys
import keras, numpy as np, torch
from keras import layers
import fastops

rng = np.random.default_rng(0)
x = rng.standard_normal((32, 12, 12, 3), dtype=np.float32)
y = rng.integers(0, 4, 32)

def train(on):
    keras.utils.set_random_seed(0)
    model = keras.Sequential([
        keras.Input((12, 12, 3)),
        layers.Conv2D(8, 3, padding="same"), layers.BatchNormalization(), layers.Activation("relu"),
        layers.MaxPooling2D(),
        layers.Conv2D(16, 3, activation="gelu"), layers.Flatten(),
        layers.Dense(24, activation="tanh"), layers.Dense(4),
    ])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.05), loss, jit_compile=False)
    with fastops.enabled() if on else contextlib.nullcontext(), fastops.record() as calls:
        losses = model.fit(x, y, batch_size=8, epochs=2, shuffle=False, verbose=0).history["loss"]
        predicted = model.predict(x, verbose=0)
    weights = [weight.ravel().tolist() for weight in model.get_weights()]
    return losses, predicted.tolist(), weights, sorted({row.op for row in calls if row.kernel != "aten"})

sys.path.insert(0, sys.argv[1])
import keras_digits

assert str(fastops.replace_(keras_digits.network())).endswith("0 replaced, 0 skipped, 0 left alone")
_, plain = keras_digits.run("plain", 2)
with fastops.record() as calls:
    _, fast = keras_digits.run("fastops", 2)
ops = sorted({row.op for row in calls if row.kernel != "aten"})
print(json.dumps([train(False), train(True), plain["losses"], fast["losses"], float(fast["accuracy"]), ops]))
"""


def test_fit_predict_and_example():
    """Losses, predictions and weights, running statistics among them, after two epochs, of a network of many layers.

    examples/keras_digits.py learns the same on our kernels, and learns something.
    """
    environment = {**ENVIRONMENT, "KERAS_BACKEND": "torch"}
    command = [sys.executable, "-c", PROGRAM, str(EXAMPLES)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    theirs, ours, *example = json.loads(run.stdout.splitlines()[-1])
    assert ours[0] == pytest.approx(theirs[0], rel=1e-4)
    for one, two in zip(ours[1] + ours[2], theirs[1] + theirs[2], strict=True):
        assert one == pytest.approx(two, rel=1e-3, abs=1e-4)
    assert theirs[3] == []
    forward = {"conv2d", "max_pool2d", "mm", "relu", "gelu", "tanh"}
    assert forward | {"conv2d_backward_weight", "max_pool2d_backward", "gelu_backward"} <= set(ours[3])
    plain, fast, accuracy, ops = example
    assert fast == pytest.approx(plain, rel=1e-3)
    assert accuracy > 0.85
    assert {"conv2d", "max_pool2d", "mm", "relu", "conv2d_backward_weight"} <= set(ops)
