"""What light.save writes, run without torch, beside the frozen model: layers, quantized ones, what cannot be saved,
damaged files, a process that has no torch, and the command. tests/cpp/test_runtime.cpp has the hostile files.
"""

import collections
import os
import shlex
import shutil
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy
import pytest
import torch
import torch.nn.functional as F
from tiers import TIERS
from torch import nn

import build_native
import fastops
from fastops import light
from fastops.demo import MLP, ConvNet, SimpleNet

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "light"))

import fastops_light  # noqa: E402

COMMAND = Path(fastops.__file__).with_name(build_native.RUN_COMMAND)


# ---- models


class Residual(nn.Module):
    def __init__(self, channels, out, stride):
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(channels, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out))
        self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.shrinks = stride > 1

    def forward(self, x):
        return F.relu(self.second(self.first(x)) + (self.short(x) if self.shrinks else x))


class Inverted(nn.Module):
    def __init__(self, channels):
        super().__init__()
        wide = 6 * channels
        layers = [nn.Conv2d(channels, wide, 1), nn.BatchNorm2d(wide), nn.ReLU6()]
        layers += [nn.Conv2d(wide, wide, 3, 1, 1, groups=wide), nn.BatchNorm2d(wide), nn.Hardswish()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(wide, channels, 1), nn.BatchNorm2d(channels))

    def forward(self, x):
        return x + self.layers(x)


class Attention(nn.Module):
    def __init__(self, size, heads):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(size, 3 * size), nn.Linear(size, size)

    def forward(self, x):
        batch, length, size = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, length, size))


class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        self.token, self.positions = nn.Parameter(torch.randn(1, 1, 32)), nn.Parameter(torch.randn(1, 17, 32))
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.attention = Attention(32, 4)
        self.mlp = nn.Sequential(nn.Linear(32, 160), nn.GELU(), nn.Linear(160, 32))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        x = x + self.attention(self.norms[0](x))
        x = x + self.mlp(self.norms[1](x))
        return self.head(self.norms[2](x)[:, 0])


def function(f, *modules):
    """A model whose forward is f."""

    class Function(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(modules)

        def forward(self, x):
            return f(self.parts, x)

    return Function()


LAYERS = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


class Unfollowed:
    """A forward whose code freeze cannot see: what it calls are PyTorch's ops."""

    def __call__(self, parts, x):
        conv, norm = parts
        if bool(torch.ones(()) > 0):
            x = F.conv2d(x, conv.weight, conv.bias, padding=1)
        x = F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)
        x = F.avg_pool2d(F.max_pool2d(x, 2), 3, 1, 1) + F.adaptive_avg_pool2d(x, 1)
        x = F.linear(F.layer_norm(x, [4]), torch.eye(4)[:3]).flatten(1)
        return F.log_softmax(F.softmax(F.gelu(x), 1), 1)


def image(*sizes):
    return torch.randn(2, *sizes)


