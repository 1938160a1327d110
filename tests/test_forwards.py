"""fastops.fuse and freeze on forwards of which a trace would be something else: it is right, or there is none."""

import collections
import contextlib
import contextvars
import copy
import dataclasses
import enum
import functools
import gc
import itertools
import os
import re
import time
import types

import pytest
import torch
import torch.utils.checkpoint
from torch import nn

import fastops

FLAG = True
TIMES = 0
LOG = []
SEEN = set()
CELL = [0]
COUNT = itertools.count()
CONFIG = {"relu": True, "sub": {"scale": 2.0}, "list": [1, 2]}


class Makes(collections.OrderedDict):
    """A table of classes that gives out objects, as transformers' of activations."""

    def __getitem__(self, key):
        return super().__getitem__(key)()


MADE = Makes(activation=nn.ReLU, other=nn.Tanh)
NAMES = types.SimpleNamespace(flag=True, deep=types.SimpleNamespace(n=3))
MODULE = types.ModuleType("settings_of_a_user")
MODULE.FLAG = True


class Mode(enum.Enum):
    A = 1
    B = 2


@dataclasses.dataclass
class Config:
    flag: bool = True
    calls: int = 0
    mode: Mode = Mode.A


class Slots:
    __slots__ = ("flag",)

    def __init__(self):
        self.flag = True


class Shared:
    flag = True
    count = 0


class Hidden:
    def __init__(self):
        self.value, self.calls = True, 0

    @property
    def flag(self):
        return self.value

    def tick(self):
        self.calls += 1


SLOTS, HIDDEN = Slots(), Hidden()


def variable():
    flag = True

    def get():
        return flag

    def put(value):
        nonlocal flag
        flag = value

    return get, put


@pytest.fixture(autouse=True)
def _variable():
    """Made after gc.freeze() (conftest.py), which hides functions from fastops' tracer."""
    global GET, PUT
    GET, PUT = variable()


def scaled(x, by=[2.0]):  # noqa: B006
    return x * by[0]


PARTIAL = functools.partial(lambda by, x: x * by[0], [2.0])
CONTEXT = contextvars.ContextVar("CONTEXT", default=2.0)


def on(m, x):
    return torch.relu(m.a(x))


def off(m, x):
    return m.b(x)


helper = on


def asks():
    return FLAG


asks.flag = True


def tick():
    global TIMES
    TIMES += 1


def set_global(name, value):
    globals()[name] = value


class Net(nn.Module):
    flag = True

    def __init__(self, forward):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.register_buffer("buffer", None)
        self.register_parameter("parameter", None)
        self.register_module("child", None)
        self.of, self.config, self.list, self.set = forward, Config(), [1, 2], {"a", "b"}
        self.dict, self.tensor, self.tensors = {"a": {"b": 1}}, torch.ones(3), [torch.ones(())]

    def forward(self, x):
        return self.of(self, x)


