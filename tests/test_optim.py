"""fastops.optim against torch.optim: the same parameters, state and behaviour."""

import copy
import pickle
import random
import warnings

import pytest
import torch
from tiers import BEST, tiers
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

import fastops
from fastops.optim import SGD, Adam, AdamW, replace_, restore_

CLASSES = [SGD, Adam, AdamW]
HAS_FMA = BEST != "scalar"
# Around the vectors' widths and the lines at which threads meet.
SHAPES = [(), (1,), (5,), (10, 5), (3, 0), (17,), (63,), (64,), (65,), (2, 3, 4, 5), (129, 7), (70001,)]


def options_of(cls, rng):
    """Random arguments of a class."""
    if cls is SGD:
        momentum = rng.choice([0, 0, 0.9, 0.5])
        nesterov = momentum != 0 and rng.random() < 0.5
        return {
            "lr": rng.choice([0.1, 0.01, 1]),
            "momentum": momentum,
            "dampening": 0 if nesterov else rng.choice([0, 0.25]),
            "nesterov": nesterov,
            "weight_decay": rng.choice([0, 0.1, 1e-4]),
            "maximize": rng.random() < 0.3,
        }
    return {
        "lr": rng.choice([0.1, 1e-3]),
        "betas": rng.choice([(0.9, 0.999), (0.3, 0.5), (0.0, 0.9)]),
        "eps": rng.choice([1e-8, 1e-3]),
        "weight_decay": rng.choice([0, 0.1, 1e-4]),
        "amsgrad": rng.random() < 0.5,
        "maximize": rng.random() < 0.3,
    }


def parameters(shapes, dtype=torch.float32):
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def copies(params):
    return [nn.Parameter(p.detach().clone()) for p in params]


def set_gradients(*lists):
    for same in zip(*lists, strict=True):
        grad = torch.randn(same[0].shape).to(same[0].dtype)
        for p in same:
            p.grad = grad.clone()


def states(optimizer):
    return [
        {name: value for name, value in sorted(optimizer.state[p].items())} if p in optimizer.state else {}
        for group in optimizer.param_groups
        for p in group["params"]
    ]


def assert_same(ours, theirs, bits=HAS_FMA):
    """The parameters and the state of two optimizers: SGD's bits, where there is a fused multiply-add.

    Adam's differ by PyTorch's square root, which is MKL's and not always the nearest number.
    """
    single = any(p.dtype != torch.float64 for group in ours.param_groups for p in group["params"])
    check = {"rtol": 1e-5, "atol": 2e-6} if single else {"rtol": 1e-12, "atol": 1e-13}
    if bits and isinstance(ours, SGD):
        check = {"rtol": 0, "atol": 0}
    for group, other in zip(ours.param_groups, theirs.param_groups, strict=True):
        torch.testing.assert_close(group["params"], other["params"], equal_nan=True, **check)
    for mine, other in zip(states(ours), states(theirs), strict=True):
        assert mine.keys() == other.keys()
        torch.testing.assert_close(mine, other, equal_nan=True, **check)


def pair(cls, params, **options):
    """Ours, and PyTorch's on copies."""
    return cls(params, **options), cls._torch(copies(params), **options)


def both(ours, theirs):
    return ours.param_groups[0]["params"], theirs.param_groups[0]["params"]