MODELS = {
    "mlp": lambda: (MLP(64), image(1, 8, 8)),
    "small": lambda: (SimpleNet(), image(10)),
    "deep": lambda: (nn.Sequential(*(nn.Linear(8, 8) for _ in range(20))), image(8)),
    "convnet": lambda: (ConvNet(), image(1, 28, 28)),
    "planes": lambda: (  # which conv_max_pool leaves as they are, and a convolution does not
        nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, padding=1),
                      nn.MaxPool2d(2), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.LazyLinear(4)),
        image(3, 40, 36),
    ),
    "large": lambda: (  # copies and sums of many elements, whose innermost dimension is long, and one of three
        function(lambda parts, x: (parts[0](x) + x.permute(0, 2, 3, 1).reshape(-1, 3, 150, 130)) * x[:, :1],
                 nn.Conv2d(3, 3, 1)),
        image(3, 150, 130),
    ),
    "resnet": lambda: (
        nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1), Residual(16, 16, 1),
                      Residual(16, 32, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
        image(3, 33, 37),
    ),
    "mobile": lambda: (
        function(lambda parts, x: parts[1](parts[0](x).mean([2, 3])),
                 nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.Hardswish(), Inverted(16)), nn.Linear(16, 4)),
        image(3, 20, 18),
    ),
    "transformer": lambda: (VisionTransformer(), image(3, 16, 16)),
    "encoder": lambda: (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True), image(5, 32)),
    "self attention": lambda: (
        function(lambda parts, x: parts[0](x, x, x)[0], nn.MultiheadAttention(16, 2, batch_first=True)), image(7, 16),
    ),
    "products": lambda: (
        function(lambda _, x: (x @ x.transpose(1, 2)).softmax(-1) @ x), image(5, 8),
    ),
    "causal": lambda: (function(lambda _, x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), image(2, 9, 8)),
    "masked": lambda: (
        function(lambda _, x: F.scaled_dot_product_attention(x, x, x, attn_mask=torch.eye(9) * 3 - 1)), image(2, 9, 8),
    ),
    "signal": lambda: (
        nn.Sequential(nn.Conv1d(3, 8, 5, padding="same", dilation=2), nn.BatchNorm1d(8), nn.ELU(),
                      nn.AvgPool1d(3, 2, 1), nn.MaxPool1d(2, ceil_mode=True), nn.Flatten(), nn.LazyLinear(6)),
        image(3, 31),
    ),
    "volume": lambda: (
        nn.Sequential(nn.Conv3d(2, 4, (1, 3, 2), stride=(1, 2, 1)), nn.PReLU(4), nn.AdaptiveMaxPool3d((2, None, 1))),
        image(2, 5, 7, 6),
    ),
    "norms": lambda: (
        nn.Sequential(nn.BatchNorm2d(6), nn.LayerNorm([4, 5]), nn.RMSNorm(5), nn.Softmax(-1), nn.LogSoftmax(1)),
        image(6, 4, 5),
    ),
    "gates": lambda: (nn.Sequential(nn.GLU(1), nn.Softplus(2, 10), nn.Threshold(0.7, 0.1)), image(6, 5)),
    "arithmetic": lambda: (
        function(lambda _, x: (1 - x * 2) / 3.0 - x.mean(1, keepdim=True)), image(4, 3),
    ),
    "in place": lambda: (function(lambda _, x: F.relu(x * 1.5, inplace=True).add_(x)), image(4, 3)),
    "shapes": lambda: (
        function(lambda _, x: torch.stack([x[:, 1:6:2], x[:, -3:]], 1).unsqueeze(2).squeeze(2).transpose(1, 3)
                 .reshape(-1, 6).chunk(2, 1)[1] + torch.ones(1)),
        image(7, 4),
    ),
    "functions": lambda: (function(Unfollowed(), *LAYERS), image(3, 8, 8)),
    "words": lambda: (
        nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 3)), torch.tensor([[1, 10, 0], [3, 3, 5]]),
    ),
}  # fmt: skip


