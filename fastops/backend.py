"""torch.compile(model, backend="fastops"): the graphs that Dynamo finds, on fastops' kernels."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch._higher_order_ops.wrap import tag_activation_checkpoint
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

import fastops.functional as FF
from fastops._fusion import rewrite

_RESTS = ("eager", "inductor")

# Pools that no layer stands before, by each name that Dynamo writes for them. The max pools of other packages than F
# always return indices, or never.
_POOLS = {
    getattr(package, name): getattr(FF, name)
    for packages, kinds in (((F,), ("max", "adaptive_max")), ((F, torch, torch._C._nn), ("avg", "adaptive_avg")))
    for name in (f"{kind}_pool{n}d" for kind in kinds for n in (1, 2, 3))
    for package in packages
    if hasattr(package, name)
}


# Its name is how a call of fastops.functional that is being traced knows for whom (_general.py).
def fastops(
    graph_module: GraphModule, inputs: list[Any], *, options: dict[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend of torch.compile that is called "fastops".

    `torch.compile(model, backend="fastops")` puts one call of fastops in the place of each layer and the activation,
    pool, norm or addition that belongs to it, as fastops.fuse does, in whatever Dynamo can make a graph of. Forward and
    backward run on fastops' kernels. No code is generated, so compiling takes as long as tracing.

    Args:
        graph_module: Dynamo's graph.
        inputs: what it is first called with.
        options: {"rest": "eager"}, the default, calls PyTorch's op for whatever else is in the graph;
            {"rest": "inductor"} gives the graph to Inductor, which compiles what stands between the calls of fastops.

    Returns:
        What computes the graph.

    Raises:
        ValueError: an option that does not exist. Dynamo shows it as BackendCompilerFailed.

    Source: PyTorch's custom backends of torch.compile.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU())
    >>> compiled = torch.compile(model, backend="fastops", options={"rest": "eager"})  # doctest: +SKIP
    """
    options = {} if options is None else options
    rest = options.get("rest", "eager")
    unknown = sorted(options.keys() - {"rest"})
    if unknown:
        raise ValueError(f'backend "fastops": options must have no key but "rest", got {unknown[0]!r}')
    if rest not in _RESTS:
        raise ValueError(f'backend "fastops": option "rest" must be "eager" or "inductor", got {rest!r}')
    _rewrite(graph_module, rest == "eager")
    if rest == "eager":
        return graph_module.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph_module, inputs)


def _rewrite(graph_module: GraphModule, eager: bool) -> None:
    rewrite(graph_module.graph, graph_module)
    for node in graph_module.graph.nodes:
        node.target = _POOLS.get(node.target, node.target)
        if eager and node.target is tag_activation_checkpoint:
            node.target = _checkpoint
            _rewrite(getattr(graph_module, node.args[0].target), eager)
    graph_module.recompile()


def _checkpoint(graph_module: GraphModule, *args: Any, **kwargs: Any) -> Any:
    """torch.utils.checkpoint as Dynamo writes it: tag_activation_checkpoint, which only Inductor gives a random state.

    In eager mode it would compute another dropout for backward than it did in forward.
    """
    options, inputs = tag_activation_checkpoint.divide_kwargs(kwargs)
    options["use_reentrant"] = False
    if "_checkpoint_context_fn" in graph_module.meta:
        options["context_fn"] = graph_module.meta["_checkpoint_context_fn"]
    return checkpoint(graph_module, *args, **options, **inputs)