def goes_to_torch(optimizer, monkeypatch):
    """Counts the calls of PyTorch's step."""
    calls = []
    step = type(optimizer)._torch_step

    def counted(self, *args):
        calls.append([len(group["params"]) for group in self.param_groups])
        return step(self, *args)

    monkeypatch.setattr(type(optimizer), "_torch_step", counted)
    return calls


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_random_options(cls, dtype):
    rng = random.Random(f"{cls.__name__}{dtype}")
    for _ in range(12):
        options = options_of(cls, rng)
        for tier in tiers(dtype):
            ours, theirs = pair(cls, parameters(SHAPES, dtype), **options)
            for _ in range(4):
                set_gradients(*both(ours, theirs))
                for optimizer in (ours, theirs):
                    optimizer.step()
            assert_same(ours, theirs, bits=tier != "scalar")


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_err_no_more_than_torch(cls, dtype):
    """One step from the same state, against float64; PyTorch rounds after every operation."""
    rng = random.Random(cls.__name__)
    for _ in range(6):
        options = {**options_of(cls, rng), "weight_decay": 0.1}
        if cls is not SGD:
            options["eps"] = 1e-3
        for _ in tiers(dtype):
            ours, theirs = pair(cls, parameters([(33,), (1000,)], dtype), **options)
            set_gradients(*both(ours, theirs))
            theirs.step()
            ours.step()
            ours.load_state_dict(theirs.state_dict())
            exact = cls._torch([nn.Parameter(p.detach().double()) for p in both(ours, theirs)[1]], **options)
            exact.load_state_dict(theirs.state_dict())
            with torch.no_grad():
                for mine, p in zip(*both(ours, theirs), strict=True):
                    mine.copy_(p)
            set_gradients(*both(ours, theirs))
            for p, q in zip(exact.param_groups[0]["params"], both(ours, theirs)[0], strict=True):
                p.grad = q.grad.double()
            for optimizer in (ours, theirs, exact):
                optimizer.step()
            eps = torch.finfo(dtype).eps
            for mine, other, p in zip(*both(ours, theirs), exact.param_groups[0]["params"], strict=True):
                error = (mine.double() - p).abs().max()
                assert error <= (other.double() - p).abs().max() * 1.01 + eps * p.abs().max()


@pytest.mark.parametrize("cls", CLASSES)
def test_threads_give_the_same_bits(cls):
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if cls is SGD else {})}
    optimizers = [cls(copies(params), **options) for params in [parameters([(70001,), (3,), (1,), (333, 101)])] * 3]
    for _ in range(3):
        set_gradients(*(o.param_groups[0]["params"] for o in optimizers))
        for threads, optimizer in enumerate(optimizers, 1):
            torch.set_num_threads(threads)
            optimizer.step()
    for other in optimizers[1:]:
        assert_same(optimizers[0], other, bits=True)


