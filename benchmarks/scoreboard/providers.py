"""Who takes part in the scoreboard: what each makes of a network. Nothing of a peer is imported before it is asked for.

Every provider gets the same network, with the same weights, the same input and the same number of threads, which it is
told by its own means; the process has as many processors as threads. It is set up as its documentation says for
latency on a CPU. What it computes with is the dtype asked for: OpenVINO, left alone, takes bfloat16 for float32.
"""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastops
import fastops.functional as FF
import fastops.optim
from fastops import light
from fastops.benchmarks.harness import DTYPES
from fastops.benchmarks.scoreboard.networks import FLOATS, INT8, NETWORKS, Network

RATE = 1e-3  # of SGD, while steps are timed


class Absent(Exception):
    """The provider does not take part in a case; the message says why: "not installed"."""


def float_dtype(dtype: str) -> torch.dtype:
    """What parameters and inputs of a case have."""
    return torch.float32 if dtype == INT8 else DTYPES[dtype]


@dataclass(frozen=True)
class Setup:
    """One case, for one provider. folder: where files of the case may be written."""

    network: str
    batch: int
    dtype: str
    threads: int
    folder: Path

    @property
    def chosen(self) -> Network:
        return NETWORKS[self.network]

    def model(self) -> nn.Module:
        """In the case's dtype, float32 where that is int8; in training."""
        return self.chosen.model().to(float_dtype(self.dtype))

    def data(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets, in the case's dtype where they are not classes."""
        x, target = self.chosen.data(self.batch)
        dtype = float_dtype(self.dtype)
        return x.to(dtype), target.to(dtype) if target.is_floating_point() else target


@dataclass(frozen=True)
class Inference:
    """call: one pass through the network. output: what that returned, as a tensor."""

    call: Callable[[], Any]
    output: Callable[[Any], Tensor]


@dataclass(frozen=True)
class Training:
    """call: one step of SGD. rate: sets the learning rate. parameters: copies of them, by the network's names.

    reset: puts back the parameters and buffers that the network began with.
    """

    call: Callable[[], Any]
    rate: Callable[[float], None]
    parameters: Callable[[], dict[str, Tensor]]
    reset: Callable[[], None]


class Provider:
    """label: as the tables have it. peer: whether it is somebody else's. memory: whether a step's peak is measured.

    dtypes: the cases in which it takes part unless it is asked for by name.
    """

    label: str
    dtypes: tuple[str, ...] = FLOATS
    peer = True
    memory = False

    def inference(self, setup: Setup) -> Inference:
        raise Absent("training only")

    def training(self, setup: Setup) -> Training:
        raise Absent("inference only")


def installed(name: str) -> Any:
    """The module. Raises Absent where there is none."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name.partition(".")[0]:
            raise Absent("not installed") from None
        raise


# ---- PyTorch, and fastops in it --------------------------------------------------------------------------------------


class Torch(Provider):
    """PyTorch, after `change` of the model; own_step: a training step with fastops' losses and SGD, too."""

    def __init__(
        self,
        label: str,
        change: Callable[[nn.Module], nn.Module] = lambda model: model,
        peer: bool = True,
        memory: bool = False,
        trains: bool = True,
        channels_last: bool = False,
        own_step: bool = False,
        dtypes: tuple[str, ...] = FLOATS,
    ) -> None:
        self.label, self.change, self.peer, self.memory, self.dtypes = label, change, peer, memory, dtypes
        self.trains, self.channels_last, self.own_step = trains, channels_last, own_step

    def _prepare(self, setup: Setup, training: bool) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
        """The plain model, which owns the parameters; what runs; inputs and targets."""
        torch.set_num_threads(setup.threads)
        model = setup.model().train(training)
        x, target = setup.data()
        if self.channels_last:
            if x.ndim != 4:
                raise Absent("images only")
            model, x = model.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        return model, self.change(model), x, target

    def inference(self, setup: Setup) -> Inference:
        with torch.no_grad():
            _, runs, x, _ = self._prepare(setup, False)

        def call() -> Tensor:
            with torch.no_grad():
                return runs(x)

        return Inference(call, lambda output: output)

    def training(self, setup: Setup) -> Training:
        if not self.trains:
            raise Absent("inference only")
        model, runs, x, target = self._prepare(setup, True)
        functional = FF if self.own_step else F
        loss = functional.mse_loss if target.is_floating_point() else functional.cross_entropy
        optimizer = (fastops.optim if self.own_step else torch.optim).SGD(model.parameters(), lr=RATE)
        begin = {name: value.clone() for name, value in model.state_dict().items()}

        def call() -> Tensor:
            optimizer.zero_grad()
            value = loss(runs(x), target)
            value.backward()
            optimizer.step()
            return value.detach()

        def rate(value: float) -> None:
            for group in optimizer.param_groups:
                group["lr"] = value

        return Training(
            call,
            rate,
            lambda: {name: value.detach().clone() for name, value in model.named_parameters()},
            lambda: model.load_state_dict(begin) and None,
        )


def _compiled(model: nn.Module) -> nn.Module:
    """The inductor, which looks for its compiler itself, in this process."""
    torch._inductor.config.compile_threads = 1
    return torch.compile(model)


def _replaced(model: nn.Module) -> nn.Module:
    fastops.replace_(model)
    return model


def _fastops(name: str) -> Callable:
    """fastops' function of that name. Raises Absent where this fastops has none."""
    if not hasattr(fastops, name):
        raise Absent("not there")
    return getattr(fastops, name)


def _backend(model: nn.Module) -> nn.Module:
    if "fastops" not in torch._dynamo.list_backends(None):
        raise Absent("not there")
    return torch.compile(model, backend="fastops")


def _enabled(model: nn.Module) -> nn.Module:
    _fastops("enable")()
    return model


# ---- ONNX ------------------------------------------------------------------------------------------------------------


def onnx_file(setup: Setup) -> Path:
    """The network in evaluation as ONNX, float32; its weights are those of the case's dtype. Written once a case."""
    path = setup.folder / "network.onnx"
    if not path.exists():
        installed("onnxscript")
        torch.set_num_threads(setup.threads)
        model, x = setup.model().float().eval(), setup.data()[0].float()
        torch.onnx.export(model, (x,), path, input_names=["x"], dynamo=True, external_data=True, verbose=False)
    return path


class OnnxRuntime(Provider):
    label = "ONNX Runtime"

    def file(self, setup: Setup) -> Path:
        if setup.dtype == "bf16":
            raise Absent("float32 only")
        return onnx_file(setup)

    def inference(self, setup: Setup) -> Inference:
        library = installed("onnxruntime")
        options = library.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = setup.threads, 1
        options.log_severity_level = 3
        session = library.InferenceSession(self.file(setup), options, providers=["CPUExecutionProvider"])
        inputs = {"x": setup.data()[0].numpy()}
        return Inference(lambda: session.run(None, inputs), lambda outputs: torch.from_numpy(outputs[0]))


class OpenVINO(Provider):
    label = "OpenVINO"

    def network(self, setup: Setup, library: Any) -> Any:
        return onnx_file(setup)

    def inference(self, setup: Setup) -> Inference:
        library = installed("openvino")
        hint = library.Type.bf16 if setup.dtype == "bf16" else library.Type.f32
        compiled = library.Core().compile_model(
            self.network(setup, library),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": setup.threads,
                "NUM_STREAMS": 1,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": hint,
            },
        )
        request = compiled.create_infer_request()
        x = setup.data()[0].float().numpy()
        request.set_input_tensor(library.Tensor(x, shared_memory=True))
        # The library does not keep the memory of x alive, and chooses that of the output at the first call.
        return Inference(lambda x=x: request.infer(), lambda _: torch.tensor(request.get_output_tensor().data))


