"""Keras 3 on its torch backend: a network for handwritten digits, on fastops' kernels by `fastops.enable()`.

    pip install fastops[keras] scikit-learn
    python examples/keras_digits.py

Keras's layers are no layers of torch.nn: they call functions of PyTorch's. So `fastops.replace_` finds nothing in them.
"""

import contextlib
import os
import time
from typing import Any

import fastops

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads it when it is imported
try:
    import keras
    import numpy as np
    from keras import layers
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[keras] scikit-learn") from None


def digits() -> tuple[np.ndarray, np.ndarray]:
    """Images, channels last, and their numbers, in a fixed order. The last 360 are for testing."""
    data = load_digits()
    order = np.random.default_rng(0).permutation(len(data.target))
    return data.images[order, :, :, None].astype("float32") / 16, data.target[order]


def network() -> keras.Model:
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(32, 3, padding="same", activation="relu"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu"),
            layers.Dense(10),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, jit_compile=False)
    return model


def run(way: str, epochs: int = 5) -> tuple[keras.Model, dict[str, Any]]:
    """way: "plain" or "fastops". Returns the trained model, and the figures."""
    images, targets = digits()
    model = network()
    with fastops.enabled() if way == "fastops" else contextlib.nullcontext():
        start = time.perf_counter()
        history = model.fit(images[:-360], targets[:-360], batch_size=64, epochs=epochs, shuffle=False, verbose=0)
        seconds = time.perf_counter() - start
        guessed = model.predict(images[-360:], verbose=0).argmax(1)
    figures = {"seconds": seconds, "losses": history.history["loss"], "accuracy": np.mean(guessed == targets[-360:])}
    return model, figures


def main() -> None:
    print(fastops.replace_(network()))  # nothing
    for way in ("plain", "fastops"):
        _, figures = run(way)
        print(f"{way:8} {figures['seconds']:.2f} s, accuracy {figures['accuracy']:.3f}")


if __name__ == "__main__":
    main()
