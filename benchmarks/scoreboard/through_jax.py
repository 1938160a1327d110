"""A PyTorch model as a function of jax.numpy: the graph that torch.fx traces, node by node.

The function is what somebody would write by hand: each layer is the jax.numpy, jax.nn or jax.lax call for it, and all
of it is compiled as one. Only what the networks of networks.py are made of is known.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch
import torch.nn.functional as F
from jax import lax
from torch import fx, nn

Arrays = dict[str, jax.Array]


def array(tensor: torch.Tensor) -> jax.Array:
    """A copy, of the same dtype."""
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.detach().float().numpy()).astype(jnp.bfloat16)
    return jnp.array(tensor.detach().numpy())


def tensor(array: jax.Array) -> torch.Tensor:
    """A copy, of the same dtype."""
    dtype = torch.bfloat16 if array.dtype == jnp.bfloat16 else None
    return torch.tensor(jax.device_get(array.astype(jnp.float32) if dtype else array)).to(dtype)


def translate(model: nn.Module) -> Callable[[Arrays, Arrays, jax.Array], tuple[jax.Array, Arrays]]:
    """function(parameters, buffers, x) -> the model's output, and its buffers afterwards.

    Parameters and buffers go by the model's names. As the model is, in training or evaluation, so is the function.

    Raises:
        NotImplementedError: when it is called, for an op that it does not know.
    """
    traced = fx.symbolic_trace(model)
    modules = dict(traced.named_modules())

    def function(parameters: Arrays, buffers: Arrays, x: jax.Array) -> tuple[jax.Array, Arrays]:
        values: dict[fx.Node, Any] = {}
        changed = dict(buffers)
        for node in traced.graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "placeholder":
                values[node] = x
            elif node.op == "get_attr":
                values[node] = parameters[node.target] if node.target in parameters else buffers[node.target]
            elif node.op == "call_module":
                layer = modules[node.target]
                own = {name: parameters[f"{node.target}.{name}"] for name, _ in layer.named_parameters()}
                if isinstance(layer, nn.BatchNorm2d):
                    values[node] = _batch_norm(layer, own, changed, node.target, *args)
                else:
                    values[node] = _known(_LAYERS, type(layer))(layer, own, *args)
            elif node.op == "output":
                return args[0], changed
            else:
                values[node] = _known(_FUNCTIONS, node.target)(*args, **kwargs)
        raise AssertionError("a graph of torch.fx ends in its output")

    return function


def _known(table: dict, key: object) -> Callable:
    if key not in table:
        raise NotImplementedError(f"benchmarks/scoreboard/through_jax.py does not know {key}")
    return table[key]


# ---- layers: (layer, parameters, x) ----------------------------------------------------------------------------------


def _linear(layer: nn.Linear, own: Arrays, x: jax.Array) -> jax.Array:
    return x @ own["weight"].T + own["bias"]


def _conv2d(layer: nn.Conv2d, own: Arrays, x: jax.Array) -> jax.Array:
    y = lax.conv_general_dilated(
        x,
        own["weight"],
        layer.stride,
        [(pad, pad) for pad in layer.padding],
        rhs_dilation=layer.dilation,
        dimension_numbers=("NCHW", "OIHW", "NCHW"),
        feature_group_count=layer.groups,
    )
    return y if layer.bias is None else y + own["bias"][:, None, None]


def _batch_norm(layer: nn.BatchNorm2d, own: Arrays, buffers: Arrays, name: str, x: jax.Array) -> jax.Array:
    mean, var = buffers[f"{name}.running_mean"], buffers[f"{name}.running_var"]
    if layer.training:
        count, wide = x.size // x.shape[1], x.astype(jnp.float32)
        kept = {"running_mean": mean, "running_var": var}
        mean = wide.mean((0, 2, 3))
        var = jnp.square(wide - mean[:, None, None]).mean((0, 2, 3))
        for key, value in (("running_mean", mean), ("running_var", var * count / (count - 1))):
            blended = (1 - layer.momentum) * kept[key] + layer.momentum * value
            buffers[f"{name}.{key}"] = lax.stop_gradient(blended.astype(kept[key].dtype))
    scale = own["weight"] * lax.rsqrt(var.astype(jnp.float32) + layer.eps)
    shift = own["bias"] - mean * scale
    return (x * scale[:, None, None] + shift[:, None, None]).astype(x.dtype)


def _max_pool2d(layer: nn.MaxPool2d, own: Arrays, x: jax.Array) -> jax.Array:
    kernel, stride, pad = (
        (v, v) if isinstance(v, int) else v for v in (layer.kernel_size, layer.stride, layer.padding)
    )
    padding = [(0, 0), (0, 0), *[(p, p) for p in pad]]
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, *kernel), (1, 1, *stride), padding)


def _global_average(layer: nn.AdaptiveAvgPool2d, own: Arrays, x: jax.Array) -> jax.Array:
    if layer.output_size not in (1, (1, 1)):
        raise NotImplementedError(f"AdaptiveAvgPool2d({layer.output_size}): only to one pixel")
    return x.mean((2, 3), keepdims=True)


def _flatten(x: jax.Array, start: int = 0, end: int = -1) -> jax.Array:
    end %= x.ndim
    return x.reshape(*x.shape[:start], -1, *x.shape[end + 1 :])


def _layer_norm(x: jax.Array, shape: tuple[int, ...], weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    axes = tuple(range(-len(shape), 0))
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axes, keepdims=True)
    normal = centred * lax.rsqrt(jnp.square(centred).mean(axes, keepdims=True) + eps)
    return (normal * weight + bias).astype(x.dtype)


_LAYERS: dict[type, Callable] = {
    nn.Linear: _linear,
    nn.Conv2d: _conv2d,
    nn.MaxPool2d: _max_pool2d,
    nn.AdaptiveAvgPool2d: _global_average,
    nn.ReLU: lambda layer, own, x: jax.nn.relu(x),
    nn.ReLU6: lambda layer, own, x: jax.nn.relu6(x),
    nn.GELU: lambda layer, own, x: jax.nn.gelu(x, approximate=layer.approximate == "tanh"),
    nn.Identity: lambda layer, own, x: x,
    nn.Flatten: lambda layer, own, x: _flatten(x, layer.start_dim, layer.end_dim),
    nn.LayerNorm: lambda layer, own, x: _layer_norm(x, layer.normalized_shape, own["weight"], own["bias"], layer.eps),
}


# ---- functions and methods -------------------------------------------------------------------------------------------


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, is_causal: bool = False) -> jax.Array:
    scores = jnp.einsum("bhqd,bhkd->bhqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5
    if is_causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(scores).astype(v.dtype), v)


def _expand(x: jax.Array, *sizes: int) -> jax.Array:
    kept = zip(sizes[len(sizes) - x.ndim :], x.shape, strict=True)
    return jnp.broadcast_to(x, (*sizes[: len(sizes) - x.ndim], *[old if new == -1 else new for new, old in kept]))


_FUNCTIONS: dict[object, Callable] = {
    operator.add: operator.add,
    operator.mul: operator.mul,
    operator.getitem: operator.getitem,
    getattr: getattr,
    torch.cat: jnp.concatenate,
    F.layer_norm: _layer_norm,
    F.scaled_dot_product_attention: _attention,
    "expand": _expand,
    "flatten": _flatten,
    "permute": lambda x, *order: x.transpose(order),
    "transpose": lambda x, one, other: x.swapaxes(one, other),
    "unflatten": lambda x, axis, sizes: x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]),
}