@pytest.mark.parametrize("cls", CLASSES)
def test_groups_and_mixed_dtypes(cls):
    rng = random.Random(cls.__name__)
    kinds = [torch.float32, torch.float64, torch.float32]
    params = [nn.Parameter(torch.randn(n, dtype=kinds[n % 3])) for n in range(1, 13)]
    other = copies(params)

    def groups(of):
        return [{"params": of[:4], "lr": 0.5}, {"params": of[4:8], "weight_decay": 0.5}, {"params": of[8:]}]

    options = options_of(cls, rng)
    ours, theirs = cls(groups(params), **options), cls._torch(groups(other), **options)
    for step in range(4):
        set_gradients(params, other)
        for optimizer, of in ((ours, params), (theirs, other)):
            of[5].grad = None  # no gradient: neither parameter nor state change
            if step == 0:
                of[2].grad = None  # a parameter may take its first step later
            optimizer.step()
    assert_same(ours, theirs)
    extra = parameters([(5,)])
    copied = copies(extra)
    ours.add_param_group({"params": extra, "lr": 0.25})
    theirs.add_param_group({"params": copied, "lr": 0.25})
    for _ in range(2):
        set_gradients(params + extra, other + copied)
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_the_second_step_is_ours(cls, monkeypatch):
    optimizer = cls(parameters([(5,), (6,)]), lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    calls = goes_to_torch(optimizer, monkeypatch)
    for _ in range(3):
        set_gradients(optimizer.param_groups[0]["params"])
        with fastops.record() as rows:
            optimizer.step()
    assert calls == [[2]]
    assert [row.op for row in rows] == ["sgd_step" if cls is SGD else "adam_step"]


LAYOUTS = {
    "expanded gradient": lambda p: setattr(p, "grad", torch.randn(p.shape[0], 1).expand(p.shape)),
    "transposed gradient": lambda p: setattr(p, "grad", torch.randn(p.shape[::-1]).t()),
    "gradient of a larger one": lambda p: setattr(p, "grad", torch.randn(2 * p.shape[0], p.shape[1])[::2]),
    "unaligned gradient": lambda p: setattr(p, "grad", torch.randn(p.numel() + 1)[1:].view(p.shape)),
}


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_gradients(cls, layout):
    ours, theirs = pair(cls, parameters([(33, 5), (4, 4)]), lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    for _ in range(3):
        for p, q in zip(*both(ours, theirs), strict=True):
            LAYOUTS[layout](p)
            q.grad = p.grad.detach()
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_layouts_of_parameters(cls, monkeypatch):
    """Transposed and channels_last ones are the kernel's; a slice of a larger tensor is PyTorch's."""
    base = [
        torch.randn(7, 5).t(),
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.randn(9, 6)[::2],
    ]
    params, other = ([nn.Parameter(p.clone() if i < 2 else p) for i, p in enumerate(base)] for _ in range(2))
    other[2] = nn.Parameter(base[2].clone())
    options = {"lr": 0.1, **({"momentum": 0.9} if cls is SGD else {})}
    ours, theirs = cls(params, **options), cls._torch(other, **options)
    for step in range(3):
        if step == 2:
            calls = goes_to_torch(ours, monkeypatch)
        for p, q in zip(params, other, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    assert calls == [[1]]
    for mine, them in zip(params, other, strict=True):
        torch.testing.assert_close(mine, them)


@pytest.mark.parametrize("cls", CLASSES)
def test_parameters_that_share_memory_are_updated_in_turn(cls):
    torch.set_num_threads(2)

    def make(cls):
        memory = torch.linspace(-1, 1, 50000)
        params = [nn.Parameter(memory[:40000]), nn.Parameter(memory[10000:])]
        return cls(params, lr=0.1, weight_decay=0.5, **({"momentum": 0.9} if issubclass(cls, SGD._torch) else {}))

    ours, theirs = make(cls), make(cls._torch)
    for _ in range(3):
        set_gradients(*both(ours, theirs))
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_state_dict_both_ways(cls):
    options = {"lr": 0.1, **({"momentum": 0.9} if cls is SGD else {"amsgrad": True})}
    ours, theirs = pair(cls, parameters([(5, 3), (7,)]), **options)
    for step in range(6):
        set_gradients(*both(ours, theirs))
        ours.step()
        theirs.step()
        saved = copy.deepcopy((ours.state_dict(), theirs.state_dict()))
        assert saved[0]["param_groups"] == saved[1]["param_groups"]
        if step % 2:
            ours.load_state_dict(saved[1])
            theirs.load_state_dict(saved[0])
    assert_same(ours, theirs)
    for state in ours.state.values():
        assert all(type(value) is torch.Tensor for value in state.values())


@pytest.mark.parametrize("cls", CLASSES)
def test_version_counters(cls):
    """Autograd notices the step: of parameters and of their state."""
    optimizer = cls(parameters([(4,)]), lr=0.1, **({"momentum": 0.9} if cls is SGD else {}))
    (p,) = optimizer.param_groups[0]["params"]
    for _ in range(2):
        set_gradients([p])
        optimizer.step()
    changed = [p, *optimizer.state[p].values()]
    before = [t._version for t in changed]
    loss = (p * p).sum()
    optimizer.step()
    assert all(t._version > version for t, version in zip(changed, before, strict=True))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("cls", CLASSES)
def test_schedulers_and_tensor_learning_rates(cls):
    for lr in (0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64), torch.tensor([0.1])):
        options = {"weight_decay": 0.1, **({"momentum": 0.9} if cls is SGD else {})}
        params = parameters([(5, 3)])
        ours = cls(params, lr=copy.deepcopy(lr), **options)
        theirs = cls._torch(copies(params), lr=copy.deepcopy(lr), **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.7) for o in (ours, theirs)]
            for _ in range(5):
                set_gradients(*both(ours, theirs))
                for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
                    optimizer.step()
                    schedule.step()
        assert_same(ours, theirs)


@pytest.mark.parametrize("cls", CLASSES)
def test_closures_and_hooks(cls):
    def run(cls, make_class):
        params = copies(start)
        optimizer = make_class(params, lr=0.1)
        seen = []
        optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append("before"))
        optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append("after"))
        handle = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append("all"))

        def closure():
            seen.append("closure")
            optimizer.zero_grad()
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        with torch.no_grad():
            losses = [float(optimizer.step(closure)) for _ in range(3)]
        optimizer.step()
        handle.remove()
        optimizer.step()
        return losses, seen, params

    start = parameters([(3, 2), (5,)])
    losses, seen, params = run(cls, cls)
    expected_losses, expected, others = run(cls, cls._torch)
    assert seen == expected
    assert losses == pytest.approx(expected_losses)
    torch.testing.assert_close(params, others)

    class Derived(cls):
        def step(self, closure=None):
            return super().step(closure)

    losses, seen, _ = run(cls, Derived)
    assert seen == expected
    assert losses == pytest.approx(expected_losses)