def prepared(model):
    """In eval mode, with statistics as after training."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def as_numpy(value):
    return value.float().numpy() if value.dtype == torch.bfloat16 else value.numpy()


def check(model, x, path, bound=2e-6, threads=1):
    """Other batches too, as the frozen model computes them."""
    saved = light.save(model, path, x)
    frozen = fastops.freeze(model)
    with fastops_light.Model(path, threads) as run:
        for batch in (2, 1, 5, 0):
            more = torch.cat([x, x.flip(0), x])[:batch]
            with torch.no_grad():
                expected = as_numpy(frozen(more))
            result = run(as_numpy(more))
            assert result.shape == expected.shape
            numpy.testing.assert_allclose(
                result, expected, rtol=bound, atol=bound * max(1, abs(expected).max(initial=0))
            )
    return saved


@pytest.mark.parametrize("name", MODELS)
def test_saved_models_compute_what_frozen_ones_do(name, tmp_path):
    torch.manual_seed(len(name))
    model, x = MODELS[name]()
    with torch.no_grad():
        prepared(model)(x)  # lazy layers
    saved = check(model, x, tmp_path / "model.fops", threads=2)
    assert next(iter(saved.inputs.values()))[0] == "any"
    assert saved.bytes == (tmp_path / "model.fops").stat().st_size


@pytest.mark.parametrize("name", ["convnet", "transformer", "mobile"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(name, dtype, tmp_path):
    torch.manual_seed(0)
    model, x = MODELS[name]()
    check(prepared(model).to(dtype), x.to(dtype), tmp_path / "model.fops", bound=0.05)


@pytest.mark.parametrize("config", ["int8_dynamic", "int8_weight", "int4_weight", "fp8_weight"])
def test_quantized_layers(config, tmp_path):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 70, bias=False), nn.GELU(), nn.Linear(70, 3))
    light.quantize_(model.eval(), config)
    whole = check(model, torch.randn(2, 64), tmp_path / "model.fops")
    assert whole.nodes == 3  # activations are part of the layers
    assert whole.bytes < 4 * (64 * 256 + 256 * 70) // 2


class Pools(nn.Module):
    """Residual additions and pools of levels, and an activation that no bound of levels says."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding="same"), nn.Conv2d(8, 8, 3, 1, 1, groups=8, bias=False)
        self.third, self.fourth = nn.Conv2d(8, 12, (2, 1), 2, (1, 0)), nn.Conv2d(12, 8, 3, dilation=2)
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu6(self.first(x))
        x = F.relu(self.second(x) + x)
        x = F.hardswish(self.third(F.max_pool2d(x, 3, 2, 1)))
        x = self.fourth(F.avg_pool2d(x, 2, 1, ceil_mode=True))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Apart(nn.Module):
    """What freeze does not follow: each layer takes and gives numbers."""

    def __init__(self):
        super().__init__()
        self.conv, self.linear = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, 10)

    def forward(self, x):
        x = F.relu(self.conv(x))
        return self.linear(x.mean([2, 3]) if bool(torch.ones(()) > 0) else x)


STATIC = {
    "convnet": lambda: (ConvNet(), image(1, 28, 28), ["conv_int8", "max_pool", "linear_int8_static"]),
    "mlp": lambda: (MLP(64), image(1, 8, 8), ["linear_int8_static"]),
    "pools": lambda: (Pools(), image(3, 33, 30), ["max_pool", "avg_pool_int8", "adaptive_avg_pool_int8"]),
    "apart": lambda: (Apart(), image(3, 9, 8), ["conv_int8", "adaptive_avg_pool"]),
    "large": lambda: (Large(), image(1, 300, 290), ["conv_int8", "adaptive_avg_pool_int8"]),
}


