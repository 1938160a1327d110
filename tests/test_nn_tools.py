"""Layers with an activation are no torch.nn layers, and what tools that look at classes do with replaced models.

TOOLS is the list of docs/other-tools.md: a tool that is not here has not been tried.
"""

import contextlib
import copy
import pickle
import warnings

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.mkldnn import MkldnnLinear, to_mkldnn

import fastops
import fastops.nn as fnn
from fastops.nn.conv import FusedConv2d
from fastops.nn.linear import FusedLinear

pytestmark = pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:UserWarning")

PLAIN_AND_FUSED = {
    "Linear": ((8, 8), (4, 8)),
    "Conv1d": ((3, 4, 3), (2, 3, 6)),
    "Conv2d": ((3, 4, 3), (2, 3, 6, 6)),
    "Conv3d": ((3, 4, 3), (2, 3, 6, 6, 6)),
    "ConvTranspose1d": ((3, 4, 3), (2, 3, 6)),
    "ConvTranspose2d": ((3, 4, 3), (2, 3, 6, 6)),
    "ConvTranspose3d": ((3, 4, 3), (2, 3, 3, 3, 3)),
}


@pytest.fixture(params=PLAIN_AND_FUSED)
def name(request):
    return request.param


def plain_and_fused(name, activation="relu", **kwargs):
    arguments, shape = PLAIN_AND_FUSED[name]
    fused = getattr(fnn, name)(*arguments, activation=activation, **kwargs)
    plain = getattr(nn, name)(*arguments, **kwargs)
    plain.load_state_dict(fused.state_dict())
    return plain, fused, torch.randn(shape)


def close(one, two):
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# ---- a layer with an activation --------------------------------------------------------------------------------------


def test_a_fused_layer_is_no_layer_of_torch(name):
    plain, fused, x = plain_and_fused(name)
    assert not isinstance(fused, getattr(nn, name))
    assert not issubclass(type(fused), getattr(nn, name))
    assert isinstance(fused, getattr(fnn, name))
    assert type(fused).__name__ == f"Fused{name}"
    assert not isinstance(plain, type(fused))
    close(fused(x), plain(x).relu())


def test_a_fused_layer_shares_all_else(name):
    for bias in (True, False):
        torch.manual_seed(3)
        plain, fused, x = plain_and_fused(name, bias=bias)
        torch.manual_seed(3)
        again = getattr(fnn, name)(*PLAIN_AND_FUSED[name][0], bias=bias, activation="relu")
        assert set(vars(fused)) == {*vars(plain), "activation"}
        assert list(fused.state_dict()) == list(plain.state_dict())
        assert list(fused.children()) == []
        assert fused.extra_repr() == f"{plain.extra_repr()}, activation='relu'"
        assert repr(fused) == f"Fused{name}({fused.extra_repr()})"
        assert torch.equal(again.weight, fused.weight)
        torch.manual_seed(5)
        plain.reset_parameters()
        torch.manual_seed(5)
        fused.reset_parameters()
        for one, two in zip(plain.parameters(), fused.parameters(), strict=True):
            assert torch.equal(one, two)
        for other in (copy.deepcopy(fused), copy.copy(fused), pickle.loads(pickle.dumps(fused))):
            assert type(other) is type(fused)
            close(other(x), plain(x).relu())


def test_a_fused_layer_pickled_before_it_had_a_class_of_its_own(name):
    plain, layer, x = plain_and_fused(name, None)
    vars(layer)["activation"] = "relu"
    layer = pickle.loads(pickle.dumps(layer))
    assert not isinstance(layer, getattr(nn, name))
    close(layer(x), plain(x).relu())


