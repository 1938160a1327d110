"""The rules of _flow.py: what an operation does to the channels that it is given.

A rule gets the flow, the node and the value, and gives the labels of the value; None means that nothing is known.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.fx import Node

from fastops._activations import ACTIVATIONS
from fastops.light._channels import compact, varies, varying
from fastops.light._layers import BATCH_NORMS, CONVOLUTIONS, INSTANCE_NORMS, TRANSPOSED

if TYPE_CHECKING:
    from fastops.light._flow import Flow

# ---- element by element ----------------------------------------------------------------------------------------------


def _elementwise(flow: "Flow", node: Node, value: Any) -> Tensor | None:
    """Operands broadcast: what is added to a channel goes and stays with it."""
    operands = [one for one in node.all_input_nodes if isinstance(flow.env[one], Tensor)]
    if not isinstance(value, Tensor) or not operands or "out" in node.kwargs:
        return None
    if any(flow.env[one].dim() > value.dim() for one in operands):
        return None
    _no_numbers(flow, node)
    found = [flow.labels[one][(None,) * (value.dim() - flow.env[one].dim())] for one in operands]
    why = f"{flow.called(node)} uses one of them for several others"
    apart: set[int] = set()
    for d in range(value.dim()):
        vary = [i for i, labels in enumerate(found) if varies(labels, d)]
        if len(vary) == 1 and len(found) > 1 and operands[vary[0]].op == "get_attr":
            # A parameter for each element, such as a position's: those of one channel are one.
            flow.channels.tie(found[vary[0]], found[vary[0]].narrow(d, 0, 1))
            found[vary[0]] = found[vary[0]].narrow(d, 0, 1).expand_as(found[vary[0]])
        elif vary:
            apart |= {i for i, labels in enumerate(found) if labels.size(d) == 1}
            full = [i for i, labels in enumerate(found) if labels.size(d) > 1]
            if len(vary) < len(full):
                for i in full:
                    flow.channels.tie(found[i], found[full[0]])
                    flow.channels.keep(found[i], why)
    for i in apart:
        flow.channels.keep(found[i], why)
    together = [labels for i, labels in enumerate(found) if i not in apart]
    if not together:
        return flow.fixed(value, why)
    together.sort(key=lambda labels: -len(varying(labels)))
    for labels in together[1:]:
        flow.channels.tie(labels, together[0])
    return together[0].expand(value.shape)


def _no_numbers(flow: "Flow", node: Node) -> None:
    """A number of channels that is computed with is another one when some are removed."""
    for one in node.all_input_nodes:
        if isinstance(flow.labels[one], Tensor) and not isinstance(flow.env[one], Tensor):
            flow.channels.keep(flow.labels[one], f"{flow.called(node)} computes with their number")


# ---- elements move ---------------------------------------------------------------------------------------------------


def _moved(flow: "Flow", node: Node, *args: Any, **kwargs: Any) -> Any:
    """The same call, of labels."""
    if node.op == "call_module":
        return flow.root.get_submodule(node.target)(*args, **kwargs)
    if node.op == "call_method":  # labels that are expanded have other strides
        return getattr(args[0], node.target.replace("view", "reshape"))(*args[1:], **kwargs)
    return node.target(*args, **kwargs)


def _move(flow: "Flow", node: Node, value: Any) -> Any:
    if flow.called(node).endswith("_") and node.op == "call_method":  # the input is another one afterwards
        return None
    return _moved(flow, node, *flow.label(node.args), **flow.label(node.kwargs))


def _along(position: int, default: Any = 0) -> Callable[["Flow", Node, Any], Any]:
    """What cuts or turns one dimension by numbers that the forward has."""

    def rule(flow: "Flow", node: Node, value: Any) -> Any:
        input = node.args[0] if node.args else None
        dims = flow.argument(node, position, "dim", flow.argument(node, position, "dims", default))
        if not isinstance(input, Node) or any(not isinstance(d, int) for d in _listed(dims)):
            return None
        if any(varies(flow.labels[input], d) for d in _listed(dims)):
            return None
        return _move(flow, node, value)

    return rule


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _chunk(flow: "Flow", node: Node, value: Any) -> Any:
    """As many of each part go, so that the parts stay equal."""
    parts = _move(flow, node, value)
    d = flow.argument(node, 2, "dim", 0)
    if varies(flow.labels[node.args[0]], d):
        if len({one.shape for one in parts}) > 1 or len(parts) != flow.argument(node, 1, "chunks"):
            return None
        for one in parts[1:]:
            flow.channels.tie(parts[0], one)
    return parts


def _glu(flow: "Flow", node: Node, value: Any) -> Any:
    module = flow.root.get_submodule(node.target) if node.op == "call_module" else None
    d = module.dim if module else flow.argument(node, 1, "dim", -1)
    one, other = flow.labels[node.args[0]].chunk(2, d)
    flow.channels.tie(one, other)
    return one


def _item(flow: "Flow", node: Node, value: Any) -> Any:
    input, index = node.args
    if not isinstance(flow.env[input], Tensor):
        return flow.labels[input][index]
    labels, d = flow.labels[input], 0
    parts = index if isinstance(index, tuple) else (index,)
    used = sum(part is not None and part is not Ellipsis for part in parts)
    for part in parts:
        if part is None:
            continue
        if part is Ellipsis:
            d += labels.dim() - used
            continue
        if type(part) not in (int, slice) or (varies(labels, d) and part != slice(None)):
            return None
        d += 1
    return labels[flow.value(index)]


def _cat(flow: "Flow", node: Node, value: Any) -> Any:
    """Along other dimensions than its own it ties its operands."""
    found, d = _parts(flow, node), flow.argument(node, 1, "dim", flow.argument(node, 1, "axis", 0))
    if not found or type(d) is not int:
        return None
    d = d % found[0].dim()
    if any(one != d for labels in found for one in varying(labels)):
        found = [_without(flow, labels, d) for labels in found]
        for labels in found[1:]:
            flow.channels.tie(labels, found[0])
        return found[0].narrow(d, 0, 1).expand(value.shape)
    return _move(flow, node, value)


def _parts(flow: "Flow", node: Node) -> list[Tensor]:
    """The labels of the tensors that are joined."""
    tensors = flow.argument(node, 0, "tensors")
    found = flow.labels[tensors] if isinstance(tensors, Node) else [flow.labels[one] for one in tensors]
    return [one for one in found if one.numel()]


def _without(flow: "Flow", labels: Tensor, d: int) -> Tensor:
    """Labels that do not vary along d: those that do are tied."""
    first = labels.narrow(d, 0, 1)
    if varies(labels, d):
        flow.channels.tie(labels, first)
    return first


def _stack(flow: "Flow", node: Node, value: Any) -> Any:
    found, d = _parts(flow, node), flow.argument(node, 1, "dim", 0)
    if not found or type(d) is not int:
        return None
    for labels in found[1:]:
        flow.channels.tie(labels, found[0])
    return found[0].unsqueeze(d if d >= 0 else d + value.dim()).expand(value.shape)


def _sizes(first: int) -> Callable[["Flow", Node, Any], Any]:
    """view, reshape and the like: the sizes begin at this argument.

    A size that the forward has as a number stays what it is. So channels that it divides go in equal numbers from each
    part, and those that it counts stay.
    """

    def rule(flow: "Flow", node: Node, value: Any) -> Any:
        if node.op == "call_module":
            module = flow.root.get_submodule(node.target)
            sizes, start = _listed(module.unflattened_size), module.dim
        else:
            sizes = [one for part in node.args[first:] for one in _listed(part)]
            if not sizes:
                sizes = _listed(flow.argument(node, first, "sizes", flow.argument(node, first, "shape")))
            start = node.args[1] if first == 2 else 0
        if not all(type(flow.env[one] if isinstance(one, Node) else one) is int for one in sizes):
            return None
        start = start % flow.env[node.args[0]].dim()
        labels = compact(_move(flow, node, value))
        counted = {start + i for i, one in enumerate(sizes) if type(one) is int and one != -1}
        vary = varying(labels)
        free = [d for d in vary if d not in counted]
        why = f"{flow.called(node)} has their number {'x'.join(str(value.size(d)) for d in vary)} as a constant"
        if len(free) > 1 or (vary and not free):
            flow.channels.keep(labels, why)
        else:
            for d in vary:
                if d in counted:
                    labels = _without(flow, labels, d).expand(value.shape)
        return labels

    return rule


# ---- fewer elements --------------------------------------------------------------------------------------------------


def _reduce(flow: "Flow", node: Node, value: Any) -> Any:
    """Sums and means over dimensions without channels."""
    input = node.args[0] if node.args else None
    if not isinstance(input, Node) or not isinstance(value, Tensor):
        return None
    labels = flow.labels[input]
    dims = flow.argument(node, 1, "dim", flow.argument(node, 1, "axis"))
    dims = list(range(labels.dim())) if dims is None or dims == () else _listed(dims)
    if not all(type(d) is int for d in dims) or any(varies(labels, d) for d in dims):
        return None
    dims = sorted({d % labels.dim() for d in dims}, reverse=True)
    for d in dims:
        labels = labels.narrow(d, 0, 1)
    if labels.dim() != value.dim():
        for d in dims:
            labels = labels.squeeze(d)
    return labels.expand(value.shape)


def _normalize(flow: "Flow", node: Node, value: Any) -> Any:
    """softmax and the like, along a dimension without channels."""
    input = node.args[0] if node.args else None
    module = flow.root.get_submodule(node.target) if node.op == "call_module" else None
    d = module.dim if module else flow.argument(node, 1, "dim")
    if not isinstance(input, Node) or type(d) is not int or varies(flow.labels[input], d):
        return None
    return flow.labels[input]


def _window(flow: "Flow", node: Node, value: Any) -> Any:
    """Pools, paddings and resizing: each channel for itself, over the last dimensions."""
    input = node.args[0] if node.args else None
    if not isinstance(input, Node) or not isinstance(value, Tensor) or not isinstance(flow.env[input], Tensor):
        return None
    labels = flow.labels[input]
    name = flow.called(node) if node.op != "call_module" else type(flow.root.get_submodule(node.target)).__name__
    digits = [int(one) for one in name if one in "123"]
    over = digits[-1] if digits else value.dim() - 2
    if name == "pad":
        over = len(flow.argument(node, 1, "pad")) // 2
    if labels.dim() != value.dim() or any(d >= labels.dim() - over for d in varying(labels)) or 0 in labels.shape:
        return None
    if labels.shape[: labels.dim() - over] != value.shape[: labels.dim() - over]:
        return None
    return labels[(..., *[slice(0, 1)] * over)].expand(value.shape)


# ---- layers ----------------------------------------------------------------------------------------------------------


def _linear(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    columns = flow.take(node.args[0], module, -1, folds=True)
    if columns is None:
        return None
    layer = flow.layer(module, columns, _outputs(flow, module, value.shape[-1]))
    return layer.outputs.expand(value.shape)


def _outputs(flow: "Flow", module: nn.Module, count: int) -> Tensor:
    known = flow.flows.layers.get(flow.flows.names[id(module)])
    return flow.channels.fresh(count) if known is None or known.outputs is None else known.outputs


def _conv(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    spatial = len(module.kernel_size)
    groups, kept = module.groups, labels.dim() - spatial - 1
    # A border of zeros is no channel's worth.
    borders = module.padding_mode == "zeros" and any(one not in (0, "valid") for one in _listed(module.padding))
    inner = groups < module.in_channels // groups  # few large groups: each loses as many channels
    folds = groups == 1 and not borders and not isinstance(module, TRANSPOSED)
    if groups > 1 and not inner:
        columns = flow.columns(node.args[0], kept)  # a group's outputs go with it, and nobody takes anything up
    else:
        columns = flow.take(node.args[0], module, kept, folds)
    if columns is None:
        return None
    outputs = _outputs(flow, module, module.out_channels)
    if groups > 1:
        ins, outs = columns.view(groups, -1), outputs.view(groups, -1)
        if inner:
            flow.channels.tie(ins, ins[:1])
            flow.channels.tie(outs, outs[:1])
        else:
            flow.channels.tie(ins, ins[:, :1])
            flow.channels.tie(outs, ins[:, :1])
    flow.layer(module, columns, outputs)
    return outputs.view(-1, *[1] * spatial).expand(value.shape)


def _embedding(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    outputs = _outputs(flow, module, value.shape[-1])
    flow.layer(module, outputs=outputs)
    return outputs.expand(value.shape)


def _channelwise(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    """Batch norms and the like: dimension 1; an instance norm's is 0 where there is no batch."""
    d = labels.dim() - int(type(module).__name__[-2]) - 1 if isinstance(module, INSTANCE_NORMS) else 1
    columns = flow.columns(node.args[0], d) if labels.dim() > d else None
    count = getattr(module, "num_features", getattr(module, "num_parameters", None))
    if columns is not None and count == len(columns):
        flow.layer(module, outputs=columns)
    elif count != 1:  # PReLU with one slope for all
        return None
    return labels


