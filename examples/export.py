"""A replaced model in six formats, and what reads each of them where fastops is not installed.

    pip install fastops[export] scikit-learn
    python examples/export.py FOLDER        # writes all files, and has them read by a process without fastops
    python examples/export.py FOLDER --aot  # an AOTInductor package as well, which a C++ compiler makes

examples/aotinductor runs such a package in a C++ program, with fastops' kernels.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

try:
    import onnxscript  # noqa: F401 - torch.onnx.export needs it
    from onnx.reference import ReferenceEvaluator
    from sklearn.datasets import load_digits
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}: pip install fastops[export] scikit-learn") from None


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 32), nn.GELU(), nn.Linear(32, 10)
    ).eval()


def digits() -> Tensor:
    return torch.tensor(load_digits().images[:16], dtype=torch.float32)[:, None] / 16


# ---- the formats: each writes a model to a path, and reads a function from it ----------------------------------------


def write_trace(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.jit.trace(model, x).save(path)


def write_script(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.jit.script(model).save(path)


def write_program(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.export.save(torch.export.export(model, (x,)), path)


def read_program(path: Path) -> nn.Module:
    return torch.export.load(path).module()


def write_program_with_kernels(model: nn.Module, x: Tensor, path: Path) -> None:
    import fastops

    with fastops.export_kernels():  # the program calls torch.ops.fastops, and not PyTorch's ops
        write_program(model, x, path)


def write_onnx(model: nn.Module, x: Tensor, path: Path) -> None:
    torch.onnx.export(model, (x,), path, dynamo=True, verbose=False)


def read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    evaluator = ReferenceEvaluator(str(path))
    return lambda x: torch.from_numpy(evaluator.run(None, {evaluator.input_names[0]: x.numpy()})[0])


def write_aotinductor(model: nn.Module, x: Tensor, path: Path) -> None:
    torch._inductor.aoti_compile_and_package(torch.export.export(model, (x,)), package_path=str(path))


def read_aotinductor(path: Path) -> Callable[[Tensor], Tensor]:
    return torch._inductor.aoti_load_package(str(path))


Write = Callable[[nn.Module, Tensor, Path], None]
Read = Callable[[Path], Callable[[Tensor], Tensor]]
FORMATS: dict[str, tuple[Write, Read]] = {
    "trace.pt": (write_trace, torch.jit.load),
    "script.pt": (write_script, torch.jit.load),
    "program.pt2": (write_program, read_program),
    "program_with_kernels.pt2": (write_program_with_kernels, read_program),
    "model.onnx": (write_onnx, read_onnx),
    "package.pt2": (write_aotinductor, read_aotinductor),
}


def write(folder: Path, names: list[str]) -> Tensor:
    """Writes a replaced model in these formats. Returns what it computes."""
    import fastops

    model, x = network(), digits()
    fastops.replace_(model)
    with torch.no_grad():
        for name in names:
            FORMATS[name][0](model, x, folder / name)
        return model(x)


def read_elsewhere(folder: Path, names: list[str]) -> dict[str, Tensor | str]:
    """What a process that has no fastops computes; its error where it cannot read the file."""
    command = [sys.executable, __file__, str(folder), "--read", *names]
    answers = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
    return {name: y if isinstance(y, str) else torch.tensor(y) for name, y in json.loads(answers).items()}


def read(folder: Path, names: list[str]) -> None:
    sys.modules["fastops"] = None  # as if it were not installed: importing it is an error
    x, answers = digits(), {}
    for name in names:
        try:
            with torch.no_grad():
                answers[name] = FORMATS[name][1](folder / name)(x).tolist()
        except Exception as error:
            answers[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(answers))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--aot", action="store_true", help="an AOTInductor package as well")
    parser.add_argument("--read", nargs="+", metavar="FORMAT", help="compute what is in these files, without fastops")
    options = parser.parse_args()
    if options.read:
        return read(options.folder, options.read)
    options.folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in FORMATS if options.aot or name != "package.pt2"]
    expected = write(options.folder, names)
    for name, y in read_elsewhere(options.folder, names).items():
        said = y if isinstance(y, str) else f"runs without fastops, differs by {(y - expected).abs().max():.1e}"
        print(f"{name:25} {said}")


if __name__ == "__main__":
    main()