def test_setting_the_activation_changes_the_class(name):
    plain, layer, x = plain_and_fused(name, None)
    theirs, ours, fused = getattr(nn, name), getattr(fnn, name), type(plain_and_fused(name)[1])
    assert (type(layer), layer.activation) == (ours, None)
    attributes = set(vars(layer))
    for activation, function in (("relu", torch.relu), ("tanh", torch.tanh), (nn.ELU(0.5), nn.ELU(0.5))):
        layer.activation = activation
        assert (type(layer), layer.activation) == (fused, activation)
        close(layer(x), function(plain(x)))
        assert list(layer.children()) == []
    layer.activation = None
    assert (type(layer), layer.activation) == (ours, None)
    assert isinstance(layer, theirs)
    assert set(vars(layer)) == attributes
    close(layer(x), plain(x))
    for bad, error in (("swoosh", ValueError), (nn.PReLU(), ValueError), (3, TypeError)):
        for value in (None, "relu"):
            layer.activation = value
            with pytest.raises(error):
                layer.activation = bad
            assert layer.activation == value


def test_a_forward_that_was_bound_knows_the_activation_of_now(name):
    plain, layer, x = plain_and_fused(name, None)
    forward = layer.forward
    for activation, function in (("relu", torch.relu), (None, nn.Identity()), ("tanh", torch.tanh)):
        layer.activation = activation
        close(forward(x), function(plain(x)))
        forward = layer.forward
    layer.activation = None
    close(forward(x), plain(x))


def test_the_activation_of_a_parametrised_layer():
    layer, x = parametrizations.weight_norm(fnn.Linear(4, 4)), torch.randn(3, 4)
    expected = layer(x)
    layer.activation = "relu"
    assert not isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "ParametrizedFusedLinear"
    close(layer(x), expected.relu())
    close(copy.deepcopy(layer)(x), expected.relu())
    parametrize.remove_parametrizations(layer, "weight")
    assert type(layer) is FusedLinear
    close(layer(x), expected.relu())
    layer = parametrizations.weight_norm(layer)
    layer.activation = None
    assert isinstance(layer, nn.Linear)
    close(layer(x), expected)


class Derived(FusedLinear):
    def forward(self, x):
        return super().forward(x) + 1


class Plain(fnn.Linear):
    pass


def test_derived_classes():
    layer, x = Derived(4, 3, activation="relu"), torch.randn(2, 4)
    assert not isinstance(layer, nn.Linear)
    close(layer(x), nn.functional.linear(x, layer.weight, layer.bias).relu() + 1)
    layer.activation = "tanh"
    assert type(layer) is Derived
    with pytest.raises(
        TypeError, match=r"activation must be given in Derived.*derive it from fastops.nn.linear.Linear"
    ):
        layer.activation = None
    with pytest.raises(
        TypeError, match=r"activation must be None in Plain.*from fastops.nn.linear.FusedLinear instead"
    ):
        Plain(4, 3, activation="relu")
    assert isinstance(Plain(4, 3), nn.Linear)
    with pytest.raises(TypeError, match="FusedLinear: activation must be given, got None: without one it is Linear"):
        FusedLinear(4, 3)


@pytest.mark.parametrize("fold", [fuse_linear_bn_eval, fuse_conv_bn_eval])
@pytest.mark.parametrize("bias", [True, False])
def test_folding_is_right_or_refused(fold, bias):
    """Both look at no class: they copy the layer and give it a weight and a bias."""
    name, norm = ("Linear", nn.BatchNorm1d(8)) if fold is fuse_linear_bn_eval else ("Conv2d", nn.BatchNorm2d(4))
    _, layer, x = plain_and_fused(name, bias=bias)
    layer, norm = layer.eval(), norm.eval()
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    with pytest.raises(RuntimeError, match=rf"Fused{name}.weight must stay the parameter that it is.*'relu'"):
        fold(layer, norm)
    layer.activation = None
    close(fold(layer, norm)(x), norm(layer(x)))