@pytest.mark.parametrize("cls", CLASSES)
def test_copies(cls):
    optimizer = cls(parameters([(3,)]), lr=0.1)
    for _ in range(2):
        set_gradients(optimizer.param_groups[0]["params"])
        optimizer.step()
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    first, *rest = (o.param_groups[0]["params"][0] for o in (optimizer, *others))
    before = first.detach().clone()
    for p, o in zip((first, *rest), (optimizer, *others), strict=True):
        assert type(o) is cls
        assert isinstance(o, cls._torch)
        p.grad = torch.ones(3)
        o.step()
        assert torch.equal(p, first)
        assert not torch.equal(p, before)


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_averages_that_have_decayed_are_zero(cls, dtype):
    """PyTorch's become denormal and stay so, which makes every later step slow."""
    tiny = torch.finfo(dtype).smallest_normal / 100
    options = {"momentum": 0.9} if cls is SGD else {}
    ours = parameters([(70,)], dtype)
    theirs = copies(ours)
    optimizers = cls(ours, lr=0.1, **options), getattr(torch.optim, cls.__name__)(theirs, lr=0.1, **options)
    set_gradients(ours, theirs)
    for optimizer, (p,) in zip(optimizers, (ours, theirs), strict=True):
        optimizer.step()
        for name, value in optimizer.state[p].items():
            if name != "step":
                value[:35] = tiny
        p.grad.zero_()
        optimizer.step()
    averages = [
        [value[:35] for name, value in optimizer.state[p].items() if name != "step"]
        for optimizer, p in zip(optimizers, (*ours, *theirs), strict=True)
    ]
    assert all((v == 0).all() for v in averages[0])
    assert all((v != 0).all() for v in averages[1])
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls is not SGD])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [None, 0.9, 0.5], ids=str)
def test_small_averages_divide(cls, dtype, power):
    """With a tiny eps, a step for tiny gradients is as long as for any others; it was up to 10^10 times longer."""
    smallest = torch.finfo(dtype).smallest_normal
    eps = 0.0 if power is None else smallest**power
    ours = parameters([(70,)], dtype)
    theirs = copies(ours)
    optimizers = cls(ours, lr=0.1, eps=eps), getattr(torch.optim, cls.__name__)(theirs, lr=0.1, eps=eps)
    for _ in range(3):
        gradient = torch.linspace(0.3, 3, 70, dtype=dtype) * smallest**0.5
        for optimizer, (p,) in zip(optimizers, (ours, theirs), strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    assert ((optimizers[1].state[theirs[0]]["exp_avg_sq"] < smallest) & (gradient > 0)).any()
    # What is denormal has fewer bits, which are rounded in another order.
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_zero_grad():
    for cls in CLASSES:
        params = parameters([(3,), (2, 2)])
        optimizer = cls(params)
        set_gradients(params)
        kept = params[0].grad
        optimizer.zero_grad(set_to_none=False)
        assert params[0].grad is kept
        assert not kept.any()
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"differentiable": True}])
@pytest.mark.parametrize("cls", CLASSES)
def test_ways_to_compute(cls, options):
    if "differentiable" in options:
        ours, theirs = cls([torch.ones(3)], lr=0.1, **options), cls._torch([torch.ones(3)], lr=0.1, **options)
    else:
        ours, theirs = pair(cls, parameters([(5,)]), lr=0.1, **options)
    for _ in range(3):
        set_gradients(*both(ours, theirs))
        ours.step()
        theirs.step()
    assert_same(ours, theirs, bits=False)


def test_gradients_that_no_kernel_takes():
    """Sparse and complex ones, beside one that the kernel takes."""

    def make(cls):
        torch.manual_seed(3)
        params = [nn.Embedding(10, 3, sparse=True).weight, nn.Parameter(torch.randn(3, dtype=torch.cfloat))]
        params.append(nn.Parameter(torch.randn(7)))
        return cls(params, lr=0.1, weight_decay=0.0)

    ours, theirs = make(SGD), make(SGD._torch)
    for optimizer in (ours, theirs):
        torch.manual_seed(0)
        rows, z, dense = optimizer.param_groups[0]["params"]
        for _ in range(3):
            optimizer.zero_grad()
            (nn.functional.embedding(torch.randint(10, (4,)), rows, sparse=True).sum() + (dense**2).sum()).backward()
            z.grad = torch.randn(3, dtype=torch.cfloat)
            optimizer.step()
    assert_same(ours, theirs)
    optimizer = Adam([rows])
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_tensor_subclasses_are_torch_s(monkeypatch):
    from torch.testing._internal.two_tensor import TwoTensor

    p = nn.Parameter(TwoTensor(torch.ones(3), torch.ones(3)))
    optimizer = SGD([p, nn.Parameter(torch.ones(2))], lr=0.5)
    calls = goes_to_torch(optimizer, monkeypatch)
    for q in optimizer.param_groups[0]["params"]:
        q.sum().backward()
    optimizer.step()
    assert calls == [[1]]
    assert torch.equal(p.a, torch.full((3,), 0.5))