# ---- JAX -------------------------------------------------------------------------------------------------------------


class Jax(Provider):
    """jax.jit over the whole network, and over the whole training step."""

    label = "JAX"

    def _prepare(self, setup: Setup, training: bool) -> tuple:
        # Eigen's pool has a thread for each processor that the process may use.
        os.environ["XLA_FLAGS"] = f"--xla_cpu_multi_thread_eigen={str(setup.threads > 1).lower()}"
        os.environ["JAX_PLATFORMS"] = "cpu"
        installed("jax")
        from fastops.benchmarks.scoreboard import through_jax as through

        model = setup.model().train(training)
        parameters = {name: through.array(value) for name, value in model.named_parameters()}
        buffers = {name: through.array(value) for name, value in model.named_buffers()}
        return through, through.translate(model), parameters, buffers, *map(through.array, setup.data())

    def inference(self, setup: Setup) -> Inference:
        through, network, parameters, buffers, x, _ = self._prepare(setup, False)
        run = through.jax.jit(lambda parameters, buffers, x: network(parameters, buffers, x)[0])
        return Inference(lambda: run(parameters, buffers, x).block_until_ready(), through.tensor)

    def training(self, setup: Setup) -> Training:
        through, network, parameters, buffers, x, target = self._prepare(setup, True)
        jax, jnp = through.jax, through.jnp

        def loss(parameters: dict, buffers: dict) -> tuple:
            output, buffers = network(parameters, buffers, x)
            output = output.astype(jnp.float32)
            if jnp.issubdtype(target.dtype, jnp.floating):
                return jnp.square(output - target).mean(), buffers
            return -jnp.take_along_axis(jax.nn.log_softmax(output), target[:, None], 1).mean(), buffers

        def step(parameters: dict, buffers: dict, rate: Any) -> tuple:
            (value, buffers), gradients = jax.value_and_grad(loss, has_aux=True)(parameters, buffers)
            return jax.tree.map(lambda p, g: (p - rate * g).astype(p.dtype), parameters, gradients), buffers, value

        compiled = jax.jit(step, donate_argnums=(0, 1))
        state: dict[str, Any] = {"rate": jnp.float32(RATE)}

        def reset() -> None:
            state["parameters"], state["buffers"] = (
                jax.tree.map(lambda value: value.copy(), values) for values in (parameters, buffers)
            )

        def call() -> Any:
            state["parameters"], state["buffers"], value = compiled(
                state["parameters"], state["buffers"], state["rate"]
            )
            return jax.block_until_ready((value, state["parameters"]))[0]

        reset()
        return Training(
            call,
            lambda value: state.update(rate=jnp.float32(value)),
            lambda: {name: through.tensor(value) for name, value in state["parameters"].items()},
            reset,
        )