def _group_norm(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    """Whole groups go: a mean over fewer channels would be another one."""
    columns = flow.columns(node.args[0], 1)
    if columns is None:
        return None
    flow.channels.tie(columns.view(module.num_groups, -1), columns.view(module.num_groups, -1)[:, :1])
    flow.layer(module, outputs=columns)
    return labels


def _layer_norm(flow: "Flow", node: Node, module: nn.Module, labels: Tensor, value: Tensor) -> Tensor | None:
    over = len(module.normalized_shape)
    if any(d >= labels.dim() - over for d in varying(labels)):
        if not flow.flows.through_layer_norms or over > 1:
            way = "; through_layer_norms=True removes them nevertheless" if over == 1 else ""
            flow.channels.keep(labels, f"{flow.called(node)} takes its mean over them{way}")
        elif (columns := flow.columns(node.args[0], -1)) is not None:
            flow.layer(module, outputs=columns)
        else:
            return None
    return labels


LAYERS: dict[type, Callable[..., Tensor | None]] = {
    nn.Linear: _linear,
    **dict.fromkeys((*CONVOLUTIONS, *TRANSPOSED), _conv),
    nn.Embedding: _embedding,
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS, nn.PReLU), _channelwise),
    nn.GroupNorm: _group_norm,
    nn.LayerNorm: _layer_norm,
    nn.RMSNorm: _layer_norm,
}