class Large(nn.Module):
    """Windows of more than 2^16 levels."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 1), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(F.adaptive_avg_pool2d(F.relu(self.conv(x)), 1).flatten(1))


@pytest.mark.parametrize("name", STATIC)
def test_static_int8(name, tmp_path):
    """Levels go from layer to layer as in the frozen model: the same bits."""
    torch.manual_seed(3)
    model, x, ops = STATIC[name]()
    whole = light.save(model.eval(), tmp_path / "whole.fops", x).bytes
    light.quantize_(model, "int8_static", calibrate=[torch.randn(8, *x.shape[1:])])
    saved = check(model, x, tmp_path / "model.fops", bound=0)
    assert all(op.encode() in (tmp_path / "model.fops").read_bytes() for op in ops)
    if name in ("convnet", "mlp"):
        assert saved.bytes < 0.3 * whole
    model.bfloat16()
    check(model, x.bfloat16(), tmp_path / "model.fops", bound=0.02)


def test_sparse_layers(tmp_path):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(12, 40, 1), nn.ReLU(), nn.Flatten(), nn.Linear(40 * 6, 70), nn.GELU(), nn.Linear(70, 3, bias=False)
    ).eval()
    light.prune_weights_(model, 0.8, pattern=(4, 4))
    light.sparsify_(model, filter_fn=lambda *_: True)
    whole = check(model, torch.randn(5, 12, 3, 2), tmp_path / "model.fops")
    assert whole.nodes == 4  # activations are part of the layers
    assert whole.bytes < 4 * 40 * 6 * 70 // 2
    check(model, torch.randn(1, 12, 3, 2).to(memory_format=torch.channels_last), tmp_path / "model.fops")


def test_layers_take_sums_and_activations(tmp_path):
    """As one call each: what freeze has joined, and what it leaves alone."""
    assert light.save(prepared(MODELS["resnet"]()[0]), tmp_path / "m.fops", image(3, 33, 37)).nodes == 10
    encoder, x = MODELS["encoder"]()
    assert light.save(encoder.eval(), tmp_path / "m.fops", x).nodes == 18


def test_several_inputs_and_outputs(tmp_path):
    class Two(nn.Module):
        def forward(self, left, right, weights):
            return {"sum": left + right, "rest": (left * weights, right)}

    inputs = torch.randn(2, 3), torch.randn(2, 3), torch.randn(4, 1, 3)
    saved = light.save(Two(), tmp_path / "m.fops", *inputs)
    assert saved.inputs == {"left": ("any", 3), "right": ("any", 3), "weights": (4, 1, 3)}
    model = fastops_light.Model(tmp_path / "m.fops")
    assert model.outputs == list(saved.outputs)
    left, right, weights = (one.numpy() for one in inputs)
    total, scaled, same = model(left, right, weights)
    numpy.testing.assert_array_equal(total, left + right)
    numpy.testing.assert_array_equal(scaled, left * weights)
    numpy.testing.assert_array_equal(same, right)


def test_a_model_for_one_batch_is_saved_for_that_one(tmp_path):
    model = function(lambda _, x: x.reshape(12) * 2)
    assert light.save(model, tmp_path / "m.fops", torch.randn(3, 4)).inputs == {"x": (3, 4)}
    run = fastops_light.Model(tmp_path / "m.fops")
    assert run(numpy.ones((3, 4))).shape == (12,)
    with pytest.raises(ValueError, match=r"input x has to have shape \(3, 4\), got \(2, 4\)"):
        run(numpy.ones((2, 4)))


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: x[: len(x) // 2 + 1],  # as many of 4 rows as of 5
        lambda m, x: x[: min(len(x), 6)] + 1,
        lambda m, x: torch.cat([m[0].weight[:1].expand(len(x), -1), x], 1) / len(x),
    ],
)
def test_sizes_that_only_seem_to_follow_the_batch(forward, tmp_path):
    model, x = function(forward, nn.Linear(4, 2)), torch.randn(4, 4)
    assert light.save(model, tmp_path / "m.fops", x).inputs == {"x": (4, 4)}
    result = fastops_light.Model(tmp_path / "m.fops")(x.numpy())
    numpy.testing.assert_allclose(result, model(x).detach().numpy(), rtol=1e-6)


def test_a_forward_that_writes_to_its_input(tmp_path):
    model, x = function(lambda _, x: x.add_(1)), torch.zeros(2, 3)
    light.save(model, tmp_path / "m.fops", x)
    assert (x == 0).all()
    given = numpy.ones((5, 3), numpy.float32)
    assert (fastops_light.Model(tmp_path / "m.fops")(given) == 2).all()
    assert (given == 1).all()


def test_saving_changes_nothing(tmp_path):
    model, x = MODELS["convnet"]()
    model.train()
    before = {name: (id(one), one._version) for name, one in model.named_parameters()}
    light.save(model, tmp_path / "m.fops", x)
    frozen = fastops.freeze(model)
    light.save(frozen, tmp_path / "again.fops", x)
    assert (tmp_path / "m.fops").read_bytes() == (tmp_path / "again.fops").read_bytes()
    assert {name: (id(one), one._version) for name, one in model.named_parameters()} == before
    assert model.training
    assert not any(module._forward_hooks or "forward" in vars(module) for module in frozen.modules())


# ---- what cannot be saved


class Names(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), inner)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (nn.LSTM(4, 4), "body_1: the run time has no aten.mkldnn_rnn_layer"),
        (function(lambda _, x: torch.cumsum(x, 1)), "aten.cumsum"),
        (function(lambda _, x: x.double()), "turns float32 into float64"),
        (function(lambda _, x: x[x > 0]), "aten"),
        (function(lambda _, x: x if x.sum() > 0 else -x), "aten"),
        (function(lambda _, x: (x, 3)), "output"),
        (function(lambda _, x: x + torch.rand(4)), "it draws random numbers (aten.rand"),
        (function(lambda _, x: [x.view(-1).relu_(), x][1]), "written to through another view"),
    ],
)
def test_what_cannot_be_saved_is_named(inner, message, tmp_path):
    path = tmp_path / "m.fops"
    path.write_text("an earlier one")
    with pytest.raises(ValueError, match="save: Names cannot be saved: ") as error:
        light.save(Names(inner), path, torch.randn(2, 4))
    assert message in str(error.value)
    assert path.read_text() == "an earlier one"
    assert os.listdir(tmp_path) == ["m.fops"]


def test_the_layer_that_cannot_be_saved_is_named(tmp_path):
    model = nn.Sequential(collections.OrderedDict(conv=nn.Conv2d(1, 2, 3), upsample=nn.Upsample(scale_factor=2)))
    with pytest.raises(ValueError, match=r"upsample.*aten\.upsample_nearest2d"):
        light.save(model, tmp_path / "m.fops", torch.randn(1, 1, 5, 5))


def test_bad_arguments(tmp_path):
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        light.save(3, tmp_path / "m.fops", torch.randn(1))
    with pytest.raises(TypeError, match="inputs must be Tensors, got list"):
        light.save(nn.Linear(1, 1), tmp_path / "m.fops", [1.0])
    with pytest.raises(ValueError, match=r"inputs must be examples .* got none"):
        light.save(nn.Linear(1, 1), tmp_path / "m.fops")
    with pytest.raises(ValueError, match="is of float64"):
        light.save(nn.Linear(1, 1).double(), tmp_path / "m.fops", torch.randn(1, 1).double())


# ---- running


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "m.fops"
    light.save(nn.Linear(4, 3), path, torch.randn(1, 4))
    return path


def test_arrays_that_do_not_fit(saved):
    model = fastops_light.Model(saved)
    assert model.inputs == {"input": ((-1, 4), numpy.dtype("float32"))}
    with pytest.raises(ValueError, match=r"input input has to have shape \(any, 4\), got \(2, 5\)"):
        model(numpy.zeros((2, 5)))
    with pytest.raises(ValueError, match="the model has 1 inputs, got 2"):
        model(numpy.zeros((2, 4)), numpy.zeros((2, 4)))
    x = numpy.random.default_rng(0).normal(size=(8, 6)).astype("f4")
    numpy.testing.assert_array_equal(model(x[::2, 2:]), model(x[::2, 2:].copy()))  # as NumPy's own, of any strides
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model(x[:, :4])


def test_names_that_are_no_utf8(saved):
    data = bytearray(saved.read_bytes())
    at = data.index(b"input")
    data[at] = 0xFF
    data[12:16] = zlib.crc32(data[16:]).to_bytes(4, "little")
    saved.write_bytes(data)
    assert list(fastops_light.Model(saved).inputs) == ["\ufffdnput"]
    data[at + 5] = 2  # its element type
    data[12:16] = zlib.crc32(data[16:]).to_bytes(4, "little")
    saved.write_bytes(data)
    with pytest.raises(OSError, match="is of bfloat16, which NumPy does not have"):
        fastops_light.Model(saved)


def test_several_threads_call_one_model(saved):
    model, x = fastops_light.Model(saved), numpy.random.default_rng(0).normal(size=(6, 4)).astype("f4")
    expected, wrong = model(x), []

    def call(rows):
        for _ in range(200):
            if not numpy.array_equal(model(x[:rows]), expected[:rows]):
                wrong.append(rows)

    threads = [threading.Thread(target=call, args=[rows]) for rows in range(1, 7)]  # more shapes than are kept
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: b"", "has 0 bytes"),
        (lambda data: data[:100], "it is cut off or damaged"),
        (lambda data: data + b"\0", "it is cut off or damaged"),
        (lambda data: b"PK" + data[2:], "no model that fastops.light.save has written"),
        (lambda data: data[:8] + b"\2" + data[9:], "format version 2"),
        (lambda data: data[:-5] + b"!" + data[-4:], "checksum"),
    ],
)
def test_damaged_files(saved, change, message):
    saved.write_bytes(change(saved.read_bytes()))
    with pytest.raises(OSError, match="fastops_light: ") as error:
        fastops_light.Model(saved)
    assert message in str(error.value)
    with pytest.raises(OSError, match="No such file"):
        fastops_light.Model(saved.with_name("nowhere"))


def test_a_process_without_torch(saved):
    code = """
