"""What other tools make of quantized and sparse layers, and of those that are prepared for training.

TOOLS is what docs/other-tools.md says of them: a tool that is not here has not been tried. peft: test_peft.py. Dynamo,
torch.export, vmap, checkpoints and casts of each layer: test_linear_int8.py and its like.
"""

import copy
import io
import pickle
from unittest import mock

import pytest
import torch
import torch.ao.quantization as quantization
import torch.distributed as dist
from torch import nn
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint_sequential

import fastops
from fastops import light
from fastops.light.quantize import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1))
QUANTIZED = (*CONFIGS, "sparse")
KINDS = (*QUANTIZED, *(f"qat {config}" for config in CONFIGS))


def model_of(kind):
    torch.manual_seed(0)
    layers = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(256, 32), nn.BatchNorm1d(32)
    model = nn.Sequential(*layers, nn.GELU(), nn.Linear(32, 5)).eval()
    everything = {"filter_fn": lambda *_: True}
    if kind == "sparse":
        light.prune_weights_(model, 0.8)
        light.sparsify_(model, **everything)
    elif kind.startswith("qat "):
        light.prepare_qat_(model, kind.removeprefix("qat "), **everything)
        model.train()(X)
        model.eval()
    else:
        light.quantize_(model, kind, calibrate=[X] if kind == "int8_static" else None, **everything)
    assert "fastops.light" in type(model[4]).__module__
    return model


# ---- tools that work: what they give, for X


def traced_and_pickled(model):
    return pickle.loads(pickle.dumps(torch.fx.symbolic_trace(model)))(X)


def traced_and_copied(model):
    return copy.deepcopy(torch.fx.symbolic_trace(model))(X)


def jit_saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, X), buffer)
    buffer.seek(0)
    return torch.jit.load(buffer)(X)


def jit_frozen(model):
    return torch.jit.freeze(torch.jit.trace(model, X))(X)


def exported_saved_and_loaded(model):
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(model, (X,)), buffer)
    buffer.seek(0)
    return torch.export.load(buffer).module()(X)


def stacked(model):
    """Two models in one, as an ensemble."""
    parameters, buffers = torch.func.stack_module_state([model, copy.deepcopy(model)])
    call = lambda *state: torch.func.functional_call(model, state, (X,))  # noqa: E731
    return torch.func.vmap(call)(parameters, buffers)[1]


def shared(model):
    return model.share_memory()(X)


def data_parallel(model):
    # For other tests the CUDA emulator may be a device of this process.
    with mock.patch("torch.nn.parallel.data_parallel._get_available_device_type", return_value=None):
        return nn.DataParallel(model)(X)


def swapped(model):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return model.double().float()(X)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def channels_last(model):
    return model.to(memory_format=torch.channels_last)(X)


def emptied(model):
    state = copy.deepcopy(model.state_dict())
    model.to("meta").to_empty(device="cpu").load_state_dict(state)
    return model(X)


def averaged(model):
    average = AveragedModel(model)
    average.update_parameters(model)
    average.update_parameters(model)
    return average(X)


def checkpointed(model):
    return checkpoint_sequential(model, 2, X.clone().requires_grad_(), use_reentrant=False)


def hooked(model):
    called = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: called.append("before"))
        layer.register_forward_hook(lambda *_: called.append("after"))
    y = model(X)
    assert called == ["before", "after"] * len(model)
    return y


def parametrized_bias(model):
    parametrize.register_parametrization(model[4], "bias", nn.Identity())
    return model(X)


def fx_fused(model):
    return optimization.fuse(model)(X)


def restored(model):
    fastops.replace_(model)
    fastops.restore_(model)
    return model(X)


def dynamic(model):
    return quantization.quantize_dynamic(model)(X)


WORKS = (
    traced_and_pickled, traced_and_copied, jit_saved_and_loaded, jit_frozen, exported_saved_and_loaded, stacked, shared,
    data_parallel, swapped, channels_last, emptied, averaged, checkpointed, hooked, parametrized_bias, fx_fused,
    restored, dynamic,
)  # fmt: skip
# Tools that take long.
SOME = {
    jit_saved_and_loaded: ("int8_static", "fp8_weight", "sparse"),
    jit_frozen: ("int8_dynamic", "int4_weight"),
    exported_saved_and_loaded: ("int8_static", "fp8_weight", "sparse"),
    swapped: [kind for kind in KINDS if kind != "sparse"],  # whose values stay float32
}


@pytest.mark.parametrize("tool", WORKS, ids=lambda tool: tool.__name__)
def test_tools_that_work(tool):
    for kind in SOME.get(tool, KINDS):
        model = model_of(kind)
        y = model(X).detach()
        z = tool(model).detach()
        torch.testing.assert_close(z, y, rtol=1e-4, atol=1e-5, msg=lambda text, kind=kind: f"{kind}: {text}")


# ---- tools that cannot, and say so


def scripted(model):
    torch.jit.script(model)