# ---- which function has which rule -----------------------------------------------------------------------------------


def _table(*rows: tuple[Callable[["Flow", Node, Any], Any], Iterable[str]]) -> dict[str, Any]:
    return {name: rule for rule, names in rows for name in names}


_DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")
_ARITHMETIC = """
    add sub mul div truediv floordiv pow rsub subtract multiply divide true_divide neg negative positive pos abs exp
    expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos erf sign round floor ceil clamp clip clamp_min
    clamp_max maximum minimum fmax fmin lerp addcmul addcdiv where nan_to_num masked_fill eq ne lt le gt ge
    logical_and logical_or logical_not iadd isub imul itruediv ipow float half bfloat16 double to type type_as clone
    detach contiguous cpu cuda requires_grad stochastic_depth
"""
_WINDOWS = [f"{kind}{n}d" for n in (1, 2, 3) for kind in ("max_pool", "avg_pool", "adaptive_avg_pool",
            "adaptive_max_pool", "lp_pool")]  # fmt: skip
_WINDOW_MODULES = [f"{kind}{n}d" for n in (1, 2, 3) for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool",
                   "AdaptiveMaxPool", "LPPool", "ZeroPad", "ConstantPad", "ReflectionPad", "ReplicationPad",
                   "CircularPad")]  # fmt: skip