import sys
sys.modules.update(dict.fromkeys(("torch", "fastops"), None))  # importing them is an error
import numpy, fastops_light
assert fastops_light.version() and fastops_light.isa()
print(fastops_light.Model(sys.argv[1])(numpy.ones((2, 4), "f4")).shape)
assert not any("torch" in line or "python" in line and "libpython" in line for line in open("/proc/self/maps"))
"""
    library = str(COMMAND.with_name(build_native.RUN_LIBRARY))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "light"), "FASTOPS_RUN_LIBRARY": library}
    result = subprocess.run([sys.executable, "-c", code, saved], env=environment, capture_output=True, text=True)
    assert result.stdout == "(2, 3)\n", result.stderr


def test_the_command(saved, tmp_path):
    x, y = tmp_path / "x.npy", tmp_path / "y.npy"
    array = numpy.random.default_rng(0).normal(size=(5, 4)).astype("f4")
    numpy.save(x, array)

    def run(*arguments):
        return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)

    assert "input input: float32 (any, 4)\noutput output\n" in run(saved).stdout
    result = run(saved, x, "-o", y, "--threads", "2", "--repeat", "3")
    assert result.returncode == 0, result.stderr
    assert "first result after" in result.stdout
    assert "3 runs: median" in result.stdout
    numpy.testing.assert_array_equal(numpy.load(y), fastops_light.Model(saved)(array))
    for arguments, message in (
        ((), "fastops-run MODEL.fops"),
        ((tmp_path / "no.fops", x), "No such file"),
        ((saved, saved), "no file of numpy.save"),
        ((saved, x, x), "the model has 1 inputs"),
        ((saved, x, "--repeat", "x"), "fastops-run MODEL.fops"),
    ):
        result = run(*arguments)
        assert result.returncode != 0
        assert message in result.stderr


def test_a_run_time_without_some_tiers(tmp_path):
    """The tiers that TIERS leaves out are neither linked nor chosen."""
    source = tmp_path / "tiers.cpp"
    source.write_text(
        """#include <cstdio>