# ---- 8 bits ----------------------------------------------------------------------------------------------------------


def has_convolutions(model: nn.Module) -> bool:
    """Whether they are what most of it is; a transformer begins with one, too."""
    return any(isinstance(module, nn.BatchNorm2d) for module in model.modules())


def _int8(how: str) -> Callable[[nn.Module, Network], nn.Module]:
    """light.quantize_, and freeze."""

    def change(model: nn.Module, network: Network) -> nn.Module:
        light.quantize_(model, how, calibrate=network.calibration() if how == "int8_static" else None)
        return fastops.freeze(model)

    return change


def _quantize_dynamic(model: nn.Module, network: Network) -> nn.Module:
    """PyTorch's own, whose kernels are FBGEMM's."""
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)


def _torchao(compiled: bool) -> Callable[[nn.Module, Network], nn.Module]:
    def change(model: nn.Module, network: Network) -> nn.Module:
        library = installed("torchao.quantization")
        library.quantize_(model, library.Int8DynamicActivationInt8WeightConfig())
        return _compiled(model) if compiled else model

    return change


class Int8Torch(Provider):
    """PyTorch, with layers that `change` has made 8-bit. only_linear: it rounds linear layers alone."""

    dtypes = (INT8,)

    def __init__(
        self, label: str, change: Callable[[nn.Module, Network], nn.Module], peer: bool = True, only_linear: bool = True
    ) -> None:
        self.label, self.change, self.peer, self.only_linear = label, change, peer, only_linear

    def inference(self, setup: Setup) -> Inference:
        if self.only_linear and has_convolutions(setup.model()):
            raise Absent("linear only")
        return Torch(self.label, lambda model: self.change(model, setup.chosen)).inference(setup)


