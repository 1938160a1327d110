"""The digits ConvNet as a file that runs without PyTorch: what it takes on disk, in memory and in time.

    pip install numpy scikit-learn
    python examples/light_runtime.py [--epochs 3] [--seconds 2] [--threads 1] [--out FOLDER]

Where onnxruntime is installed (or lies in a folder of PYTHONPATH), it runs the same network in turn.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import fastops
from fastops import light
from fastops.demo import ConvNet, tasks

try:
    import numpy
    import sklearn  # noqa: F401 - tasks are made of its digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install numpy scikit-learn") from None

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "light"))
import fastops_light

START = """
import time; begin = time.perf_counter()
import numpy
imported = time.perf_counter()
{load}
y = run(numpy.load({image!r}))
print((time.perf_counter() - imported) * 1e3, (imported - begin) * 1e3)
"""


def trained(epochs: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    task = next(one for one in tasks(seed=0) if one.build is ConvNet)
    torch.manual_seed(0)
    model = ConvNet()
    optimizer = task.optimizer(model.parameters())
    for _ in range(epochs):
        for x, y in zip(task.inputs[:-360].split(64), task.targets[:-360].split(64), strict=True):
            optimizer.zero_grad()
            task.loss(model(x), y).backward()
            optimizer.step()
    return model.eval(), task.inputs[-360:], task.targets[-360:]


def onnx_session(
    model: nn.Module, image: torch.Tensor, path: Path, threads: int
) -> Callable[..., numpy.ndarray] | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    torch.onnx.export(model, (image,), path, dynamo=True, verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda x: session.run(None, {name: x})[0]


def in_turn(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, float]:
    """Microseconds of a call, medians of samples that are taken in turn."""
    samples: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, way in ways.items():
            begin = time.perf_counter()
            for _ in range(50):
                way()
            samples[name].append((time.perf_counter() - begin) / 50 * 1e6)
    return {name: statistics.median(values) for name, values in samples.items()}


def first_result(load: str, image: Path) -> float:
    """Milliseconds from an open Python to the first result, without importing NumPy; the median of nine processes."""
    code = START.format(load=load, image=str(image))
    environment = {"PYTHONPATH": ":".join(sys.path)}
    times = []
    for _ in range(9):
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
        )
        times.append(float(result.stdout.split()[0]))
    return statistics.median(times)


def main(arguments: argparse.Namespace, folder: Path) -> None:
    model, images, classes = trained(arguments.epochs)
    path = folder / "convnet.fops"
    print(light.save(model, path, images[:1]))
    run = fastops_light.Model(path, arguments.threads)
    right = (run(images.numpy()).argmax(1) == classes.numpy()).mean()
    print(f"{right:.1%} of the test images right; {fastops_light.library().stat().st_size / 1e6:.1f} MB of library")

    image = folder / "image.npy"
    one = images[:1].numpy()
    numpy.save(image, one)
    command = Path(fastops.__file__).with_name("fastops-run")
    print(subprocess.run([command, path, image], capture_output=True, text=True, check=True).stdout.splitlines()[0])

    frozen = fastops.freeze(model)
    ways = {"fastops_light": lambda: run(one), "fastops.freeze": torch.no_grad()(lambda: frozen(images[:1]))}
    loads = {"fastops_light": f"import fastops_light; run = fastops_light.Model({str(path)!r})"}
    session = onnx_session(model, images[:1], folder / "convnet.onnx", arguments.threads)
    if session is not None:
        numpy.testing.assert_allclose(session(one), run(one), rtol=1e-3, atol=1e-4)
        ways["onnxruntime"] = lambda: session(one)
        onnx = str(folder / "convnet.onnx")
        loads["onnxruntime"] = (
            f"import onnxruntime; s = onnxruntime.InferenceSession({onnx!r}, providers=['CPUExecutionProvider']);"
            "run = lambda x: s.run(None, {s.get_inputs()[0].name: x})"
        )
    torch.set_num_threads(arguments.threads)
    for name, microseconds in in_turn(ways, arguments.seconds).items():
        print(f"{name}: {microseconds:.1f} us for an image, {arguments.threads} thread(s)")
    for name, load in loads.items():
        print(f"{name}: first result after {first_result(load, image):.1f} ms")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="where the files stay")
    parsed = parser.parse_args()
    if parsed.out is not None:
        parsed.out.mkdir(parents=True, exist_ok=True)
        main(parsed, parsed.out)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(parsed, Path(temporary))