#include "kernels/common/cpu/isa.h"
namespace fastops { const KernelTable kernels_scalar = {"scalar", {}, nullptr, nullptr}; }
using namespace fastops;
int main() {
  std::printf("%s %s ", isa_name(isa_found()), kernels(DType::bf16).isa);
  std::printf("%d %d", set_isa(Isa::avx2), has_kernels(Isa::amx));
}
"""
    )
    folder = build_native.KERNELS / "common" / "cpu"
    sources = [source, folder / "dispatch.cpp", folder / "isa.cpp"]
    flags = ["-std=c++20", f"-I{ROOT / 'csrc'}", "-DFASTOPS_TIERS=1"]
    program = tmp_path / "tiers"
    subprocess.run([*build_native.compiler(), *flags, *sources, "-o", program], check=True)
    environment = {**os.environ, "FASTOPS_ISA": ""}
    assert subprocess.run([program], capture_output=True, text=True, env=environment).stdout == "scalar scalar 0 0"
    with pytest.raises(SystemExit, match=r"TIERS must name some of scalar, avx2, .*, got avx3"):
        build_native.build_runtime(tmp_path, "x86_64", ["avx3"])


def test_the_library_of_some_tiers(saved, tmp_path):
    """TIERS=avx2: with dispatch.cpp for it and the objects of these tiers, which the extension's build has left, it
    links and runs. Its kernels are those of the extension: those of inference alone take minutes to compile."""
    dispatch = build_native.KERNELS / "common" / "cpu" / "dispatch.cpp"
    kernels = [one for one in build_native.kernel_sources() if one.tier in ("", "scalar", "avx2")]
    objects = [build_native.EXTENSION / one.object.relative_to(ROOT) for one in kernels if one.source != dispatch]
    runtime = (build_native.EXTENSION / "csrc" / "runtime").glob("*.o")
    objects += [path for path in runtime if path.name not in ("main.o", "npy.o")]
    if "avx2" not in TIERS or not all(path.exists() for path in objects):
        pytest.skip("the objects are not here, or not for this processor")
    library = tmp_path / build_native.RUN_LIBRARY
    flags = ["-std=c++20", "-fPIC", "-fvisibility=hidden", "-DFASTOPS_TIERS=3", "-shared", "-pthread", "-Wl,-z,defs"]
    flags += [f"-Wl,--version-script={build_native.RUNTIME / 'exports.map'}", "-Wl,--gc-sections", "-s"]
    subprocess.run([*build_native.compiler(), *flags, dispatch, *objects, "-o", library], check=True)
    x = numpy.random.default_rng(0).standard_normal((5, 4), "f4")
    numpy.save(tmp_path / "x.npy", x)
    code = """
