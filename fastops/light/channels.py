"""fastops.light.prune_channels_."""

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph

from fastops._signature import Signature
from fastops._tracing import is_frozen, plain_class, reason, trace
from fastops.explain import _TOLERANCE
from fastops.fuse import is_layer
from fastops.light._called import calls_of
from fastops.light._changes import Changes, parameters_of
from fastops.light._channels import Channels, compact, varying
from fastops.light._choice import IMPORTANCES, Importance, chosen, fitting, groups_of, labels_of
from fastops.light._cutting import clear, cut, put
from fastops.light._flow import Flow, Flows, Layer
from fastops.light._layers import CONVOLUTIONS, TRANSPOSED, checked_filter, kind_of, owners_of, why_not
from fastops.light.weights import take_masks_
from fastops.replace import Row
from fastops.replace import _name as class_name

__all__ = ["prune_channels_"]

_PRODUCERS = (nn.Linear, nn.Embedding, *CONVOLUTIONS, *TRANSPOSED)
_TRANSFORMER_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@torch.inference_mode(False)
def prune_channels_(
    model: nn.Module,
    inputs: Any,
    amount: float | Mapping[str, float] = 0.5,
    importance: Importance = "l2",
    scope: str = "layer",
    round_to: int = 1,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    through_layer_norms: bool = False,
    parameters: float | None = None,
) -> Changes:
    """Takes the least important channels and neurons out of a model, in place: its layers are smaller ones afterwards.

    The model's forward is followed, and what hangs together is removed together: the channels of layers whose outputs
    are added, those of batch norms and depthwise convolutions in between, and the columns of the layers that take
    them, through concatenations, pools, flatten and view. A removed channel is one whose weights, bias and batch norm
    are 0: what the model computes then, the smaller one computes, but for roundings. Where a function is not 0 at 0,
    such as sigmoid, the next layer's bias takes up what is left.

    The model is the same object with the same names, modules and forward, and its modules are torch.nn's, so that it
    trains on, is saved and pickled as before. Its parameters are new: make its optimizer afterwards. It cannot be
    undone: keep a checkpoint. Masks of torch.nn.utils.prune are made permanent first, as by take_masks_.

    Args:
        model: any module.
        inputs: what to call it with: a tensor of any shape and dtype that it takes, a tuple of arguments, or a dict of
            named ones.
        amount: how much of the channels goes, from 0 up to 1, or that of each layer, by name.
        importance: "l1" or "l2": the norm of a channel's weights and bias. "batch_norm": the magnitude of the batch
            norm's weight (l2 where there is none). Or importance(name, layer), which gives a number for each output
            channel. They count relative to the mean of their layer, and those of tied channels are averaged.
        scope: "layer": as much of each layer. "global": the least important ones of all layers.
        round_to: a layer keeps a multiple of as many channels, where it can: 8 or 16 for vectors.
        filter_fn: filter_fn(module, fqn) -> bool says of which layers channels may go; None means of all.
        through_layer_norms: whether channels go that LayerNorm or RMSNorm takes its mean over, which changes that mean:
            such a model has to be trained on.
        parameters: in the place of amount: the part of the model's parameters that is left at most, from 0 to 1. The
            smallest amount is taken with which it is, or one that leaves each layer its last channels.

    A forward that cannot be traced is followed in one call, with these inputs: where that calls all of its layers. What
    the smaller model gives is then compared with what the model gives whose removed channels are 0.

    Returns:
        Changes: which layers have how many channels left, and which ones have all, and why: the model's input and
        output, what a forward counts by a constant (`x.view(-1, 320)`: write `x.flatten(1)`), layers with hooks,
        operations that are not known.

    Raises:
        TypeError: model is not a torch.nn.Module, or cannot be called with inputs.
        ValueError: amount, importance, scope, round_to or parameters is not one of these, or amount names a layer that
            has no channels to remove.
        RuntimeError: the smaller model cannot be called, or gives something else; the model is then what it was.
        What filter_fn and importance raise.

    Source: Li et al., "Pruning Filters for Efficient ConvNets" (2016); Liu et al., "Network Slimming" (2017), for
    batch norms; Fang et al., "DepGraph: Towards Any Structural Pruning" (2023), for what hangs together.

    >>> from fastops import light
    >>> model = nn.Sequential(nn.Conv2d(1, 32, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10))
    >>> print(light.prune_channels_(model, torch.zeros(1, 1, 8, 8)))
    0  torch.nn.Conv2d  ->     32 -> 16 outputs
    3  torch.nn.Linear  ->     1152 -> 576 inputs
    3  torch.nn.Linear  kept:  the model's output
    11850 parameters -> 5930, 1 of 2.00
    """
    _check(model, amount, importance, scope, round_to, parameters)
    checked_filter("prune_channels_", filter_fn)
    args, named = _arguments(model, inputs)
    take_masks_(model)
    changes = Changes(before=parameters_of(model))
    with _evaluating(model):
        shapes = _shapes(model(*args, **named))
        flows = _flows(model, through_layer_norms)
        _follow(model, args, named, flows, changes, "the model's", set())
    layers = {
        name: layer
        for name, layer in flows.layers.items()
        if layer.outputs is not None and issubclass(kind_of(layer.module), _PRODUCERS)
    }
    for name, layer in layers.items():
        if filter_fn is not None and not filter_fn(layer.module, name):
            flows.channels.keep(layer.outputs, "filter_fn said no")
    classes = _classes(flows)
    kept = flows.channels.kept(classes)
    groups = groups_of(layers, flows, classes, kept, importance)
    if parameters is None:
        gone = labels_of(classes, chosen(groups, layers, amount, scope, round_to))
    else:
        budget = parameters * changes.before
        of_amount = lambda part: chosen(groups, layers, part, scope, round_to)  # noqa: E731
        gone = fitting(flows, classes, changes.before, budget, of_amount)

    wanted = _without(model, flows, gone, args, named) if flows.in_one_call else None
    undo = [(one, _state(one)) for one in {id(m): m for m in _cut_modules(flows, gone)}.values()]
    try:
        _cut(flows, gone, changes)
        with _evaluating(model):
            result = model(*args, **named)
        if _shapes(result) != shapes:
            raise RuntimeError(f"its output has the shapes {_shapes(result)} and not {shapes}")
        if wanted is not None:
            _compare(result, wanted)
    except Exception as error:
        for module, state in undo:
            vars(module).clear()
            vars(module).update(state)
        raise RuntimeError(
            f"prune_channels_: the forward of {class_name(type(model))} relies on numbers of channels "
            f"(filter_fn can leave the layers in question as they are): {error}"
        ) from error
    for name, layer in layers.items():
        if name not in changes.removed:
            roots = classes[layer.outputs].tolist()
            why = next((kept[root] for root in roots if root in kept), "")
            changes.kept.append(Row(name, class_name(type(layer.module)), why or "so much of its channels is none"))
    changes.after = parameters_of(model)
    return changes


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check(model: Any, amount: Any, importance: Any, scope: Any, round_to: Any, parameters: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"prune_channels_: model must be a torch.nn.Module, got {type(model).__name__}")
    made = [name for name, one in model.named_modules() if plain_class(one) is not type(one) or is_frozen(one)]
    if made:
        raise TypeError(f"prune_channels_: {made[0] or 'model'} was made by fuse or freeze: prune what it is made from")
    amounts = list(amount.values()) if isinstance(amount, Mapping) else [amount]
    if not all(isinstance(one, (int, float)) and 0 <= one < 1 for one in amounts):
        raise ValueError(f"prune_channels_: amount must be in [0, 1), or such numbers by name, got {amount!r}")
    if not callable(importance) and importance not in IMPORTANCES:
        expected = ", ".join(map(repr, IMPORTANCES))
        raise ValueError(f"prune_channels_: importance must be {expected} or a function, got {importance!r}")
    if scope not in ("layer", "global") or (scope == "global" and isinstance(amount, Mapping)):
        raise ValueError(f"prune_channels_: scope must be 'layer', or 'global' with one amount, got {scope!r}")
    if type(round_to) is not int or round_to < 1:
        raise ValueError(f"prune_channels_: round_to must be a positive int, got {round_to!r}")
    if parameters is not None and (not isinstance(parameters, (int, float)) or not 0 < parameters <= 1):
        raise ValueError(f"prune_channels_: parameters must be more than 0 and at most 1, got {parameters!r}")