def traced_alone(model):
    torch.fx.symbolic_trace(model[4])


def pruned(model):
    prune.random_unstructured(model[4], "weight", 0.5)


def folded_linear(model):
    fuse_linear_bn_eval(model[4], model[5])


def folded_conv(model):
    fuse_conv_bn_eval(model[0], model[1])


def assigned(model):
    model[4].weight = nn.Parameter(torch.zeros(32, 256))


def constructed(model):
    type(model[4])(256, 32)


REFUSES = {
    scripted: (RuntimeError, "torch.jit.script cannot compile fastops.light.*: trace the model", KINDS),
    traced_alone: (TypeError, r": a trace calls the layer .*: trace a model that holds it, such as nn.Seq", KINDS),
    pruned: (TypeError, "weight_orig cannot be a parameter, .* before light.quantize_ or light.sparsify_", QUANTIZED),
    folded_linear: (TypeError, "weight cannot be a parameter, .*: prune, fold or reparametrize it before", QUANTIZED),
    folded_conv: (TypeError, "weight cannot be a parameter", ("int8_static", "sparse")),
    assigned: (TypeError, "weight cannot be a parameter", QUANTIZED),
    constructed: (TypeError, "is what light.prepare_qat_ makes of a layer", KINDS[len(QUANTIZED) :]),
}


@pytest.mark.parametrize("tool", REFUSES, ids=lambda tool: tool.__name__)
def test_tools_that_cannot(tool):
    error, message, kinds = REFUSES[tool]
    for kind in kinds:
        model = model_of(kind)
        y = model(X).detach()
        with pytest.raises(error, match=message):
            tool(model)
        assert torch.equal(model(X), y), kind  # nothing is lost


# ---- single ones


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_torch_func(kind):
    """Of every parameter and of the input, as backward gives them."""
    model, x = model_of(kind), X.clone().requires_grad_()
    parameters = dict(model.named_parameters())
    model(x).square().sum().backward()
    loss = lambda parameters, x: torch.func.functional_call(model, parameters, x).square().sum()  # noqa: E731
    gradients, of_x = torch.func.grad(loss, argnums=(0, 1))(parameters, X)
    torch.testing.assert_close(of_x, x.grad, rtol=1e-4, atol=1e-5)
    for name, parameter in parameters.items():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["int8_dynamic", "int8_static", "int8_weight"])
def test_parametrized_weights(kind):
    """What a parametrization computes is what the layer multiplies with."""

    class Negated(nn.Module):
        def forward(self, weight):
            return -weight

    model, x = model_of(kind), torch.randn(3, 256)
    layer = model[4]
    y, bias = layer(x).detach(), layer.bias.detach()
    parametrize.register_parametrization(layer, "weight", Negated())
    torch.testing.assert_close(layer(x).detach(), 2 * bias - y, rtol=1e-4, atol=1e-5)
    parametrize.remove_parametrizations(layer, "weight")
    torch.testing.assert_close(layer(x).detach(), 2 * bias - y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("qat ")])
def test_prepared_layers_are_layers_of_torch(kind):
    """Their weights are parameters: whatever changes those goes on working."""
    model = model_of(kind)
    prune.l1_unstructured(model[4], "weight", 0.5)
    if kind != "qat int4_weight":  # whose 16 levels need not have a zero
        assert (model[4].fake_weight() == 0).float().mean() >= 0.5
    prune.remove(model[4], "weight")
    parametrizations.weight_norm(model[7])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(model(X).square().mean())
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_fastops_own(kind, tmp_path):
    """Reports call the layers fastops'; what is prepared for training is not saved as a float model in silence."""
    model = model_of(kind)
    skipped = {row.name: row.result for row in fastops.replace_(model).skipped}
    assert skipped["4"] == skipped["7"] == "already a fastops module"
    assert "4" not in [row.name for row in light.sparsify_(model, 0).replaced]
    if not kind.startswith("qat "):
        return light.save(model, tmp_path / "model.fops", X)
    with pytest.raises(ValueError, match=r"save: '.' of the model is prepared for training: light\.convert_qat_"):
        light.save(model, tmp_path / "model.fops", X)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_model_that_is_a_layer(kind):
    layer, x = model_of(kind)[4], torch.randn(3, 256)
    with torch.no_grad():
        y = layer(x)
        for other in (fastops.fuse(layer), fastops.freeze(layer)):
            torch.testing.assert_close(other(x), y)


def test_ddp(tmp_path):
    """gloo sends no float8 and no 16-bit integers: such buffers are not to be sent."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        for kind in KINDS:
            model = model_of(kind)
            y = model(X).detach()
            own = {"init_sync": False, "broadcast_buffers": False} if kind in ("fp8_weight", "sparse") else {}
            parallel = nn.parallel.DistributedDataParallel(model, **own)
            torch.testing.assert_close(parallel(X).detach(), y, msg=lambda text, k=kind: f"{k}: {text}")
            parallel(X).sum().backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
    finally:
        dist.destroy_process_group()