import sys, numpy, fastops_light
print(fastops_light.isa())
numpy.save("y.npy", fastops_light.Model(sys.argv[1])(numpy.load("x.npy")))
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "light"), "FASTOPS_RUN_LIBRARY": str(library)}
    for asked, isa in (("", "avx2"), ("scalar", "scalar")):
        result = subprocess.run(
            [sys.executable, "-c", code, saved], cwd=tmp_path, env={**environment, "FASTOPS_ISA": asked},
            capture_output=True, text=True,
        )  # fmt: skip
        assert result.stdout == f"{isa}\n", result.stderr
        numpy.testing.assert_allclose(
            numpy.load(tmp_path / "y.npy"), fastops_light.Model(saved)(x), rtol=1e-5, atol=1e-6
        )


def sections(path, prefix):
    """Bytes of an object's or a library's sections whose names begin so."""
    rows = subprocess.run(["size", "-A", path], capture_output=True, text=True, check=True).stdout.splitlines()
    return sum(int(row.split()[1]) for row in rows if row.startswith(prefix))


def test_the_size_of_the_run_time():
    """What a library has besides its kernels: 400 KB (GCC 12, x86-64), most of them code."""
    library = COMMAND.with_name(build_native.RUN_LIBRARY)
    code = sections(library, ".text")
    assert code > 0.65 * library.stat().st_size
    assert library.stat().st_size < 450_000


# Code of a tier's kernels in the run time, as built by `make runtime` (GCC 12), in KB.
MOST_KB = {"scalar": 1450, "avx2": 1750, "avx512": 2000, "avx512_bf16": 1200, "amx": 800}


@pytest.mark.parametrize("tier", MOST_KB)
def test_the_size_of_a_tier(tier):
    unit = ROOT / "build" / "run-x86_64" / f"isa_{tier}.o"
    if not unit.exists():
        pytest.skip("`make runtime` has built no kernels of this tier")
    assert sections(unit, ".text") < 1000 * MOST_KB[tier]


def for_the_run_time(kernels, *arguments, source=None):
    """Compiles kernels, or a source in their place, as for the run time but in a hurry; what the compiler says."""
    flags = [*build_native.COMMON, *build_native.run_flags(), *kernels.flags, "-Og", "-w", "-xc++"]
    command = [*build_native.compiler(), *flags, *arguments, "-" if source else kernels.source]
    return subprocess.run(command, input=source, capture_output=True, text=True).stderr


SCALAR = {one.room: one for one in build_native.kernel_sources() if one.tier == "scalar"}