def test_tensor_betas():
    params = parameters([(5,)])
    options = {"betas": (torch.tensor(0.9), torch.tensor(0.99))}
    ours, theirs = pair(Adam, params, **options)
    for _ in range(3):
        set_gradients(*both(ours, theirs))
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_amsgrad_keeps_nan():
    ours, theirs = pair(Adam, parameters([(40,)]), amsgrad=True)
    for grad in (torch.ones(40), torch.full((40,), float("nan")), torch.ones(40)):
        for p in (*both(ours, theirs)[0], *both(ours, theirs)[1]):
            p.grad = grad
        ours.step()
        theirs.step()
    assert_same(ours, theirs)


def test_grad_scaler():
    for cls in CLASSES:
        params = parameters([(4,)])
        ours, theirs = pair(cls, params, lr=0.1)
        for optimizer in (ours, theirs):
            scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
            p = optimizer.param_groups[0]["params"][0]
            for step in range(4):
                optimizer.zero_grad()
                scaler.scale((p**2).sum() * (float("inf") if step == 2 else 1)).backward()
                scaler.step(optimizer)
                scaler.update()
        assert_same(ours, theirs)


def test_what_torch_refuses():
    with pytest.raises(ValueError, match="Invalid learning rate"):
        SGD(parameters([(1,)]), lr=-1)
    with pytest.raises(ValueError, match="empty parameter list"):
        Adam([])


def test_profilers_see_a_step():
    optimizer = SGD(parameters([(3,)]), lr=0.1)
    set_gradients(optimizer.param_groups[0]["params"])
    with torch.profiler.profile() as profile:
        optimizer.step()
        optimizer.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert {"Optimizer.step#SGD.step", "Optimizer.zero_grad#SGD.zero_grad", "fastops::sgd_step"} <= names


def test_compiled():
    """torch.compile sees PyTorch's own step, which it fuses."""
    for cls in CLASSES:
        ours, theirs = pair(cls, parameters([(5, 3)]), lr=0.1)
        for _ in range(3):
            set_gradients(*both(ours, theirs))
            torch.compile(lambda: ours.step(), backend="eager")()  # noqa: B023
            theirs.step()
        assert_same(ours, theirs, bits=False)


@pytest.mark.parametrize("cls", CLASSES)
def test_replace_and_restore(cls):
    params = parameters([(3, 2), (5,)])
    ours, theirs = (cls._torch(p, lr=0.1) for p in (params, copies(params)))
    schedules = [torch.optim.lr_scheduler.StepLR(o, 2) for o in (ours, theirs)]
    calls = []
    ours.register_step_post_hook(lambda *_: calls.append(1))

    def train():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for _ in range(3):
                set_gradients(*both(ours, theirs))
                for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
                    optimizer.step()
                    schedule.step()

    assert replace_(ours) is ours
    assert type(ours) is cls
    train()
    with fastops.record() as rows:
        train()
    assert len([row for row in rows if row.op.endswith("_step")]) == 3
    assert restore_(ours) is ours
    assert type(ours) is cls._torch
    with fastops.record() as rows:
        train()
    assert rows == []
    assert len(calls) == 9
    assert_same(ours, theirs)


def test_what_is_not_replaced():
    with pytest.raises(TypeError, match=r"must be a torch.optim.SGD or .*, got torch.optim.rmsprop.RMSprop"):
        replace_(torch.optim.RMSprop(parameters([(1,)])))

    class Mine(torch.optim.SGD):
        pass

    with pytest.raises(TypeError, match=r"got .*Mine"):
        replace_(Mine(parameters([(1,)])))
    optimizer = torch.optim.SGD(parameters([(1,)]))
    optimizer.step = print
    with pytest.raises(ValueError, match="step has been overridden"):
        replace_(optimizer)