def same(a, b):
    if isinstance(b, torch.Tensor):
        return torch.allclose(a, b, 1e-4, 1e-5)
    if dataclasses.is_dataclass(b):
        return type(a) is type(b) and same(vars(a), vars(b))
    if isinstance(b, dict):
        return type(a) is type(b) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in b)
    if isinstance(b, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


X = torch.randn(3, 4)
CHILD = nn.Linear(4, 4)

# ---- what a forward reads, and what changes it and back --------------------------------------------------------------


def put(where, name, now, before):
    return lambda m: setattr(where, name, now), lambda m: setattr(where, name, before)


def put_own(name, now, before):
    return lambda m: setattr(m, name, now), lambda m: setattr(m, name, before)


GLOBAL = lambda m: set_global("FLAG", False), lambda m: set_global("FLAG", True)
RELU = lambda m: CONFIG.update(relu=False), lambda m: CONFIG.update(relu=True)
OWN_CONFIG = lambda m: setattr(m.config, "flag", False), lambda m: setattr(m.config, "flag", True)
FILL = lambda t: (lambda m: t(m).fill_(-1), lambda m: t(m).fill_(1))  # noqa: E731
READS = {
    "a global": (lambda m, x: on(m, x) if FLAG else off(m, x), GLOBAL),
    "a global of a helper": (lambda m, x: on(m, x) if asks() else off(m, x), GLOBAL),
    "a helper": (lambda m, x: helper(m, x), (lambda m: set_global("helper", off), lambda m: set_global("helper", on))),
    "a closure": (lambda m, x: on(m, x) if GET() else off(m, x), (lambda m: PUT(False), lambda m: PUT(True))),
    "a dict": (lambda m, x: on(m, x) if CONFIG["relu"] else off(m, x), RELU),
    "a dict, get": (lambda m, x: on(m, x) if CONFIG.get("relu") else off(m, x), RELU),
    "a dict, items": (lambda m, x: on(m, x) * len([k for k, v in CONFIG.items() if v is True]), RELU),
    "a proxy of a dict": (lambda m, x: on(m, x) if types.MappingProxyType(CONFIG)["relu"] else off(m, x), RELU),
    "a dict in a dict": (
        lambda m, x: on(m, x) * CONFIG["sub"]["scale"],
        (lambda m: CONFIG["sub"].update(scale=3.0), lambda m: CONFIG["sub"].update(scale=2.0)),
    ),
    "a list": (
        lambda m, x: on(m, x) * CONFIG["list"][0],
        (lambda m: CONFIG["list"].insert(0, 7), lambda m: CONFIG["list"].pop(0)),
    ),
    "a table that makes what it gives": (
        lambda m, x: MADE["activation"](m.a(x)),
        (lambda m: MADE.update(activation=nn.Tanh), lambda m: MADE.update(activation=nn.ReLU)),
    ),
    "a namespace": (lambda m, x: on(m, x) if NAMES.flag else off(m, x), put(NAMES, "flag", False, True)),
    "a namespace's": (lambda m, x: on(m, x) * NAMES.deep.n, put(NAMES.deep, "n", 5, 3)),
    "its config": (lambda m, x: on(m, x) if m.config.flag else off(m, x), OWN_CONFIG),
    "its config's mode": (
        lambda m, x: on(m, x) if m.config.mode is Mode.A else off(m, x),
        (lambda m: setattr(m.config, "mode", Mode.B), lambda m: setattr(m.config, "mode", Mode.A)),
    ),
    "its config by another name": (lambda m, x: (lambda c: on(m, x) if c.flag else off(m, x))(m.config), OWN_CONFIG),
    "its config, getattr": (lambda m, x: on(m, x) if getattr(m.config, "flag") else off(m, x), OWN_CONFIG),  # noqa: B009
    "its config, ==": (lambda m, x: on(m, x) if m.config == Config() else off(m, x), OWN_CONFIG),
    "its config, vars": (lambda m, x: on(m, x) if vars(m.config)["flag"] else off(m, x), OWN_CONFIG),
    "slots": (lambda m, x: on(m, x) if SLOTS.flag else off(m, x), put(SLOTS, "flag", False, True)),
    "a class": (lambda m, x: on(m, x) if Shared.flag else off(m, x), put(Shared, "flag", False, True)),
    "its class": (lambda m, x: on(m, x) if m.flag else off(m, x), put(Net, "flag", False, True)),
    "a property": (lambda m, x: on(m, x) if HIDDEN.flag else off(m, x), put(HIDDEN, "value", False, True)),
    "a function's attribute": (lambda m, x: on(m, x) if asks.flag else off(m, x), put(asks, "flag", False, True)),
    "a module": (lambda m, x: on(m, x) if MODULE.FLAG else off(m, x), put(MODULE, "FLAG", False, True)),
    "the defaults of a helper": (
        lambda m, x: scaled(on(m, x)),
        (lambda m: scaled.__defaults__[0].insert(0, 7.0), lambda m: scaled.__defaults__[0].pop(0)),
    ),
    "a partial": (
        lambda m, x: PARTIAL(on(m, x)),
        (lambda m: PARTIAL.args[0].insert(0, 7.0), lambda m: PARTIAL.args[0].pop(0)),
    ),
    "the environment": (
        lambda m, x: on(m, x) if os.environ.get("FASTOPS_OF_A_TEST") else off(m, x),
        (
            lambda m: os.environ.update(FASTOPS_OF_A_TEST="1"),
            lambda m: os.environ.pop("FASTOPS_OF_A_TEST", None),
        ),
    ),
    "a context": (lambda m, x: on(m, x) * CONTEXT.get(), (lambda m: CONTEXT.set(3.0), lambda m: CONTEXT.set(2.0))),
    "the precision": (
        lambda m, x: on(m, x) if torch.get_float32_matmul_precision() == "highest" else off(m, x),
        (
            lambda m: torch.set_float32_matmul_precision("high"),
            lambda m: torch.set_float32_matmul_precision("highest"),
        ),
    ),
    "its list": (lambda m, x: on(m, x) * sum(m.list), (lambda m: m.list.append(4), lambda m: m.list.pop())),
    "its dict": (
        lambda m, x: on(m, x) * m.dict["a"]["b"],
        (lambda m: m.dict["a"].update(b=9), lambda m: m.dict["a"].update(b=1)),
    ),
    "its set": (
        lambda m, x: on(m, x) if "a" in m.set else off(m, x),
        (lambda m: m.set.remove("a"), lambda m: m.set.add("a")),
    ),
    "a child's attribute": (
        lambda m, x: on(m, x) * m.c.in_features,
        (lambda m: setattr(m.c, "in_features", 7), lambda m: setattr(m.c, "in_features", 4)),
    ),
    "no buffer": (
        lambda m, x: on(m, x) if m.buffer is None else off(m, x) * m.buffer,
        put_own("buffer", torch.full((4,), 2.0), None),
    ),
    "no parameter": (
        lambda m, x: on(m, x) if m.parameter is None else off(m, x) * m.parameter,
        put_own("parameter", nn.Parameter(torch.full((4,), 2.0)), None),
    ),
    "no child": (lambda m, x: on(m, x) if m.child is None else m.child(x), put_own("child", CHILD, None)),
    "a tensor's values": (lambda m, x: on(m, x) if m.tensor.sum() > 0 else off(m, x), FILL(lambda m: m.tensor)),
    "of a list": (lambda m, x: on(m, x) if m.tensors[0].item() > 0 else off(m, x), FILL(lambda m: m.tensors[0])),
    "a parameter's dtype": (
        lambda m, x: m.a(x.to(next(m.parameters()).dtype)).float(),
        (lambda m: m.bfloat16(), lambda m: m.float()),
    ),
    "whether gradients are recorded": (
        lambda m, x: on(m, x) if torch.is_grad_enabled() else off(m, x),
        (lambda m: torch.set_grad_enabled(False), lambda m: torch.set_grad_enabled(True)),
    ),
}


@pytest.mark.parametrize("what", READS)
def test_what_a_forward_reads_may_change(what):
    forward, (change, back) = READS[what]
    for wrap in (lambda net: net, nn.Sequential):
        plain = wrap(Net(forward))
        fused = fastops.fuse(copy.deepcopy(plain))
        nets = [next(one for one in model.modules() if isinstance(one, Net)) for model in (plain, fused)]
        assert same(fused(X), plain(X))
        try:
            for net in nets:
                change(net)
            assert same(fused(X), plain(X))
        finally:
            for net in nets:
                back(net)
        assert same(fused(X), plain(X))


@pytest.mark.parametrize("what", ["a global", "its config", "its config's mode", "its class", "its list", "no buffer"])
def test_what_can_be_watched_is_traced(what):
    assert fastops.fuse(Net(READS[what][0])).fastops_report.untraced == []


def test_torch_compile_sees_what_changes():
    plain = Net(READS["a global"][0])
    compiled = torch.compile(fastops.fuse(plain), backend="eager")
    assert same(compiled(X), plain(X))
    try:
        set_global("FLAG", False)
        assert same(compiled(X), plain(X))
    finally:
        set_global("FLAG", True)


# ---- what a forward asks of its inputs -------------------------------------------------------------------------------


class Dictionary(collections.OrderedDict):
    pass


Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Output:
    a: object = None
    b: object = None


@functools.lru_cache
def cached(shape):
    return len(shape)


def catches(m, x):
    try:
        return on(m, x)
    except RuntimeError:
        return x * 2


def catches_all(m, x):
    try:
        return on(m, x)
    except:  # noqa: E722
        return x * 2


def suppresses(m, x):
    y = x
    with contextlib.suppress(RuntimeError):
        y = on(m, x)
    return y


def marks(m, x):
    y = m.a(x)
    y.mark = 1
    return torch.relu(y) * y.mark


def matches(m, x):
    match x:
        case torch.Tensor():
            return on(m, x)
        case [a, _]:
            return off(m, a)
        case {"a": a}:
            return on(m, a)


TWO = torch.randn(3, 4), torch.randn(3, 4)


class Counts:
    """An input whose methods change what its attributes are, as those of a cache of keys and values do."""

    def __init__(self, a):
        self.a, self.n = a, 0

    def set(self, n):
        self.n = n


def reads_a_shape(m, x):
    y = m.a(x)
    before = y.shape
    y.unsqueeze_(1)
    return torch.relu(y).view(before)


def reads_a_transpose(m, x):
    y = m.a(x)
    before = y.mT
    y.unsqueeze_(1)
    return torch.relu(before) + y.shape[1]


def reads_a_number(m, x):
    x.set(2)
    before = x.n
    x.set(7)
    return on(m, x.a) * before


ASKS = {
    "type is": lambda m, x: on(m, x) if type(x) is torch.Tensor else off(m, x),
    "type ==": lambda m, x: on(m, x) if type(x) == torch.Tensor else off(m, x),  # noqa: E721
    "type in": lambda m, x: on(m, x) if type(x) in (torch.Tensor, int) else off(m, x),
    "type in a helper": lambda m, x: on(m, x) if (lambda t: type(t) is torch.Tensor)(x) else off(m, x),
    "dtype is": lambda m, x: on(m, x) if x.dtype is torch.float32 else off(m, x),
    "dtype ==": lambda m, x: on(m, x) if x.dtype == torch.float32 else off(m, x),
    "dtype as a key": lambda m, x: on(m, x) if {torch.float32: 1}.get(x.dtype) else off(m, x),
    "dtype as text": lambda m, x: on(m, x) if "float32" in str(x.dtype) else off(m, x),
    "shape as text": lambda m, x: {"3": on}.get(f"{x.shape[0]}", off)(m, x),
    "is": lambda m, x: on(m, x) if (x if m.training else m.c) is X else off(m, x),
    "is True": lambda m, x: on(m, X) if x is True else off(m, X),
    "id": lambda m, x: on(m, x) if id(x) == id(X) else off(m, x),
    "hasattr": lambda m, x: on(m, x) if hasattr(x, "foo") else off(m, x),
    "getattr": lambda m, x: on(m, x) if getattr(x, "foo", None) is None else off(m, x),
    "callable": lambda m, x: on(m, x) if callable(x) else off(m, x),
    "isinstance of a shape": lambda m, x: on(m, x) if isinstance(x.shape, torch.Size) else off(m, x),
    "isinstance of a size": lambda m, x: on(m, x) if isinstance(x.shape[0], int) else off(m, x),
    "match": matches,
    "dir": lambda m, x: on(m, x) if "shape" in dir(x) else off(m, x),
    "vars": lambda m, x: on(m, x) if vars(x) else off(m, x),
    "a cache": lambda m, x: on(m, x) * cached(x.shape),
    "a set": lambda m, x: on(m, x) if len({x, x.shape}) == 2 else off(m, x),
    "catches": catches,
    "catches all": catches_all,
    "suppresses": suppresses,
    "marks": marks,
    "like a tensor": lambda m, x: on(m, X) if torch.overrides.is_tensor_like(x) else off(m, X),
    "None in a tuple": lambda m, x: on(m, x[0]) if x[1] is not None else off(m, x[0]),
    "None in a tuple, as an argument": lambda m, x: (lambda a, b: on(m, a) if b is None else off(m, a))(x[0], x[1]),
    "None in a dict": lambda m, x: on(m, x["a"]) if x["m"] is None else off(m, x["a"]),
    "None by get": lambda m, x: on(m, x["a"]) if x.get("m") is None else off(m, x["a"]),
    "in a dict": lambda m, x: on(m, x["a"]) if "m" in x else off(m, x["a"]),
    "None as an attribute": lambda m, x: on(m, x.a) if x.m is None else off(m, x.a),
    "gives an OrderedDict": lambda m, x: collections.OrderedDict(a=on(m, x)),
    "gives a subclass": lambda m, x: Dictionary(a=on(m, x)),
    "gives a namedtuple": lambda m, x: Pair(on(m, x), off(m, x)),
    "gives a dataclass": lambda m, x: Output(on(m, x), [off(m, x)]),
    "gives it in a list": lambda m, x: [Pair(on(m, x), None), {"q": Pair(1, 2)}],
    "gives a defaultdict": lambda m, x: collections.defaultdict(list, a=on(m, x)),
    "gives a dict": lambda m, x: {"a": on(m, x), "b": (off(m, x), None, 3)},
    "gives a shape": lambda m, x: (on(m, x), x.shape, x.dtype, torch.Size([1])),
    "a shape before it changes": reads_a_shape,
    "a transpose before a dimension is added": reads_a_transpose,
    "a number before it changes": reads_a_number,
}
OTHER_INPUTS = {
    "a number before it changes": [Counts(X)],
    "match": [X, TWO, {"a": X}],
    "is True": [True, False],
    "like a tensor": [X, 3],
    "None in a tuple": [TWO, (X, None)],
    "None in a tuple, as an argument": [TWO, (X, None)],
    "None in a dict": [{"a": X, "m": None}, {"a": X, "m": 1}],
    "None by get": [{"a": X, "m": 1}, {"a": X}],
    "in a dict": [{"a": X, "m": 1}, {"a": X}],
    "None as an attribute": [types.SimpleNamespace(a=X, m=None), types.SimpleNamespace(a=X, m=3)],
    **{what: [X, torch.randn(3, 5)] for what in ("catches", "catches all", "suppresses")},
}


@pytest.mark.parametrize("what", ASKS)
def test_what_a_forward_asks_of_its_inputs(what):
    for wrap in (lambda net: net, nn.Sequential):
        plain = wrap(Net(ASKS[what])).eval()
        for way in (fastops.fuse, fastops.freeze):
            changed = way(plain)
            for x in OTHER_INPUTS.get(what, [X]):
                with torch.no_grad():
                    assert same(changed(x), plain(x))


GIVEN = {"mT": lambda y: y.mT, "shape": lambda y: y.shape, "values": lambda y: y.topk(1).values}


@pytest.mark.parametrize("name", GIVEN)
def test_an_attribute_is_given_to_a_child_that_is_not_traced(name):
    """What the child was traced to is taken back, and not what it was given."""

    class Child(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(1 if name == "values" else 3, 3)

        def forward(self, given):
            if name == "shape":
                return self.fc(torch.ones(given[1])) if given[0] > 1 else 0
            return self.fc(given) if given.sum() > 0 else self.fc(given) * 2

    class Parent(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.child, self.given = nn.Linear(4, 3), Child(), GIVEN[name]

        def forward(self, x):
            y = torch.relu(self.fc(x))
            return self.child(self.given(y)) + y.sum()

    plain = Parent().eval()
    for way in (fastops.fuse, fastops.freeze):
        changed = way(plain)
        assert [row.name for row in changed.fastops_report.untraced] == ["child"]
        with torch.no_grad():
            for x in (torch.randn(3, 4), -torch.ones(3, 4)):
                torch.testing.assert_close(changed(x), plain(x))


# ---- what modules tell each other by attributes ----------------------------------------------------------------------


class Told(nn.Module):
    """A child that others tell something, or that tells others."""

    def __init__(self, tells=False):
        super().__init__()
        self.fc, self.other, self.tells = nn.Linear(4, 4), nn.Linear(4, 4), tells
        self.mode, self.aux, self.log, self.table = "a", 0.0, [], {"k": 0.0}

    def forward(self, x):
        y = self.fc(x) * (2 if self.mode == "a" else 3) + self.table["k"] + len(self.log)
        if self.tells:
            self.aux = float(y.detach().mean())
        return y


class Asks(nn.Module):
    """Is called as a module in every trace of another."""

    def __init__(self):
        super().__init__()
        self.told = Told()

    def forward(self, x):
        return self.told(x) if x.sum() < 1e9 else x


def puts_mode(m, x):
    m.c.mode = "b"
    y = m.c(x)
    m.c.mode = "a"
    return y - m.c(x)


def puts_mode_deep(m, x):
    m.asks.told.mode = "b"
    y = m.asks(x)
    m.asks.told.mode = "a"
    return y - m.asks(x)


def puts_into_all(m, x):
    for one in m.modules():
        if hasattr(one, "mode"):
            one.mode = "b"
    return m.c(x) + m.asks(x)


def puts_by_apply(m, x):
    m.apply(lambda one: setattr(one, "mode", "b"))
    return m.c(x)


def puts_into_a_dict(m, x):
    m.c.table["k"] = x.mean()
    y = m.c(x)
    m.c.table["k"] = 0.0
    return y


def puts_into_a_list(m, x):
    m.c.log.append(1)
    y = m.c(x)
    m.c.log.pop()
    return y


def puts_a_child(m, x):
    before, m.c.fc = m.c.fc, m.c.other
    y = m.c(x)
    m.c.fc = before
    return y


def puts_another_child(m, x):
    before, m.c.fc = m.c.fc, nn.Identity()
    y = m.c(x)
    m.c.fc = before
    return y


def puts_a_layers_option(m, x):
    m.drop.train(m.drop.p == 0)
    m.drop.p = 1.0
    y = m.drop.train()(m.c(x))
    m.drop.eval().p = 0.5
    return y


def hooks_a_child(m, x):
    handle = m.c.register_forward_hook(lambda module, args, output: output * 2)
    y = m.c(x)
    handle.remove()
    return y


def hooks_what_is_in_a_child(m, x):
    seen = []
    handle = m.c.fc.register_forward_hook(lambda module, args, output: seen.append(output))
    y = m.c(x)
    handle.remove()
    return y + seen[0]


def reads_what_a_child_puts(m, x):
    y = m.tells(x)
    return y + m.tells.aux


def reads_what_a_hook_puts(m, x):
    y = m.hooked(x)
    return y + (0.0 if m.seen is None else m.seen)


def a_child_reads_what_another_puts(m, x):
    y = m.tells(x)
    return y + m.reads(x)


class ReadsAux(nn.Module):
    def __init__(self, of):
        super().__init__()
        self.fc, self.of = nn.Linear(4, 4), [of]

    def forward(self, x):
        return self.fc(x) * (1.0 + self.of[0].aux)


class Talks(nn.Module):
    def __init__(self, call, decides):
        super().__init__()
        self.c, self.asks, self.tells, self.drop = Told(), Asks(), Told(True), nn.Dropout()
        self.hooked, self.out, self.seen = nn.Linear(4, 4), nn.Linear(4, 3), None
        self.reads, self.call, self.decides = ReadsAux(self.tells), call, decides
        self.hooked.register_forward_hook(self.see)

    def see(self, module, args, output):
        self.seen = float(output.detach().mean())

    def forward(self, x):
        if self.decides and x.sum() > 1e9:
            return x
        return self.out(torch.relu(self.call(self, x)))


TALKS = [
    puts_mode, puts_mode_deep, puts_into_all, puts_by_apply, puts_into_a_dict, puts_into_a_list, puts_a_child,
    puts_another_child, puts_a_layers_option, hooks_a_child, hooks_what_is_in_a_child, reads_what_a_child_puts,
    reads_what_a_hook_puts,
]  # fmt: skip


@pytest.mark.parametrize("decides", [False, True])
@pytest.mark.parametrize("call", [*TALKS, a_child_reads_what_another_puts])
def test_what_modules_tell_each_other(call, decides):
    """At every call: a trace, or a frozen child, would go on with what there was when it was made."""
    for way in (fastops.fuse, fastops.freeze):
        if call is a_child_reads_what_another_puts and way is fastops.freeze:
            continue  # its copies of the two know nothing of each other
        torch.manual_seed(1)
        plain = Talks(call, decides).eval()
        changed = way(copy.deepcopy(plain))
        for factor in (1, 2, 3):
            with torch.no_grad():
                torch.testing.assert_close(changed(factor * X), plain(factor * X))


def test_what_is_told_to_nobody_stays_traced():
    """A child that changes what is read by no other."""
    fused = fastops.fuse(Talks(lambda m, x: m.tells(x), False))
    assert "" not in [row.name for row in fused.fastops_report.untraced]
    assert "tells" in [row.name for row in fused.fastops_report.untraced]


def unpacks(m, x):
    a, b = x
    return on(m, a) + b


def unpacks_shape(m, x):
    rows, columns = x.shape
    return on(m, x).reshape(columns, rows)


UNPACKS = {
    "of an input": (unpacks, [TWO, (X, X, X), [X], torch.randn(2, 3, 4), torch.randn(3, 3, 4)]),
    "of a shape": (unpacks_shape, [X, torch.randn(2, 3, 4), torch.randn(4)]),
    "of chunks": (lambda m, x: (lambda a, b: on(m, a) + b)(*unpacked(x.chunk(2))), [torch.randn(4, 4), X[:1]]),
}


def unpacked(x):
    a, b = x
    return a, b


@pytest.mark.parametrize("what", UNPACKS)
def test_names_for_elements(what):
    """a, b = x: as many as there are, or an error."""
    forward, inputs = UNPACKS[what]
    for wrap in (lambda net: net, nn.Sequential):
        plain = wrap(Net(forward)).eval()
        fused = fastops.fuse(plain)
        assert fused.fastops_report.untraced == []
        for changed in (fused, fastops.freeze(plain), torch.compile(fused, backend="eager")):
            for x in inputs:
                with torch.no_grad():
                    try:
                        expected = plain(x)
                    except ValueError as error:
                        # Dynamo has errors of its own.
                        kinds = ValueError, RuntimeError, torch._dynamo.exc.TorchDynamoException
                        with pytest.raises(kinds, match=re.escape(str(error)) if changed is fused else ""):
                            changed(x)
                    else:
                        assert same(changed(x), expected)
    traced = torch.fx.symbolic_trace(nn.Sequential(fastops.fuse(Net(forward))))  # somebody else's trace
    assert traced(inputs[0]).shape == Net(forward)(inputs[0]).shape


GRADIENTS = {
    "of an input": lambda m, x: on(m, x) if x.grad is None else off(m, x),
    "of a parameter": lambda m, x: on(m, x) if m.a.weight.grad is None else off(m, x),
    "how it was made": lambda m, x: on(m, x) if x.grad_fn is None else off(m, x),
}


@pytest.mark.parametrize("what", GRADIENTS)
def test_whether_there_is_a_gradient(what):
    plain = Net(GRADIENTS[what])
    fused = fastops.fuse(plain)
    x = X.clone().requires_grad_()
    for given in (X, x, x * 1):
        y = fused(given)
        assert same(y, plain(given))
        y.sum().backward()


# ---- what a forward asks of its children ----


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.layer(x))

    def is_plain(self):
        return type(self.layer) is nn.Linear


def is_linear(layer):
    return isinstance(layer, nn.Linear)


def all_linear(m):
    return all(isinstance(one, (nn.Linear, nn.ReLU)) for one in m.children())


def has_class_of_linear(layer):
    return layer.__class__ is nn.Linear


def has_name_of_linear(*layers):
    return layers[0].__class__.__name__ == "Linear"


KINDS = nn.Linear, nn.Conv2d
CHILDREN = {
    "__class__ in a helper": lambda m, x: has_class_of_linear(m.a),
    "a name in a helper": lambda m, x: has_name_of_linear(m.a),
    "isinstance": lambda m, x: isinstance(m.a, nn.Linear),
    "isinstance of several": lambda m, x: isinstance(m.a, KINDS),
    "isinstance in a helper": lambda m, x: is_linear(m.a),
    "isinstance in a loop": lambda m, x: all_linear(m),
    "isinstance of a block": lambda m, x: isinstance(m.block, Block) and isinstance(m.block.layer, nn.Linear),
    "issubclass": lambda m, x: issubclass(m.a.__class__, nn.Linear),
    "type is": lambda m, x: type(m.a) is nn.Linear,
    "type ==": lambda m, x: type(m.a) == nn.Linear,  # noqa: E721
    "type in": lambda m, x: type(m.a) in (nn.Linear, nn.Conv2d),
    "type's name": lambda m, x: type(m.a).__name__ == "Linear",
    "__class__": lambda m, x: m.a.__class__ is nn.Linear,
    "type of a block": lambda m, x: type(m.block) is Block,
    "type in a method of a child": lambda m, x: m.block.is_plain(),
    "its own type": lambda m, x: type(m).__name__ == "Net",
    "match": lambda m, x: matches_linear(m.a),
    "parameters": lambda m, x: sum(one.numel() for one in m.parameters()) == 4 * 20,
    "a parameter's dtype": lambda m, x: next(m.parameters()).dtype == torch.float32,
    "state_dict": lambda m, x: "a.weight" in m.state_dict(),
}


def matches_linear(layer):
    match layer:
        case nn.Linear():
            return True
    return False


def asks_of_children(question, traced):
    def forward(m, x):
        if not traced and x.sum() > 1e9:
            return x
        return on(m, x) if question(m, x) else off(m, x)

    net = Net(forward)
    net.question = question  # found like a method
    net.block = Block()
    return net.eval()


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize("what", CHILDREN)
def test_what_a_forward_asks_of_its_children(what, traced):
    for wrap in (lambda net: net, nn.Sequential, lambda net: nn.Sequential(nn.Sequential(net), nn.ReLU())):
        plain = wrap(asks_of_children(CHILDREN[what], traced))
        with torch.no_grad():
            for way in (fastops.fuse, fastops.freeze, lambda one: fastops.freeze(fastops.fuse(one))):
                assert same(way(plain)(X), plain(X))


def test_a_function_that_gc_freeze_hides_is_not_traced():
    """Nobody could tell that its variables have changed, or take back what it does to them: it does not even run."""
    (get, put), (count, set_count) = variable(), variable()
    plain = Net(lambda m, x: (set_count(count() + 1), on(m, x) if get() else off(m, x))[1]).eval()
    parent = nn.Sequential(plain, nn.Linear(4, 4), nn.ReLU())
    assert "gc.freeze" not in str(fastops.fuse(plain).fastops_report)
    gc.freeze()
    before = count()
    fused = fastops.fuse(parent)
    assert count() == before
    assert [(row.name, "gc.freeze()" in row.result) for row in fused.fastops_report.untraced] == [("0", True)]
    assert len(fused.fastops_report.fused) == 1
    for value in (True, False):
        put(value)
        assert same(fused(X), parent(X))


def test_other_questions_leave_children_frozen():
    def forward(m, x):
        if x.sum() > 1e9 or not isinstance(x, torch.Tensor) or not isinstance(m.a, nn.Module):
            return x
        return on(m, x) if type(x) is torch.Tensor and not isinstance(3, (int, str)) else off(m, x)

    plain = Net(forward).eval()
    report = fastops.freeze(plain).fastops_report
    assert [row.name for row in report.frozen] == ["a", "b", "c"]
    assert len(fastops.fuse(plain).fastops_report.replaced) == 3


def named(function):
    @functools.wraps(function)
    def inner(*arguments):
        name = f"{arguments[0].__class__.__name__}.forward"
        if len(arguments) != 2:
            raise TypeError(f"{name} takes one argument")
        return function(*arguments)

    return inner


class Names(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    @named
    def forward(self, x):
        if x.dim() != 2:
            raise ValueError(f"{self.a.__class__.__name__} takes matrices, got {x.dim()} dimensions")
        return torch.relu(self.a(x)) if x.sum() > 0 else self.b(x)


def test_names_of_classes_in_messages():
    """As in a decorator of Hugging Face's for arguments that have been renamed."""
    plain = Names()
    assert len(fastops.fuse(plain).fastops_report.replaced) == 2
    assert len(fastops.freeze(plain).fastops_report.frozen) == 2


def test_modules_that_stay_are_told():
    plain = asks_of_children(CHILDREN["type is"], False)
    frozen, fused = fastops.freeze(plain), fastops.fuse(plain)
    assert [row.name for row in frozen.fastops_report.left] == ["a", "b", "c", "block"]
    assert "asks for the exact class of a module" in str(frozen.fastops_report)
    assert type(fused.a) is nn.Linear
    assert "the forward of test_forwards.Net asks for its class" in str(fused.fastops_report)


# ---- what a forward does besides -------------------------------------------------------------------------------------

DOES = {
    "an attribute": (lambda m, x: (HIDDEN.tick(), on(m, x))[1], lambda m: HIDDEN.calls),
    "a list": (lambda m, x: (LOG.append(x), on(m, x))[1], lambda m: len(LOG)),
    "a list's item": (lambda m, x: (CELL.__setitem__(0, CELL[0] + 1), on(m, x))[1], lambda m: CELL[0]),
    "a global": (lambda m, x: (tick(), on(m, x))[1], lambda m: TIMES),
    "a set": (lambda m, x: (SEEN.add(len(SEEN)), on(m, x))[1], lambda m: len(SEEN)),
    "a closure": (lambda m, x: (PUT(GET() + 1), on(m, x))[1], lambda m: GET()),
    "a class": (lambda m, x: (setattr(Shared, "count", Shared.count + 1), on(m, x))[1], lambda m: Shared.count),
    "a key": (
        lambda m, x: (CONFIG.update(new=CONFIG.get("new", 0) + 1), on(m, x))[1],
        lambda m: CONFIG.get("new", 0),
    ),
    "a table that makes what it gives": (
        lambda m, x: (MADE.update({len(MADE): nn.Tanh}), on(m, x))[1],
        lambda m: len(MADE),
    ),
    "its config": (
        lambda m, x: (setattr(m.config, "calls", m.config.calls + 1), on(m, x))[1],
        lambda m: m.config.calls,
    ),
    "a dict of its dict": (
        lambda m, x: (m.dict["a"].update(n=m.dict["a"].get("n", 0) + 1), on(m, x))[1],
        lambda m: m.dict["a"].get("n", 0),
    ),
    "a child": (
        lambda m, x: (setattr(m.c, "n", getattr(m.c, "n", 0) + 1), on(m, x))[1],
        lambda m: getattr(m.c, "n", 0),
    ),
}


@pytest.mark.parametrize("what", DOES)
def test_what_a_forward_changes(what):
    forward, count = DOES[what]
    for wrap in (lambda net: net, nn.Sequential):
        plain = wrap(Net(forward))
        before = count(next(one for one in plain.modules() if isinstance(one, Net)))
        fused = fastops.fuse(plain)
        net = next(one for one in fused.modules() if isinstance(one, Net))
        assert count(net) == before
        for _ in range(3):
            fused(X)
        assert count(net) == before + 3


def test_what_goes_on():
    """An iterator, and what is written."""
    for forward in (lambda m, x: on(m, x) * next(COUNT), lambda m, x: (print(end=""), on(m, x))[1]):
        assert len(fastops.fuse(Net(forward)).fastops_report.untraced) == 1


def decorated(function):
    @functools.wraps(function)
    def inner(*arguments):
        with torch.enable_grad():
            return function(*arguments)

    return inner


BLOCKS = {
    "no_grad": lambda m, x: torch.no_grad()(on)(m, x),
    "enable_grad": decorated(on),
    "set_grad_enabled": lambda m, x: (torch.set_grad_enabled(torch.is_grad_enabled()), on(m, x))[1],
    "autocast": lambda m, x: torch.autocast("cpu", enabled=False)(on)(m, x),
    "inference_mode": lambda m, x: torch.inference_mode(False)(on)(m, x),
    "is_autocast_enabled": lambda m, x: off(m, x) if torch.is_autocast_enabled() else on(m, x),
    "is_inference_mode_enabled": lambda m, x: off(m, x) if torch.is_inference_mode_enabled() else on(m, x),
    "get_default_dtype": lambda m, x: on(m, x).to(torch.get_default_dtype()),
    "checkpoint": lambda m, x: torch.utils.checkpoint.checkpoint(m.a, x, use_reentrant=False),
}


@pytest.mark.parametrize("what", BLOCKS)
def test_modes(what):
    """Also where they are what they were during the trace."""
    plain = Net(BLOCKS[what])
    fused = fastops.fuse(plain)
    assert len(fused.fastops_report.untraced) == 1
    for state in (contextlib.nullcontext, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)):
        with state():
            a, b = fused(X), plain(X)
            assert a.dtype == b.dtype
            assert a.requires_grad == b.requires_grad
            torch.testing.assert_close(a, b)


def local_state(m, x):
    results = []
    count = 0

    def add(to, y):
        nonlocal count
        count += 1
        to.append(y)
        return y

    for layer in (m.a, m.b):
        x = torch.relu(add(results, layer(x)))
    return torch.cat(results) * count


def test_what_is_harmless_is_traced():
    def yields(m, x):
        yield from (m.a, m.b)

    def goes_through(m, x):
        for layer in yields(m, x):
            x = torch.relu(layer(x))
        torch._assert(x.shape[1] == 4, f"got {x.shape[1]}")
        return x

    for forward in (local_state, goes_through, lambda m, x: on(m, x) if m.config.mode is Mode.A else type(m)):
        plain = Net(forward)
        fused = fastops.fuse(plain)
        assert fused.fastops_report.untraced == []
        assert same(fused(X), plain(X))


# ---- arguments, copies -----------------------------------------------------------------------------------------------


def test_any_names_of_arguments():
    names = (
        "program", "unchanged", "is_compiling", "again", "plain", "fastops_graph", "fastops_general", "choose", "match",
        "fastops_program_1", "fastops_default_0", "fastops_0_relu", "fastops_self_0", "fastops_graph_0", "input",
        "self",
    )  # fmt: skip
    heads = "this, {}", "this, x, {}=3", "this, x, *, {}", "this, {}, /", "this, *{}"
    for name in names:
        for head in [head.format(name) for head in heads]:
            space = {"torch": torch}
            x = name if "x" not in head else "x"
            x = f"{name}[0]" if "*" + name in head else x
            rest = f" * {name}" if "x" in head else ""
            exec(f"def forward({head}): return torch.relu(this.a({x})){rest}", space)
            cls = type("Named", (nn.Module,), {"forward": space["forward"]})
            plain = cls()
            plain.a = nn.Linear(4, 4)
            calls = [((X,), {})]
            if name != "self" and "=3" in head:  # nn.Module.__call__ has a self of its own
                calls += [((X,), {name: 5}), ((X, 7), {})]
            elif "*, " in head:
                calls = [((X,), {name: 2})] if name != "self" else []
            for changed in (fastops.fuse(plain), fastops.freeze(plain)):
                for arguments, named in calls:
                    with torch.no_grad():
                        torch.testing.assert_close(changed(*arguments, **named), plain(*arguments, **named))


def test_forwards_that_are_no_methods():
    class Static(nn.Module):
        forward = staticmethod(lambda x: torch.relu(x))

    class Several(nn.Module):
        def forward(*arguments):
            return torch.relu(arguments[1])

    for plain in (Static(), Several()):
        for way in (fastops.fuse, fastops.freeze):
            assert torch.equal(way(plain)(X), torch.relu(X))


def test_all_tensors_are_shared():
    plain = Net(on)
    plain.more = {"a": [torch.ones(2), (torch.ones(3),)], "b": types.SimpleNamespace(c=torch.ones(4))}
    fused = fastops.fuse(plain)
    assert fused.tensors[0] is plain.tensors[0]
    assert fused.tensors is not plain.tensors
    assert fused.more["a"][0] is plain.more["a"][0]
    assert fused.more["a"][1][0] is plain.more["a"][1][0]
    assert fused.more["b"].c is plain.more["b"].c
    assert fused.more["b"] is not plain.more["b"]


collections_seen = 0


def count_collections(phase, info):
    global collections_seen
    collections_seen += 1


def test_garbage_collections_are_not_the_forwards_doing():
    before = gc.get_threshold()
    gc.callbacks.append(count_collections)
    gc.set_threshold(1)
    try:
        fused = fastops.fuse(nn.Sequential(nn.Linear(3, 4), nn.ReLU()))
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(count_collections)
    assert collections_seen
    assert gc.isenabled()
    assert not fused.fastops_report.untraced


def test_a_scripted_parent_keeps_its_fused_child():
    def halved(x):
        return torch.relu(x) / 2

    class Scripted(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, k: int = 2):
            return self.b(halved(self.a(x))) * k

    class Parent(nn.Module):
        def __init__(self, child):
            super().__init__()
            self.child = child

        def forward(self, x):
            return torch.relu(self.child(x))

    for plain in (Scripted(), nn.Sequential(Scripted(), nn.Sequential(Scripted()))):
        parent = Parent(fastops.fuse(plain))
        before = [(id(one), type(one)) for one in parent.modules()]
        scripted = torch.jit.script(parent)
        assert [(id(one), type(one)) for one in parent.modules()] == before
        assert same(scripted(X), torch.relu(plain(X)))
        assert same(parent(X), torch.relu(plain(X)))
        assert same(torch.jit.script(parent.child)(X), plain(X))


def test_deep_models_are_fused_in_linear_time():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)

        def forward(self, x):
            return x + self.b(torch.tanh(self.a(self.norm(x))))

    def seconds(count):
        model = nn.Sequential(*[Residual() for _ in range(count)])
        start = time.process_time()
        assert fastops.fuse(model).fastops_report.untraced == []
        return time.process_time() - start

    seconds(20)
    assert seconds(400) < 20 * seconds(40)


@pytest.mark.parametrize("outer", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_decorated_forwards_are_followed_in_no_mode(outer):
    """Also where the mode is the same already when the model is fused."""

    class Decorated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @outer()
        def forward(self, x):
            return self.layer(x).relu()

    for plain in (Decorated(), nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Decorated())):
        with outer():
            fused = fastops.fuse(plain)
        assert len(fused.fastops_report.untraced) == 1
        x = torch.randn(2, 4)
        for ours, theirs in ((fused(x), plain(x)), (fused(x.requires_grad_()), plain(x))):
            assert ours.dtype == theirs.dtype
            assert ours.requires_grad == theirs.requires_grad
            assert ours.is_inference() == theirs.is_inference()


def scaling(function):
    @functools.wraps(function)
    def inner(self, *arguments, scale=1.0, flag=True, **named):
        y = function(self, *arguments, **named) * scale
        return y if flag else -y

    return inner


def renaming(function):
    @functools.wraps(function)
    def inner(self, values, *arguments, **named):
        return function(self, values, *arguments, **named)

    return inner


def decorated():
    """Two classes, made after gc.freeze() as _variable is."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        @scaling
        def forward(self, x, shift=0.0, flag=False):
            return self.layer(x).relu() + shift

    class Renamed(Scaled):
        @renaming
        def forward(self, x, shift=0.0):
            return self.layer(x).relu() + shift

    return Scaled, Renamed


def test_decorators_with_other_names():
    plain, x = decorated()[1](), torch.randn(2, 4)
    with torch.no_grad():
        for one in (fastops.fuse(plain), fastops.freeze(plain)):
            assert one.fastops_report.untraced == []
            for arguments, named in (((x,), {}), ((), {"values": x}), ((x, 1.0), {}), ((x,), {"shift": 1.0})):
                torch.testing.assert_close(one(*arguments, **named), plain(*arguments, **named))


def test_decorators_with_arguments_of_their_own():
    plain, x = decorated()[0](), torch.randn(2, 4)
    fused, frozen = fastops.fuse(plain), fastops.freeze(plain)
    assert fused.fastops_report.untraced == frozen.fastops_report.untraced == []
    calls = ({}, {"scale": 2.0}, {"flag": True}, {"flag": False}, {"shift": 1.0}, {"shift": 1.0, "scale": 3.0})
    with torch.no_grad():
        for named in calls:
            for one in (fused, frozen):
                torch.testing.assert_close(one(x, **named), plain(x, **named))
        for one in (fused, frozen):
            torch.testing.assert_close(one(x, 2.0), plain(x, 2.0))
            with pytest.raises(TypeError):
                one(x, unknown=1)
    with fastops.record() as calls:
        fused(x)
    assert calls[0].op == "linear"
    assert len(calls) == 1


class Doubles(nn.Module):
    """A __call__ of its own."""

    def __init__(self, hook=False):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        if hook:
            self.register_forward_hook(lambda module, arguments, y: y + 1)

    def __call__(self, x):
        return super().__call__(x) * 2

    def forward(self, x):
        return self.layer(x).relu()


@pytest.mark.parametrize("hook", [False, True])
def test_a_call_of_its_own_runs_once(hook):
    plain, x = nn.Sequential(nn.Linear(4, 4), Doubles(hook)), torch.randn(2, 4)
    fused, frozen = fastops.fuse(plain), fastops.freeze(plain)
    assert bool(fused.fastops_report.untraced) == hook
    with torch.no_grad():
        torch.testing.assert_close(fused(x), plain(x))
        torch.testing.assert_close(frozen(x), plain(x))
