"""Which node of the run time each op of ATen's and of ours becomes.

A handler gets the recording, the op's result and its arguments, and returns the node that gives the result, or a list
of (tensor, node) for an op with several results.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastops.light._graph import ELEMENTS, Node, Value
from fastops.light._recording import CannotSave, Recording, convolution, each, int8_options, name_of

# What gives its first argument, as far as values go.
SAME = {"aten.alias", "aten.clone", "aten.detach", "aten.lift_fresh"}

OPS: dict[str, Callable[..., Any]] = {}


def _op(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def keep(handler: Callable[..., Any]) -> Callable[..., Any]:
        OPS.update(dict.fromkeys(names, handler))
        return handler

    return keep


def _dim(dim: int, tensor: Tensor) -> int:
    return dim % tensor.dim()


# ---- layers


@_op("fastops.linear_forward")
def _linear(
    r: Recording, y: Any, input: Tensor, weight: Tensor, bias: Any, f: str, a: float, b: float, _: bool
) -> Node:
    inputs = [r.value(input), r.weight(weight), r.weight(bias)]
    return r.emit("linear", inputs, texts=[f], floats=[a, b])


@_op("aten.addmm", "aten.mm")
def _addmm(r: Recording, y: Tensor, *args: Tensor, beta: float = 1, alpha: float = 1) -> Node:
    bias, input, weight = (None, *args) if len(args) == 2 else args
    if (beta, alpha) != (1, 1):
        raise CannotSave("it scales a product of matrices")
    if r.depends(weight) or not r.depends(input) or (bias is not None and (r.depends(bias) or bias.dim() != 1)):
        node = r.emit("matmul", [r.value(input), r.value(weight)])
        return node if bias is None else r.emit("add", [node, r.value(bias)])
    inputs = [r.value(input), r.weight(weight.t().contiguous()), r.weight(bias)]
    return r.emit("linear", inputs, texts=["identity"], floats=[0.0, 0.0])


@_op("aten.bmm")
def _bmm(r: Recording, y: Tensor, a: Tensor, b: Tensor) -> Node:
    return r.emit("matmul", [r.value(a), r.value(b)])


@_op("fastops.conv_forward")
def _conv(
    r: Recording, y: Any, input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, groups: int, f: str, a: float, b: float, _: bool,
) -> Node:  # fmt: skip
    if transposed:
        raise CannotSave("it is a transposed convolution")
    if input.dim() != weight.dim():
        raise CannotSave("its image has no batch")
    node = convolution(r, [r.value(input), None, r.weight(bias)], weight, stride, padding, dilation, groups)
    node.texts, node.floats = [f], [a, b]
    return node


@_op("fastops.linear_int8_forward")
def _linear_int8(r: Recording, y: Tensor, input: Tensor, weight: Tensor, scale: Tensor, bias: Any) -> Node:
    inputs = [r.value(input), r.weight(weight), r.weight(scale), r.weight(bias)]
    return r.emit("linear_int8", inputs, texts=["identity"], floats=[0.0, 0.0])


@_op("fastops.conv_int8_forward")
def _conv_int8(
    r: Recording, y: Tensor, input: Tensor, weight: Tensor, scale: Tensor, bias: Any, input_scale: Tensor,
    input_zero: Tensor, stride: Any, padding: Any, dilation: Any, groups: int,
) -> Node:  # fmt: skip
    of_input = float(input_scale), int(input_zero)
    offset = torch.zeros(len(scale)) if bias is None else bias.float()
    inputs = [r.value(input), None, r.made(scale * of_input[0]), r.made(offset)]
    node = convolution(r, inputs, weight, stride, padding, dilation, groups)
    node.op = "conv_int8"
    int8_options(node, ("identity", 0.0, 0.0), *of_input, y.dtype)
    return node


@_op("fastops.weight_only_forward")
def _weight_only(
    r: Recording, y: Tensor, input: Tensor, weight: Tensor, scale: Tensor, offset: Any, bias: Any, group: int
) -> Node:
    inputs = [r.value(input), r.weight(weight), r.weight(scale), r.weight(offset), r.weight(bias)]
    ints = [4 if weight.dtype == torch.uint8 else 8, group, input.shape[-1]]
    return r.emit("linear_weight_only", inputs, ints=ints, texts=["identity"], floats=[0.0, 0.0])


@_op("fastops.sparse_linear_forward")
def _sparse_linear(
    r: Recording, y: Tensor, input: Tensor, crow: Tensor, col: Tensor, values: Tensor, bias: Any, n: int, dim: int
) -> Node:
    inputs = [r.value(input), r.weight(crow), r.weight(col, torch.int32), r.weight(values), r.weight(bias)]
    block = values.shape[1:] if values.dim() == 3 else (1, 1)
    ints = [n, input.shape[dim], *block, int(dim == 1)]
    return r.emit("sparse_linear", inputs, ints=ints, texts=["identity"], floats=[0.0, 0.0])


@_op("fastops.batch_norm_forward")
def _batch_norm(
    r: Recording, y: Any, input: Tensor, weight: Any, bias: Any, residual: Any, mean: Any, var: Any, training: bool,
    momentum: float, eps: float, f: str, a: float, b: float, _: bool,
) -> Node:  # fmt: skip
    if training or mean is None or var is None:
        raise CannotSave("it normalizes by the statistics of the batch")
    inputs = [r.value(input), *(r.weight(one, torch.float32) for one in (mean, var, weight, bias))]
    if residual is None:
        return r.emit("batch_norm", inputs, texts=[f], floats=[a, b, eps])
    norm = r.emit("batch_norm", inputs, texts=["identity"], floats=[0.0, 0.0, eps])
    return r.emit("activation", [r.emit("add", [norm, r.value(residual)])], texts=[f], floats=[a, b])


@_op("fastops.layer_norm_forward")
def _layer_norm(r: Recording, y: Any, input: Tensor, weight: Any, bias: Any, dims: int, eps: float, rms: bool) -> Node:
    inputs = [r.value(input), r.weight(weight, torch.float32), r.weight(bias, torch.float32)]
    size = math.prod(input.shape[-dims:])
    return r.emit("rms_norm" if rms else "layer_norm", inputs, ints=[size], floats=[eps])


@_op("fastops.attention_forward")
def _attention(
    r: Recording, y: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, causal: bool, scale: float
) -> Node:
    inputs = [r.value(one) for one in (query, key, value, mask)]
    return r.emit("attention", inputs, ints=[int(causal)], floats=[scale])


@_op("aten._scaled_dot_product_flash_attention_for_cpu")
def _torch_attention(
    r: Recording, y: Any, query: Tensor, key: Tensor, value: Tensor, dropout: float = 0, causal: bool = False, *,
    attn_mask: Any = None, scale: Any = None,
) -> Node:  # fmt: skip
    return _attention(r, y, query, key, value, attn_mask, causal, query.shape[-1] ** -0.5 if scale is None else scale)


@_op("fastops.softmax_forward")
def _softmax(r: Recording, y: Tensor, input: Tensor, dim: int, log: bool) -> Node:
    return r.emit("log_softmax" if log else "softmax", [r.value(input)], ints=[_dim(dim, input)])


for _name, _log in (("aten._softmax", False), ("aten._log_softmax", True)):
    OPS[_name] = lambda r, y, input, dim, half, log=_log: _softmax(r, y, input, dim, log)


# What a function that freeze does not follow calls.


@_op("aten.native_layer_norm")
def _torch_layer_norm(r: Recording, y: Any, input: Tensor, shape: Any, weight: Any, bias: Any, eps: float) -> Node:
    return _layer_norm(r, y, input, weight, bias, len(shape), eps, False)


@_op("aten._native_batch_norm_legit_no_training", "aten.native_batch_norm")
def _torch_batch_norm(
    r: Recording, y: Any, input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, *more: Any
) -> Node:
    training = len(more) == 3 and more[0]
    return _batch_norm(r, y, input, weight, bias, None, mean, var, training, 0.0, more[-1], "identity", 0.0, 0.0, False)


@_op("aten.convolution")
def _torch_conv(
    r: Recording, y: Tensor, input: Tensor, weight: Tensor, bias: Any, stride: Any, padding: Any, dilation: Any,
    transposed: bool, output_padding: Any, groups: int,
) -> Node:  # fmt: skip
    return _conv(r, y, input, weight, bias, stride, padding, dilation, transposed, groups, "identity", 0.0, 0.0, False)


@_op("aten.embedding")
def _embedding(r: Recording, y: Tensor, weight: Tensor, indices: Tensor, *options: Any) -> Node:
    return r.emit("embedding", [r.value(indices), r.weight(weight)])


# ---- pools and means


@_op("fastops.max_pool_forward")
def _max_pool(
    r: Recording, y: Any, input: Tensor, size: Any, kernel: Any, stride: Any, padding: Any, dilation: Any, ceil: bool,
    indices: str,
) -> Node:  # fmt: skip
    options = [*kernel, *stride, *padding, *dilation, int(ceil)]
    return _pool(r, "max_pool", input, kernel, size, options)


@_op("fastops.avg_pool_forward")
def _avg_pool(
    r: Recording, y: Tensor, input: Tensor, size: Any, kernel: Any, stride: Any, padding: Any, ceil: bool,
    include_pad: bool, divisor: int,
) -> Node:  # fmt: skip
    options = [*kernel, *stride, *padding, int(ceil), int(include_pad), divisor]
    return _pool(r, "avg_pool", input, kernel, size, options)


@_op("aten.max_pool2d_with_indices", "aten.max_pool3d_with_indices")
def _torch_max_pool(
    r: Recording, y: Any, input: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, dilation: Any = 1,
    ceil: bool = False,
) -> Node:  # fmt: skip
    dims = y[0].dim() - 2
    options = [each(one, dims) for one in (kernel, stride or kernel, padding, dilation)]
    return _max_pool(r, y, input, None, *options, ceil, "none")


@_op("aten.avg_pool2d", "aten.avg_pool3d")
def _torch_avg_pool(
    r: Recording, y: Tensor, input: Tensor, kernel: Any, stride: Any = (), padding: Any = 0, ceil: bool = False,
    include_pad: bool = True, divisor: Any = None,
) -> Node:  # fmt: skip
    options = [each(one, y.dim() - 2) for one in (kernel, stride or kernel, padding)]
    return _avg_pool(r, y, input, None, *options, ceil, include_pad, divisor or 0)


@_op("aten._adaptive_avg_pool2d", "aten._adaptive_avg_pool3d")
def _torch_adaptive_avg_pool(r: Recording, y: Tensor, input: Tensor, size: Any) -> Node:
    return _pool(r, "avg_pool", input, [0] * (y.dim() - 2), y.shape[2:], [])


def _pool(r: Recording, op: str, input: Tensor, kernel: Any, size: Any, options: list[int]) -> Node:
    dims = len(kernel)
    if input.dim() != dims + 2:
        raise CannotSave("its image has no batch")
    adaptive = not any(kernel)
    ints = [dims, *size] if adaptive else [dims, *options]
    return r.emit(f"adaptive_{op}" if adaptive else op, [r.value(input)], ints=ints)


@_op("aten.mean")
def _mean(r: Recording, y: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    if dtype not in (None, input.dtype):
        raise CannotSave(f"it averages in {name_of(dtype)}")
    dims = range(input.dim()) if dim is None or dim == [] else sorted(_dim(one, input) for one in each(dim, 1))
    if list(dims) == list(range(2, input.dim())) and input.dim() in (3, 4, 5):
        node = r.emit("adaptive_avg_pool", [r.value(input)], ints=[input.dim() - 2] + [1] * (input.dim() - 2))
        return node if keepdim else _shaped(r, node, y)
    node = r.value(input)
    for one in reversed(dims):
        node = r.emit("mean", [node], ints=[one, int(keepdim)])
    return node


# ---- activations and arithmetic


@_op("fastops.activation_forward")
def _activation(r: Recording, y: Any, input: Tensor, f: str, a: float, b: float, _: bool) -> Node:
    return r.emit("activation", [r.value(input)], texts=[f], floats=[a, b])


@_op("fastops.prelu_forward")
def _prelu(r: Recording, y: Tensor, input: Tensor, weight: Tensor) -> Node:
    return r.emit("prelu", [r.value(input), r.weight(weight)])


@_op("fastops.glu_forward")
def _glu(r: Recording, y: Tensor, input: Tensor, dim: int) -> Node:
    dim = _dim(dim, input)
    half = input.shape[dim] // 2
    value, gate = (r.emit("slice", [r.value(input)], ints=[dim, first, half, 1]) for first in (0, half))
    return r.emit("mul", [value, r.emit("activation", [gate], texts=["sigmoid"], floats=[0.0, 0.0])])


# ATen's activations, with what becomes of their arguments.
def _plain(kind: str, *defaults: float) -> Callable[..., Node]:
    def handler(r: Recording, y: Tensor, input: Tensor, *options: Any, **named: Any) -> Node:
        a, b = ([float(one) for one in options] + [float(one) for one in defaults[len(options) :]] + [0.0, 0.0])[:2]
        return r.emit("activation", [r.value(input)], texts=[kind], floats=[a, b])

    return handler


_ACTIVATIONS = {
    "relu": _plain("relu"), "sigmoid": _plain("sigmoid"), "tanh": _plain("tanh"), "silu": _plain("silu"),
    "hardswish": _plain("hardswish"), "hardsigmoid": _plain("hardsigmoid"), "mish": _plain("mish"),
    "leaky_relu": _plain("leaky_relu", 0.01), "hardtanh": _plain("hardtanh", -1, 1),
    "softplus": _plain("softplus", 1, 20), "relu6": _plain("relu6"),
}  # fmt: skip
for _name, _handler in _ACTIVATIONS.items():
    OPS[f"aten.{_name}"] = OPS[f"aten.{_name}_"] = _handler


@_op("aten.gelu", "aten.gelu_")
def _gelu(r: Recording, y: Tensor, input: Tensor, *, approximate: str = "none") -> Node:
    return _plain("gelu_tanh" if approximate == "tanh" else "gelu")(r, y, input)


@_op("aten.clamp", "aten.clamp_")
def _clamp(r: Recording, y: Tensor, input: Tensor, low: Any = None, high: Any = None) -> Node:
    bounds = [-math.inf if low is None else low, math.inf if high is None else high]
    if any(isinstance(one, Tensor) for one in bounds):
        raise CannotSave("its limits are tensors")
    return r.emit("activation", [r.value(input)], texts=["hardtanh"], floats=[float(one) for one in bounds])


def _operand(r: Recording, one: Any, y: Tensor) -> Value:
    if isinstance(one, Tensor):
        if one.dtype != y.dtype:
            if r.depends(one):
                raise CannotSave(f"it computes with {name_of(one.dtype)} and {name_of(y.dtype)}")
            return r.weight(one, y.dtype)
        return r.value(one)
    return r.constant(torch.tensor(one, dtype=y.dtype))


def _arithmetic(op: str) -> Callable[..., Node]:
    def handler(r: Recording, y: Tensor, a: Any, b: Any, *, alpha: float = 1) -> Node:
        if not y.dtype.is_floating_point:
            raise CannotSave(f"it computes with {name_of(y.dtype)}")
        left, right = _operand(r, a, y), _operand(r, b, y)
        if alpha != 1:
            right = r.emit("mul", [right, _operand(r, alpha, y)])
        return r.emit(op, [left, right])

    return handler


for _name in ("add", "sub", "mul", "div"):
    OPS[f"aten.{_name}"] = OPS[f"aten.{_name}_"] = _arithmetic(_name)


@_op("aten.rsub")
def _rsub(r: Recording, y: Tensor, a: Tensor, b: Any, alpha: float = 1) -> Node:
    return _arithmetic("sub")(r, y, b, a, alpha=alpha)


@_op("aten.neg")
def _neg(r: Recording, y: Tensor, a: Tensor) -> Node:
    return _arithmetic("mul")(r, y, a, -1.0)


@_op("aten._to_copy")
def _to(r: Recording, y: Tensor, input: Tensor, **options: Any) -> Any:
    if y.dtype == input.dtype:
        return r.value(input)
    floats = (torch.float32, torch.bfloat16, torch.float16)
    if y.dtype not in floats or input.dtype not in floats:
        raise CannotSave(f"it turns {name_of(input.dtype)} into {name_of(y.dtype)}")
    return r.emit("cast", [r.value(input)], ints=[ELEMENTS[y.dtype]])


@_op("aten.copy_")
def _copy(r: Recording, y: Tensor, target: Tensor, source: Tensor, non_blocking: bool = False) -> Value:
    """What in-place activations of ours end in."""
    if source.shape != target.shape:
        raise CannotSave("it writes a tensor of another shape into one")
    return _to(r, target, source)


# ---- shapes


def _shaped(r: Recording, value: Value, y: Tensor) -> Node:
    return r.emit("reshape", [value], sizes=[(size, False) for size in y.shape])


@_op("aten.view", "aten._unsafe_view", "aten.reshape", "aten.unsqueeze", "aten.squeeze", "aten._reshape_alias")
def _reshape(r: Recording, y: Tensor, input: Tensor, *sizes: Any) -> Node:
    if y.dtype != input.dtype:
        raise CannotSave(f"it reads {name_of(input.dtype)} as {name_of(y.dtype)}")
    return _shaped(r, r.value(input), y)


@_op("aten.expand")
def _expand(r: Recording, y: Tensor, input: Tensor, *sizes: Any, **options: Any) -> Node:
    return r.emit("expand", [r.value(input)], sizes=[(size, False) for size in y.shape])


@_op("aten.permute")
def _permute(r: Recording, y: Tensor, input: Tensor, dims: list[int]) -> Node:
    return r.emit("permute", [r.value(input)], ints=[_dim(one, input) for one in dims])


@_op("aten.transpose", "aten.t")
def _transpose(r: Recording, y: Tensor, input: Tensor, first: int = 0, second: int = 1) -> Node:
    order = list(range(input.dim()))
    if order:
        first, second = _dim(first, input), _dim(min(second, input.dim() - 1), input)
        order[first], order[second] = order[second], order[first]
    return r.emit("permute", [r.value(input)], ints=order)


@_op("aten.select")
def _select(r: Recording, y: Tensor, input: Tensor, dim: int, index: int) -> Node:
    dim = _dim(dim, input)
    return r.emit("select", [r.value(input)], ints=[dim, index % input.shape[dim]])


@_op("aten.slice")
def _slice(
    r: Recording, y: Tensor, input: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    dim = _dim(dim, input)
    if y.shape == input.shape:
        return r.value(input)
    size = input.shape[dim]
    first = min(max(start + size if start < 0 else start, 0), size) if start else 0
    return r.emit("slice", [r.value(input)], ints=[dim, first, y.shape[dim], step])


@_op("aten.unbind")
def _unbind(r: Recording, y: Any, input: Tensor, dim: int = 0) -> list[tuple[Tensor, Node]]:
    dim = _dim(dim, input)
    return [(one, r.emit("select", [r.value(input)], ints=[dim, i])) for i, one in enumerate(y)]


@_op("aten.split", "aten.split_with_sizes", "aten.chunk")
def _split(r: Recording, y: Any, input: Tensor, size: Any, dim: int = 0) -> list[tuple[Tensor, Node]]:
    dim, first, parts = _dim(dim, input), 0, []
    for one in y:
        parts.append((one, r.emit("slice", [r.value(input)], ints=[dim, first, one.shape[dim], 1])))
        first += one.shape[dim]
    return parts


@_op("aten.cat")
def _cat(r: Recording, y: Tensor, tensors: list[Tensor], dim: int = 0) -> Node:
    values = [_operand(r, one, y) for one in tensors if one.shape != (0,)]
    return r.emit("cat", values, ints=[_dim(dim, y)])


@_op("aten.stack")
def _stack(r: Recording, y: Tensor, tensors: list[Tensor], dim: int = 0) -> Node:
    dim = _dim(dim, y)
    sizes = [(size, False) for size in (*y.shape[:dim], 1, *y.shape[dim + 1 :])]
    values = [r.emit("reshape", [_operand(r, one, y)], sizes=list(sizes)) for one in tensors]
    return r.emit("cat", values, ints=[dim])