def test_another_parameter_is_refused_and_the_ways_that_the_message_names(name):
    plain, layer, x = plain_and_fused(name)
    other = nn.Parameter(torch.randn_like(layer.weight))
    weight = layer.weight
    with pytest.raises(RuntimeError, match="weight must stay the parameter"):
        layer.weight = other
    with pytest.raises(RuntimeError, match="bias must stay the parameter"):
        layer.bias = nn.Parameter(torch.zeros_like(layer.bias))
    assert layer.weight is weight
    layer.weight = weight  # the same
    layer.bias = None
    with pytest.raises(RuntimeError, match="bias must stay the parameter"):
        layer.bias = plain.bias
    layer.register_parameter("bias", plain.bias)
    layer.weight.data.copy_(other)
    plain.weight = other
    close(layer(x), plain(x).relu())
    layer.register_parameter("weight", plain.weight)
    assert layer.weight is plain.weight
    layer.scale = nn.Parameter(torch.zeros(1))  # what else there is comes before no activation that is known here
    layer.scale = nn.Parameter(torch.ones(1))


def test_what_else_changes_parameters_goes_on_working(name):
    plain, layer, x = plain_and_fused(name)
    state = {key: torch.randn_like(value) for key, value in layer.state_dict().items()}
    for assign in (False, True):
        for module in (plain, layer):
            module.load_state_dict(state, assign=assign)
        close(layer(x), plain(x).relu())
        assert (layer.weight.data_ptr() == state["weight"].data_ptr()) is assign
    assert set(vars(layer)) == {*vars(plain), "activation"}
    with pytest.raises(RuntimeError, match="must stay"):
        layer.weight = nn.Parameter(state["weight"])
    with pytest.raises(RuntimeError, match="size mismatch"):
        layer.load_state_dict({"weight": torch.zeros(1), "bias": torch.zeros(1)}, assign=True)
    called = {key: torch.randn_like(value) for key, value in state.items()}
    close(torch.func.functional_call(layer, called, x), torch.func.functional_call(plain, called, x).relu())
    close(layer.double()(x.double()), plain.double()(x.double()).relu())
    layer.float().to("meta").to_empty(device="cpu").load_state_dict(state)
    close(layer(x), plain.float()(x).relu())
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with torch.no_grad():
        plain.weight.tanh_()
    close(layer(x), plain(x).relu())
    parametrize.remove_parametrizations(layer, "weight")
    for module in (plain, layer):
        prune.l1_unstructured(module, "weight", amount=0.5)
        prune.remove(module, "weight")
    close(layer(x), plain(x).relu())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)
        close(layer(x), plain(x).relu())
        nn.utils.remove_weight_norm(layer)
    close(layer(x), plain(x).relu())


@pytest.mark.parametrize("tool", [quantization.quantize_dynamic, to_mkldnn, quantization.prepare_qat])
def test_tools_leave_fused_layers_alone(tool):
    model = nn.Sequential(fnn.Linear(8, 8, activation="relu"))
    if tool is quantization.prepare_qat:
        model.qconfig = quantization.get_default_qat_qconfig("x86")
    x = torch.randn(3, 8)
    expected = model(x)
    torch.testing.assert_close(tool(model)(x), expected)


def test_types_that_tools_take_for_torchs():
    """Through isinstance alone, as to_mkldnn, LoRA, tensor parallelism and torchao do."""
    model = nn.Sequential(fnn.Linear(8, 8), fnn.Linear(8, 8, activation="relu"), fnn.Conv2d(1, 1, 1, activation="relu"))
    assert [m for m in model if isinstance(m, (nn.Linear, nn.Conv2d))] == [model[0]]
    assert isinstance(model[2], FusedConv2d)


# ---- tools and replaced models ---------------------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)
    return nn.Sequential(*layers).eval()


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def quantize_dynamic(model):
    model = quantization.quantize_dynamic(model)
    return "quantized" in type(model[4]).__module__, model


def fuse_modules(model):
    model = quantization.fuse_modules(model, [["0", "1", "2"]])
    return isinstance(model[1], nn.Identity), model


def prepare_qat(model):
    model.train().qconfig = quantization.get_default_qat_qconfig("x86")
    model = quantization.prepare_qat(model)
    return "qat" in type(model[4]).__module__, None


def prepare(model):
    model.qconfig = quantization.get_default_qconfig("x86")
    model = quantization.prepare(model)
    return hasattr(model[4], "activation_post_process"), model