def _arguments(model: nn.Module, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(inputs, Mapping):
        args, named = (), dict(inputs)
    else:
        args, named = (inputs if isinstance(inputs, tuple) else (inputs,)), {}
    try:
        inspect.signature(model.forward).bind(*args, **named)
    except TypeError as error:
        raise TypeError(f"prune_channels_: inputs do not fit the model's forward: {error}") from None
    return args, named


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _shapes(value: Any) -> list[tuple[int, ...]]:
    return [tuple(one.shape) for one in torch.utils._pytree.tree_leaves(value) if isinstance(one, Tensor)]


# ---- what hangs together ---------------------------------------------------------------------------------------------


def _flows(model: nn.Module, through_layer_norms: bool) -> Flows:
    names = {id(module): name for name, module in model.named_modules()}
    flows = Flows(Channels(), names, owners_of(model), through_layer_norms, {}, {}, [])
    for module in model.modules():
        if isinstance(module, _TRANSFORMER_LAYERS) and is_layer(module):
            _feed_forward(module, flows)
    return flows


def _feed_forward(layer: nn.Module, flows: Flows) -> None:
    """The two linear layers of a transformer's, which no other module sees between."""
    first, second = layer.linear1, layer.linear2
    why = [why_not(one, flows.names[id(one)], flows.owners) for one in (first, second)]
    if {type(first), type(second)} <= {nn.Linear} and not any(why):
        hidden = flows.channels.fresh(first.out_features)
        worth = layer.activation(torch.zeros(1))
        if bool(worth == 0) or second.bias is not None:
            flows.layers[flows.names[id(first)]] = Layer(first, outputs=hidden)
            flows.layers[flows.names[id(second)]] = Layer(second, hidden, constants=worth.expand(len(hidden)))


def _follow(
    module: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
    flows: Flows,
    changes: Changes,
    ends: str,
    done: set[int],
) -> None:
    """Follows a module's forward, and those of the modules that it calls and that cannot be traced, on their own."""
    if id(module) in done or isinstance(module, torch.jit.ScriptModule) or is_layer(module):
        return
    done.add(id(module))
    name = flows.names[id(module)]
    try:
        for graph, values in _traced(module, args, named):
            Flow(module, graph, flows, ends).run(*values)
    except Exception as error:  # whatever a forward raises that is given proxies, or parts of zeros
        why = reason(error)
    else:
        why = ""
    if why and _follow_call(module, args, named, flows, ends):
        changes.untraced.append(Row(name, class_name(type(module)), f"{why}; one call of it was followed"))
    elif why:
        changes.untraced.append(Row(name, class_name(type(module)), why))
        for below in module.modules():
            layer = flows.layers.get(flows.names[id(below)])
            for labels in (layer.inputs, layer.outputs) if layer else ():
                if labels is not None:
                    flows.channels.keep(labels, f"the forward of {name or 'the model'} cannot be followed")
        for child, one_args, one_named in _calls_below(module, args, named):
            _follow(child, one_args, one_named, flows, changes, f"{flows.names[id(child)]}'s", done)
    while flows.apart:
        child, one_args, one_named = flows.apart.pop()
        _follow(child, one_args, one_named, flows, changes, f"{flows.names[id(child)]}'s", done)


def _traced(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> Iterator[tuple[Graph, list[Any]]]:
    """A module's graphs, in both modes where it asks for them, and the values of their placeholders."""
    forward = type(module).forward
    signature = Signature(forward)
    if "forward" in vars(module):
        raise TypeError("its forward has been overridden on the instance")
    bound = inspect.signature(forward).bind(module, *args, **named).arguments
    values = [bound[one] for one in (*signature.inputs, *signature.named_inputs)]
    first = trace(module, signature.inputs, signature.named_inputs, training=False)
    yield first.graph, values
    if first.decided:
        yield trace(module, signature.inputs, signature.named_inputs, training=True).graph, values


def _follow_call(module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], flows: Flows, ends: str) -> bool:
    """Follows what one call does; whether that could be done. Layer norms would leave nothing to compare it with."""
    if flows.through_layer_norms:
        return False
    try:
        for call in calls_of(module, args, named):
            Flow(module, call.graph, flows, ends).run(*call.values)
    except Exception:  # of a forward that is called in another mode, or of parts of zeros
        return False
    flows.in_one_call = True
    return True


def _calls_below(
    module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
) -> list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]]:
    """The calls of modules that a module makes, those that call others first; of each module the first one."""
    found: dict[int, tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = {}

    def note(child: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        found.setdefault(id(child), (child, args, named))

    below = [one for one in module.modules() if one is not module and not isinstance(one, torch.jit.ScriptModule)]
    hooks = [one.register_forward_pre_hook(note, with_kwargs=True) for one in below]
    try:
        module(*args, **named)
    except Exception:  # which the call of the whole model has not raised: it is not known with what it is called
        pass
    finally:
        for hook in hooks:
            hook.remove()
    outermost: list[tuple[nn.Module, tuple[Any, ...], dict[str, Any]]] = []
    inside: set[int] = set()
    for call in found.values():
        if id(call[0]) not in inside:
            outermost.append(call)
            inside |= {id(one) for one in call[0].modules()}
    return outermost


def _classes(flows: Flows) -> Tensor:
    """The class of each label. A parameter that would have to be cut along two dimensions stays."""
    while True:
        classes = flows.channels.classes()
        bad = [labels for _, labels in flows.parameters.values() if len(varying(compact(classes[labels]))) > 1]
        if not bad:
            return classes
        for labels in bad:
            flows.channels.keep(labels, "a parameter that the forward reads has them along two dimensions")


# ---- the cut ---------------------------------------------------------------------------------------------------------


def _cut_modules(flows: Flows, gone: Tensor) -> Iterator[nn.Module]:
    for layer in flows.layers.values():
        if any(labels is not None and bool(gone[labels].any()) for labels in (layer.inputs, layer.outputs)):
            yield layer.module
    for owner, labels in flows.parameters.values():
        if bool(gone[labels].any()):
            yield owner


def _without(model: nn.Module, flows: Flows, gone: Tensor, args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What the model gives when the channels that go are 0."""
    result = copy.deepcopy(model)
    for name, layer in flows.layers.items():
        if layer.outputs is not None and bool(gone[layer.outputs].any()):
            clear(result.get_submodule(name), gone[layer.outputs])
    with _evaluating(result):
        for (name, key), (_, labels) in flows.parameters.items():
            value = getattr(result.get_submodule(name), key)
            value.masked_fill_(gone[labels].to(value.device), 0)
        return result(*args, **named)


def _compare(result: Any, wanted: Any) -> None:
    leaves = (torch.utils._pytree.tree_leaves(one) for one in (result, wanted))
    for one, other in zip(*leaves, strict=True):
        if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
            largest = float(other.nan_to_num().abs().max())
            if float((one - other).nan_to_num().abs().max()) > _TOLERANCE.get(one.dtype, 0.1) * largest:
                raise RuntimeError("its output is another one than with the removed channels at 0")


def _state(module: nn.Module) -> dict[str, Any]:
    state = dict(vars(module))
    return {**state, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}


def _cut(flows: Flows, gone: Tensor, changes: Changes) -> None:
    for name, layer in flows.layers.items():
        stay, text = [], []
        for what, labels in (("outputs", layer.outputs), ("inputs", layer.inputs)):
            lost = None if labels is None else gone[labels]
            if lost is not None and bool(lost.any()):
                text.append(f"{len(lost)} -> {int((~lost).sum())} {what}")
                if what == "outputs":
                    changes.removed[name] = lost.nonzero().flatten()
            stay.append(~lost if lost is not None and bool(lost.any()) else None)
        outputs, inputs = stay
        if text:
            cut(layer, inputs, outputs)
            if layer.inputs is not None or issubclass(kind_of(layer.module), _PRODUCERS):
                changes.changed.append(Row(name, class_name(type(layer.module)), ", ".join(text)))
    for (name, key), (owner, labels) in flows.parameters.items():
        stay = compact(~gone[labels])
        for d in varying(stay):
            index = stay.movedim(d, 0).reshape(stay.size(d), -1)[:, 0].nonzero().flatten()
            value = owner._parameters.get(key, owner._buffers.get(key))
            put(owner, key, value.index_select(d, index.to(value.device)))
            path = f"{name}.{key}" if name else key
            changes.changed.append(Row(path, "parameter", f"{stay.size(d)} -> {len(index)}"))
            changes.removed[path] = (~stay).movedim(d, 0).reshape(stay.size(d), -1)[:, 0].nonzero().flatten()