def test_all_rooms_of_a_tier_are_one_source():
    """A name that two rooms have in different senses is an error."""
    assert for_the_run_time(SCALAR[""], "-fsyntax-only", source=build_native.tier_unit(SCALAR[""])) == ""


@pytest.mark.parametrize("room", ["activation", "batch_norm", "mlp"])
def test_the_run_time_has_no_kernels_for_training(room, tmp_path):
    """No gradients, no masks, no statistics of a batch, no other dtypes."""
    assert for_the_run_time(SCALAR[room], "-c", "-o", tmp_path / "room.o") == ""
    names = subprocess.run(["nm", "-C", tmp_path / "room.o"], capture_output=True, text=True, check=True).stdout
    code = [name.replace("bf16_t", "") for name in names.splitlines() if " t " in name or " T " in name]
    assert any("forward_row" in name for name in code)
    for left_out in ("ackward_", "mask_row", "moments<", "<double", "f16_t"):
        assert not [name for name in code if left_out in name]


@pytest.mark.skipif(shutil.which("objdump") is None, reason="there is no objdump")
@pytest.mark.parametrize(("tier", "products"), [("avx512_bf16", "vdpbf16ps|vpdpbusd"), ("amx", "tdpbf16ps|tdpbusd")])
def test_what_a_tier_hands_down(tier, products):
    """Rooms that the run time does not have of a tier use none of its products in the extension either."""
    unreached = ("inverted_residual", "weight_only")  # have them without optimization, where nothing leads to them
    own = (*build_native.RUN_ROOMS[tier], *build_native.TRAINING_ROOMS, *unreached)
    for kernels in build_native.kernel_sources():
        path = build_native.EXTENSION / kernels.object.relative_to(ROOT)
        if kernels.tier == tier and kernels.room not in ("", *own) and path.exists():
            find = f"objdump -d {shlex.quote(str(path))} | grep -cwE '{products}'"
            assert subprocess.run(find, shell=True, capture_output=True, text=True).stdout == "0\n", kernels.room


ARM = (build_native.ARM_COMPILER, build_native.ARM_RUNNER[0])


@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason="there is no g++-aarch64-linux-gnu, or no qemu-user")
def test_64_bit_arm(tmp_path):
    """The run time for Arm, its NEON tier under an emulator, gives what this processor does."""
    prefix = ROOT / "build" / "aarch64"
    build_native.build_runtime(prefix, "aarch64", optimize=["-O0"])  # in 40 s of the processor; with -O3 it takes 300
    command = prefix / "bin" / build_native.RUN_COMMAND
    sources = {"quantized": "mlp", "half": "mobile", "static": "convnet", "sparse": "mlp"}
    plain = ("convnet", "resnet", "mobile", "transformer", "signal", "norms", "masked", "gates")
    for name in (*plain, *sources):
        torch.manual_seed(0)
        model, x = MODELS[sources.get(name, name)]()
        prepared(model)(x)
        if name == "static":
            light.quantize_(model, "int8_static", calibrate=[x])
        if name == "sparse":
            light.prune_weights_(model, 0.8, pattern=(4, 4))
            light.sparsify_(model, filter_fn=lambda *_: True)
        if name == "half":
            model, x = model.bfloat16(), x.bfloat16()
        if name == "quantized":
            light.quantize_(model, "int8_dynamic", lambda module, fqn: fqn == "fc1")
            light.quantize_(model, "int4_weight", lambda module, fqn: fqn == "fc2", group_size=32)
        light.save(model, tmp_path / "m.fops", x)
        numpy.save(tmp_path / "x.npy", as_numpy(x))
        with torch.no_grad():
            expected = as_numpy(fastops.freeze(model)(x))
        result = subprocess.run(
            [*build_native.ARM_RUNNER, command, "m.fops", "x.npy", "-o", "y.npy"],
            cwd=tmp_path, env={**os.environ, "FASTOPS_ISA": ""}, capture_output=True, text=True,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr
        bound = 0.05 if name == "half" else 1e-5
        numpy.testing.assert_allclose(numpy.load(tmp_path / "y.npy"), expected, rtol=bound, atol=bound)