def prepare_fx(model):
    model = quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping("x86"), (X,))
    model = quantize_fx.convert_fx(model)
    return any(
        "quantized" in type(module).__module__ and "Linear" in type(module).__name__ for module in model.modules()
    ), None


def fx_fuse(model):
    model = optimization.fuse(model)
    return "1" not in [node.target for node in model.graph.nodes], model


def weight_norm_sparsifier(model):
    sparsifier = torch.ao.pruning.WeightNormSparsifier(sparsity_level=0.5)
    sparsifier.prepare(model, None)
    sparsifier.step()
    return bool(sparsifier.groups), None


def deep_lift(model):
    """Its rules for activations are found by class: without one it gives the plain gradient's numbers."""
    captum = pytest.importorskip("captum.attr")
    with torch.enable_grad():
        theirs, _ = captum.DeepLift(network()).attribute(X, X.flip(0), 0, return_convergence_delta=True)
        ours, _ = captum.DeepLift(model).attribute(X, X.flip(0), 0, return_convergence_delta=True)
    return torch.allclose(ours, theirs, atol=1e-5), None


def lrp(model):
    captum = pytest.importorskip("captum.attr")
    captum.LRP(nn.Sequential(model[0], model[2])).attribute(X, target=(0, 0, 0))
    return True, None


def fold(model):
    model[0], model[1] = fuse_conv_bn_eval(model[0], model[1]), nn.Identity()
    return True, model


def mkldnn(model):
    model = to_mkldnn(model)
    return type(model[4]) is MkldnnLinear, None


def prune_weights(model):
    prune.l1_unstructured(model[4], "weight", amount=0.5)
    return bool((model[4].weight == 0).any()), None


def torchao(model):
    ao = pytest.importorskip("torchao.quantization")
    ao.quantize_(model, ao.Int8WeightOnlyConfig())
    assert torch.allclose(model(X), network()(X), atol=0.05)
    return type(model[4].weight) is not nn.Parameter, None


def peft(model):
    peft = pytest.importorskip("peft")
    model = peft.inject_adapter_in_model(peft.LoraConfig(target_modules=["4"], r=2), model)
    return type(model[4]).__module__.startswith("peft"), model


# tool: what it does with a replaced model: nothing, an error that it raises, or what it does with torch.nn's.
TOOLS = {
    quantize_dynamic: "nothing",
    prepare: "nothing",
    prepare_qat: "nothing",
    prepare_fx: "nothing",
    fx_fuse: "nothing",
    weight_norm_sparsifier: "nothing",
    deep_lift: "nothing",
    fuse_modules: (AssertionError, NotImplementedError),
    lrp: TypeError,
    fold: "works",
    mkldnn: "works",
    prune_weights: "works",
    torchao: "works",
    peft: "works",
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tool", TOOLS, ids=lambda tool: tool.__name__)
def test_tools(tool):
    expected, model = network()(X), network()
    fastops.replace_(model)
    refusal = TOOLS[tool] if not isinstance(TOOLS[tool], str) else None
    with pytest.raises(refusal) if refusal else contextlib.nullcontext(), torch.no_grad():
        effect, result = tool(model)
        assert effect is (TOOLS[tool] == "works")
        if result is not None:
            close(result(X), expected)
    model = network()  # restore_ first, and every tool works
    fastops.replace_(model)
    fastops.restore_(model)
    with torch.no_grad():
        assert tool(model)[0]


def test_pt2e_after_restore():
    pt2e = pytest.importorskip("torchao.quantization.pt2e.quantize_pt2e")
    x86 = pytest.importorskip("torchao.quantization.pt2e.quantizer.x86_inductor_quantizer")
    model = network()
    fastops.replace_(model)
    fastops.restore_(model)
    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = pt2e.prepare_pt2e(torch.export.export(model, (X,)).module(), quantizer)
    assert any("Observer" in type(module).__name__ for module in prepared.modules())