class OnnxRuntimeStatic(OnnxRuntime):
    """Every product with one scale of its input, and a scale for each channel of its weights (QDQ), by min and max."""

    label = "ONNX Runtime, static"
    dtypes = (INT8,)

    def file(self, setup: Setup) -> Path:
        library, tools = installed("onnxruntime"), installed("onnxruntime.quantization")
        installed("onnx")

        class Batches(tools.CalibrationDataReader):
            def __init__(self) -> None:
                self.left = iter(setup.chosen.calibration())

            def get_next(self) -> dict | None:
                # A file has one batch size.
                x = next(self.left, None)
                return None if x is None else {"x": x.repeat(2, *[1] * (x.ndim - 1))[: setup.batch].numpy()}

        prepared, result = setup.folder / "prepared.onnx", setup.folder / "static.onnx"
        # What quant_pre_process does, which does not take a file whose weights lie beside it: batch norms are folded.
        options = library.SessionOptions()
        options.graph_optimization_level = library.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath, options.log_severity_level = str(prepared), 3
        library.InferenceSession(onnx_file(setup), options, providers=["CPUExecutionProvider"])
        tools.quantize_static(
            prepared,
            result,
            Batches(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )
        return result


class OnnxRuntimeDynamic(OnnxRuntime):
    """Linear layers and products alone; the scale of an input is found at each call."""

    label = "ONNX Runtime, dynamic"
    dtypes = (INT8,)

    def file(self, setup: Setup) -> Path:
        tools, onnx = installed("onnxruntime.quantization"), installed("onnx")
        if has_convolutions(setup.model()):
            raise Absent("linear only")
        result = setup.folder / "dynamic.onnx"
        tools.quantize_dynamic(
            onnx.load(onnx_file(setup)),
            result,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=tools.QuantType.QInt8,
        )
        return result


class OpenVINOInt8(OpenVINO):
    """nncf.quantize, as its documentation says for a CPU; what is not rounded stays float32."""

    label = "OpenVINO, NNCF"
    dtypes = (INT8,)

    def network(self, setup: Setup, library: Any) -> Any:
        nncf = installed("nncf")
        transformer = any(isinstance(module, nn.LayerNorm) for module in setup.model().modules())
        data = [x.repeat(2, *[1] * (x.ndim - 1))[: setup.batch].numpy() for x in setup.chosen.calibration()]
        return nncf.quantize(
            library.Core().read_model(onnx_file(setup)),
            nncf.Dataset(data),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )


PROVIDERS: dict[str, Provider] = {
    "eager": Torch("PyTorch", memory=True, dtypes=(*FLOATS, INT8)),
    "channels_last": Torch("channels_last", channels_last=True, memory=True),
    "compile": Torch("torch.compile", _compiled),
    "jax": Jax(),
    "onnxruntime": OnnxRuntime(),
    "openvino": OpenVINO(),
    "replace": Torch("replace_", _replaced, peer=False, memory=True),
    "fuse": Torch("fuse", lambda model: _fastops("fuse")(model), peer=False, memory=True, own_step=True),
    "freeze": Torch(
        "freeze",
        lambda model: _fastops("freeze")(model),
        peer=False,
        trains=False,
        dtypes=(*FLOATS, INT8),
    ),
    "backend": Torch("backend", _backend, peer=False),
    "enable": Torch("enable", _enabled, peer=False, memory=True),
    "onnxruntime_static": OnnxRuntimeStatic(),
    "onnxruntime_dynamic": OnnxRuntimeDynamic(),
    "openvino_int8": OpenVINOInt8(),
    "torchao": Int8Torch("torchao", _torchao(False)),
    "torchao_compiled": Int8Torch("torchao, compiled", _torchao(True)),
    "quantize_dynamic": Int8Torch("quantize_dynamic", _quantize_dynamic),
    "int8_static": Int8Torch("int8_static", _int8("int8_static"), peer=False, only_linear=False),
    "int8_dynamic": Int8Torch("int8_dynamic", _int8("int8_dynamic"), peer=False),
}


def provider(name: str) -> Provider:
    """One of PROVIDERS; or, of a name like "package.module:Class", an object of that class.

    Raises:
        KeyError: there is no such provider.
    """
    if ":" not in name:
        return PROVIDERS[name]
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)()