RULES = _table(
    (_elementwise, [*(kind.function for kind in ACTIVATIONS.values()), *_DROPOUTS, *_ARITHMETIC.split()]),
    (_move, ("permute", "transpose", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "flatten", "ravel",
             "unsqueeze", "squeeze", "flip", "unpack", "getattr", "pixel_shuffle", "repeat", "tile")),
    (_item, ("getitem",)),
    (_cat, ("cat", "concat", "concatenate")),
    (_stack, ("stack",)),
    (_chunk, ("chunk",)),
    (_glu, ("glu",)),
    (_along(1), ("select", "narrow", "index_select", "unbind", "unfold")),
    (_along(2), ("split", "split_with_sizes", "tensor_split")),
    (_along(2, None), ("roll",)),
    (_sizes(1), ("view", "reshape", "expand", "broadcast_to")),
    (_sizes(2), ("unflatten",)),
    (_reduce, ("mean", "sum", "amax", "amin", "logsumexp", "prod", "std", "var")),
    (_normalize, ("softmax", "log_softmax", "cumsum")),
    (_window, [*_WINDOWS, "interpolate", "upsample", "pad"]),
)  # fmt: skip

MODULES = _table(
    (_elementwise, [*(kind.module.__name__ for kind in ACTIVATIONS.values()), "Dropout", "Dropout1d", "Dropout2d",
                    "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "Identity", "RReLU"]),
    (_move, ("Flatten", "PixelShuffle")),
    (_sizes(1), ("Unflatten",)),
    (_glu, ("GLU",)),
    (_normalize, ("Softmax", "LogSoftmax")),
    (_window, [*_WINDOW_MODULES, "Upsample", "UpsamplingNearest2d", "UpsamplingBilinear2d"]),
)  # fmt: skip
