"""What a frozen model computes, recorded from one call of it: frozen layers whole, all else by ATen's and our ops."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fastops._frozen_int8 import FrozenAvgPoolInt8, FrozenInt8, FrozenMaxPoolInt8
from fastops._frozen_layers import FrozenInvertedResidual, FrozenLayer, FrozenMlp
from fastops.functional._activation import resolve_activation
from fastops.light._graph import ELEMENTS, Constant, Graph, Input, Node, Value

MOST_MLP_LAYERS = 16  # kMostMlpLayers in csrc/kernels/mlp/mlp.h


class CannotSave(Exception):
    """A layer or function that the run time has not."""


class Recording(TorchDispatchMode):
    """Keeps every value that depends on the inputs, by the tensor that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.inputs: list[Input] = []
        self._values: dict[int, Value] = {}
        self._constants: dict[int, Constant] = {}
        self._lost: set[int] = set()
        self._alive: list[Tensor] = []  # so that no other tensor gets the place of one that is known
        self._modules: list[str] = []

    # ---- values

    def add_input(self, name: str, tensor: Tensor) -> None:
        """An input of the model. Of bfloat16, which NumPy does not have, it is given as float32."""
        given = torch.float32 if tensor.dtype == torch.bfloat16 else tensor.dtype
        if tensor.dtype not in ELEMENTS or tensor.dtype == torch.float64:
            raise CannotSave(
                f"input {name} is of {name_of(tensor.dtype)}, and not float32, bfloat16, float16 or integers"
            )
        value: Value = Input(name, given, tensor.shape)
        self.inputs.append(value)
        if given != tensor.dtype:
            value = self.emit("cast", [value], ints=[ELEMENTS[tensor.dtype]])
        self.bind(tensor, value)

    def bind(self, tensor: Tensor, value: Value) -> None:
        self._alive.append(tensor)
        self._values[id(tensor)] = value

    def depends(self, arguments: Any) -> bool:
        """Whether any tensor among these follows from the inputs."""
        if isinstance(arguments, Tensor):
            if id(arguments) in self._lost:
                raise CannotSave("it reads a tensor that was written to through another view of it")
            return id(arguments) in self._values
        if isinstance(arguments, (tuple, list)):
            return any(map(self.depends, arguments))
        return isinstance(arguments, dict) and any(map(self.depends, arguments.values()))

    def value(self, tensor: Tensor | None) -> Value | None:
        if tensor is None:
            return None
        known = self._values.get(id(tensor))
        return self.constant(tensor) if known is None else known

    def constant(self, tensor: Tensor) -> Constant:
        if tensor.dtype not in ELEMENTS or tensor.dtype == torch.float64:
            raise CannotSave(f"it has a tensor of {name_of(tensor.dtype)}")
        if id(tensor) not in self._constants:
            self._alive.append(tensor)
            self._constants[id(tensor)] = Constant(tensor.detach())
        return self._constants[id(tensor)]

    def _forget_shared(self, tensor: Tensor) -> None:
        """What shares memory with a tensor that was written to is no value that is known."""
        memory = tensor.untyped_storage().data_ptr()
        for other in self._alive:
            if other.untyped_storage().data_ptr() == memory and self._values.pop(id(other), None) is not None:
                self._lost.add(id(other))
        self._lost.discard(id(tensor))

    def reordered(self, tensor: Tensor) -> Constant:
        """The weights of a convolution, of which each filter lies as [*kernel, channels]."""
        constant = self.weight(tensor)
        constant.channels_last = True
        return constant

    def weight(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> Constant | None:
        """A parameter, perhaps of another dtype."""
        if tensor is None:
            return None
        if self.depends(tensor):
            raise CannotSave("its weights depend on the model's inputs")
        if dtype is not None and tensor.dtype != dtype:
            with _disable_current_modes():
                converted = tensor.to(dtype)
            self._alive.append(tensor)
            self._constants[id(tensor)] = self._constants.get(id(tensor)) or Constant(converted)
            return self._constants[id(tensor)]
        return self.constant(tensor)

    def made(self, tensor: Tensor) -> Constant:
        """A constant that was computed for the file."""
        self._alive.append(tensor)
        return self.constant(tensor)

    def emit(self, op: str, inputs: list[Value | None], **attributes: Any) -> Node:
        node = Node(op, self._modules[-1] if self._modules else "", inputs, **attributes)
        self.nodes.append(node)
        return node

    # ---- what is called

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from fastops.light._recorded_ops import OPS, SAME

        kwargs = kwargs or {}
        written = func._schema.is_mutable and isinstance(args[0], Tensor) and self.depends((args, kwargs))
        if written and id(args[0]) not in self._values:
            raise CannotSave(f"it writes to a tensor of the model's own ({func})")
        result = func(*args, **kwargs)
        if not self.depends((args, kwargs)):
            # An attention without dropout has the tag too.
            if torch.Tag.nondeterministic_seeded in func.tags and "attention" not in func._opname:
                raise CannotSave(f"it draws random numbers ({func})")
            return result
        name = f"{func.namespace}.{func._opname}"
        if name in SAME:
            self.bind(result, self.value(args[0]))
            return result
        handler = OPS.get(name)
        try:
            if handler is None:
                raise CannotSave(f"the run time has no {name}")
            value = handler(self, result, *args, **kwargs)
        except CannotSave as error:
            where = next((one for one in reversed(self._modules) if one), "")
            raise CannotSave(f"{where + ': ' if where else ''}{error} ({func})") from None
        if written:
            self._forget_shared(args[0])
        for one, its_value in value if isinstance(value, list) else [(_first(result), value)]:
            self.bind(one, its_value)
        return result

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Knows which module is called, and records frozen layers as one node each."""
        hooks, layers = [], []
        for name, module in model.named_modules():
            if type(module) in _RECORDERS:
                module.forward = functools.partial(self._layer, module, name)
                layers.append(module)
            hooks.append(module.register_forward_pre_hook(functools.partial(self._enter, name)))
            hooks.append(module.register_forward_hook(self._leave, always_call=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for module in layers:
                del module.forward

    def _enter(self, name: str, module: nn.Module, args: Any) -> None:
        self._modules.append(name)

    def _leave(self, module: nn.Module, args: Any, result: Any) -> None:
        self._modules.pop()

    def _layer(self, layer: Any, name: str, input: Tensor, residual: Any = None) -> Tensor:
        forward: Callable[..., Tensor] = functools.partial(type(layer).forward, layer)
        record = _RECORDERS[type(layer)]
        arguments = (input,) if residual is None else (input, residual)
        fits = self.depends(input) and (residual is None or isinstance(residual, Tensor))
        node = record(self, layer, input, residual) if fits else None
        if node is None:  # op by op
            return forward(*arguments)
        node.name = name
        with _disable_current_modes():
            result = forward(*arguments)
        self.bind(result, node)
        return result


def _first(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# ---- frozen layers


def activation_of(f: Any) -> dict[str, Any]:
    """texts and floats of a node, for activation=."""
    kind, a, b = resolve_activation(f)
    return {"texts": [kind], "floats": [float(a), float(b)]}


def _record_layer(recording: Recording, layer: FrozenLayer, input: Tensor, residual: Any) -> Node | None:
    if layer.apart is not None and layer.apart.takes(input):
        return None
    inputs = [recording.value(input), None, recording.weight(layer.bias), recording.value(residual)]
    if layer.function == "linear":
        inputs[1] = recording.weight(layer.weight)
        return recording.emit("linear", inputs, **activation_of(layer.activation))
    if input.dim() != layer.weight.dim():
        return None
    o = layer.options
    node = convolution(recording, inputs, layer.weight, o["stride"], o["padding"], o["dilation"], o["groups"])
    vars(node).update(activation_of(layer.activation))
    if "pool_size" in o:
        node.op = "conv_max_pool"
        node.ints += each(o["pool_size"], input.dim() - 2)
        del node.inputs[3]
    return node


def each(size: Any, dims: int) -> list[int]:
    """A size for each dimension."""
    return [size] * dims if isinstance(size, int) else [*size] * (dims if len(size) == 1 else 1)


def convolution(
    recording: Recording,
    inputs: list[Value | None],
    weight: Tensor,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> Node:
    """Images of two dimensions go through the run time as channels_last, and so the weights lie in the file."""
    dims = weight.dim() - 2
    dilation = each(dilation, dims)
    if padding == "same":
        both = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
        before, after = [one // 2 for one in both], [one - one // 2 for one in both]
    else:
        both = [0] * dims if padding == "valid" else each(padding, dims)
        before, after = both[:dims], both[-dims:]
    last = dims == 2
    inputs[1] = recording.reordered(weight) if last else recording.weight(weight)
    ints = [dims, groups, int(last), *each(stride, dims), *before, *after, *dilation]
    return recording.emit("conv", inputs, ints=ints, texts=["identity"], floats=[0.0, 0.0])


def _record_int8(recording: Recording, layer: FrozenInt8, input: Tensor, residual: Any) -> Node | None:
    if residual is not None and residual.dtype != torch.uint8:
        return None
    numbers, of_levels = layer.numbers(), layer.result is not None
    dtype = torch.uint8 if of_levels else layer.dtype if input.dtype == torch.uint8 else input.dtype
    y_factor, y_offset, y_low, y_high = numbers.output or (1.0, 0.0, 0, 255)
    vectors = [recording.made(one.float()) for one in (numbers.multiplier, numbers.offset)]
    inputs = [recording.value(input), None, *vectors, recording.value(residual)]
    if layer.geometry is None:
        inputs[1] = recording.weight(layer.weight)
        node = recording.emit("linear_int8_static", inputs)
    elif input.dim() != 4:
        return None
    else:
        stride, padding, dilation, groups = layer.geometry
        node = convolution(recording, inputs, layer.weight, stride, padding, dilation, groups)
        node.op = "conv_int8"
    int8_options(node, numbers.activation, *layer.given, dtype)
    node.ints[-2:] = [y_low, y_high]
    node.floats[-3:] = [y_factor, y_offset, numbers.residual_scale]
    return node


def int8_options(node: Node, activation: tuple[str, float, float], scale: float, zero: int, dtype: torch.dtype) -> None:
    """Of a layer: the levels of its input, and that it gives a float tensor, unless more is said."""
    kind, a, b = activation
    node.texts = [kind]
    node.floats = [float(a), float(b), scale, 1.0, 0.0, 1.0]
    node.ints = [*node.ints, ELEMENTS[dtype], zero, 0, 255]


def _record_max_pool_int8(recording: Recording, pool: FrozenMaxPoolInt8, input: Tensor, residual: Any) -> Node | None:
    if input.dim() != 4:
        return None
    *pairs, ceil = pool.windows
    return recording.emit(
        "max_pool", [recording.value(input)], ints=[2, *(one for pair in pairs for one in pair), ceil]
    )


def _record_avg_pool_int8(recording: Recording, pool: FrozenAvgPoolInt8, input: Tensor, residual: Any) -> Node | None:
    if input.dim() != 4:
        return None
    w = pool.windows
    adaptive = "output_size" in w
    if adaptive:
        ints = [2, *(-1 if one is None else one for one in each(w["output_size"], 2))]
    else:
        pairs = [each(one, 2) for one in (w["kernel_size"], w["stride"] or w["kernel_size"], w["padding"])]
        options = w["ceil_mode"], w["count_include_pad"], w["divisor_override"] or 0
        ints = [2, *(one for pair in pairs for one in pair), *map(int, options)]
    dtype = pool.dtype if pool.result is None else torch.uint8
    ints += [ELEMENTS[dtype], pool.given.zero]
    floats = [pool.given.scale / pool.step, float(pool.zero)]
    op = "adaptive_avg_pool_int8" if adaptive else "avg_pool_int8"
    return recording.emit(op, [recording.value(input)], ints=ints, floats=floats)


def _record_mlp(recording: Recording, mlp: FrozenMlp, input: Tensor, residual: Any) -> Node | None:
    if mlp.layers and input.dim() != 2:
        return None
    weights, biases = mlp._tensors()
    value = recording.value(input)
    if len(weights) <= MOST_MLP_LAYERS:
        inputs = [value]
        for weight, bias in zip(weights, biases, strict=True):
            inputs += [recording.weight(weight), recording.weight(bias)]
        hidden, output = activation_of(mlp.hidden), activation_of(mlp.output)
        attributes = {key: hidden[key] + output[key] for key in hidden}
        return recording.emit("mlp", inputs, **attributes)
    for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        f = mlp.output if i == len(weights) - 1 else mlp.hidden
        value = recording.emit("linear", [value, recording.weight(weight), recording.weight(bias)], **activation_of(f))
    return value


def _record_block(recording: Recording, block: FrozenInvertedResidual, input: Tensor, residual: Any) -> Node | None:
    layers = (block.expand, block.depthwise, block.project)
    if any(layer is not None and layer.apart is not None and layer.apart.takes(input) for layer in layers):
        return None
    if input.dim() != 4:
        return None
    inputs, texts, floats = [recording.value(input)], [], []
    for layer in layers:
        weight, bias = (None, None) if layer is None else (layer.weight, layer.bias)
        inputs += [recording.weight(weight), recording.weight(bias)]
        f = activation_of(layer and layer.activation)
        texts, floats = texts + f["texts"], floats + f["floats"]
    o = block.depthwise.options
    ints = [one for key in ("stride", "padding", "dilation") for one in each(o[key], 2)]
    inputs.append(recording.value(residual))
    return recording.emit("inverted_residual", inputs, ints=ints, texts=texts, floats=floats)


_RECORDERS: dict[type, Callable[..., Node | None]] = {
    FrozenLayer: _record_layer,
    FrozenMlp: _record_mlp,
    FrozenInvertedResidual: _record_block,
    FrozenInt8: _record_int8,
    FrozenMaxPoolInt8: _record_max_pool_int8,
    FrozenAvgPoolInt8: _record_avg_pool_int8,
}


def recorded(model: nn.Module, inputs: dict[str, Tensor]) -> Graph:
    """The graph of a call of a frozen model."""
    recording = Recording()
    for name, tensor in inputs.items():
        recording.add_input(name, tensor)
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one op of PyTorch's for all of a block
    try:
        with torch.no_grad(), recording.watching(model), recording:
            result = model(*inputs.values())
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    paths, _ = torch.utils._pytree.tree_flatten_with_path(result)
    outputs = []
    for path, one in paths:
        if not isinstance(one, Tensor) or not recording.depends(one):
            raise CannotSave(f"its output{torch.utils._pytree.keystr(path)} is no tensor that follows from its inputs")
        value = recording.value(one)
        if one.dtype == torch.bfloat16:
            value = recording.emit("cast", [value], ints=[ELEMENTS[torch.float32]])
        key = torch.utils._pytree.keystr(path)
        outputs.append((key.strip("[]'.") or "output", value))
    return Graph(recording.inputs, recording.nodes, outputs)
