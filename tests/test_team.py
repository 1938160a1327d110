"""Whose threads the kernels run on: PyTorch's, or a team of fastops' own while other programs want the processor."""

import os
import textwrap
import threading

import pytest
import torch
from every_op import OPS
from fresh import run_python
from test_threads import run_child, training_step

import fastops.functional as FF
from fastops import _C


@pytest.fixture(params=["openmp", "own"])
def team(request):
    before = _C.team_choice(), torch.get_num_threads()
    assert _C.set_team(request.param)
    assert _C.team() == request.param
    yield request.param
    _C.set_team(before[0])
    torch.set_num_threads(before[1])


@pytest.fixture
def own_team():
    before = _C.team_choice(), torch.get_num_threads()
    assert _C.set_team("own")
    torch.set_num_threads(3)
    yield
    _C.set_team(before[0])
    torch.set_num_threads(before[1])


def results_of(call, operands, threads):
    torch.set_num_threads(threads)
    operands = [t.detach().requires_grad_(t.requires_grad) for t in operands]
    outputs = call.ours(*[t.clone() for t in operands])  # some calls are in place
    outputs = [t for t in (outputs if isinstance(outputs, tuple) else (outputs,)) if isinstance(t, torch.Tensor)]
    total = sum(t.float().sin().sum() for t in outputs if t.requires_grad)
    wanted = [t for t in operands if t.requires_grad]
    if wanted and isinstance(total, torch.Tensor):
        outputs += [g for g in torch.autograd.grad(total, wanted, allow_unused=True) if g is not None]
    return [t.detach() for t in outputs]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.__name__.removeprefix("test_"))
def test_every_op_gives_the_same_bits_on_any_team(op, team):
    for call in op.calls(48):
        torch.manual_seed(0)
        operands = [torch.randn(shape) for shape in call.shapes]
        for i, operand in enumerate(operands):
            operand.requires_grad_(call.needs is None or i in call.needs)
        alone = results_of(call, operands, 1)
        for threads in (2, 3):
            for one, other in zip(alone, results_of(call, operands, threads), strict=True):
                assert torch.equal(one, other) or torch.equal(one.isnan(), other.isnan()), (str(call), threads)


def test_several_threads_lead_at_once(own_team):
    x, w, b = torch.randn(200, 150), torch.randn(170, 150), torch.randn(170)
    expected = training_step(x, w, b, "tanh")
    problems = []

    def work():
        torch.set_num_threads(3)
        for _ in range(20):
            for one, two in zip(expected, training_step(x, w, b, "tanh"), strict=True):
                if not torch.equal(one, two):
                    problems.append("different")

    threads = [threading.Thread(target=work) for _ in range(20)]  # more than there are regions
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


def test_fork_after_use(own_team):
    x = torch.randn(500, 500)
    FF.linear(x, x)
    run_child()
    assert torch.equal(FF.relu(x), x.clamp(min=0))


def test_members_treat_denormals_as_the_lead(own_team):
    x = torch.full((1 << 20,), 1e-39)
    FF.leaky_relu(x, 0.5)  # its threads have started
    try:
        if not torch.set_flush_denormal(True):
            pytest.skip("this processor cannot")
        flushed = FF.leaky_relu(-x, 0.5)
    finally:
        torch.set_flush_denormal(False)
    assert flushed.unique().numel() == 1
    kept = FF.leaky_relu(-x, 0.5)
    assert kept.unique().numel() == 1
    assert kept[0] != 0


def words_of(code, **environment):
    result = run_python(textwrap.dedent(code), **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_own_threads_are_started_when_wanted_and_no_more_than_processors():
    """The own team has one thread less than processors at most; PyTorch's waits are made short by two that sleep."""
    code = """
    import os, torch
    import fastops.functional as FF
    print(len(os.listdir("/proc/self/task")))
    x = torch.randn(600, 600)
    for threads in (1, 2, 64):
        torch.set_num_threads(threads)
        for _ in range(3):
            FF.gelu(FF.linear(x, x))
        print(len(os.listdir("/proc/self/task")))
    print(len(os.sched_getaffinity(0)))
    """
    before, alone, two, many, processors = map(int, words_of(code, FASTOPS_TEAM="own"))
    assert alone == before
    assert two - before in ((1, 3) if processors > 1 else (0, 2))
    assert many - before <= min(processors, 64) - 1 + 2


def test_one_processor_is_enough():
    code = """
    import os, torch
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    import fastops.functional as FF
    torch.set_num_threads(4)
    x = torch.randn(300, 300)
    print((FF.linear(x, x) - x @ x.T).abs().max().item() < 1e-3)
    """
    assert words_of(code, FASTOPS_TEAM="own") == ["True"]
    assert words_of(code, FASTOPS_TEAM="auto") == ["True"]


def test_an_unknown_choice_is_ignored_and_said():
    code = "import fastops; i = fastops.info(); print(i.team, 'FASTOPS_TEAM=mine is none of' in str(i))"
    assert words_of(code, FASTOPS_TEAM="mine") == ["openmp", "True"]
    assert not _C.set_team("mine")


@pytest.mark.skipif(not os.path.exists("/proc/thread-self/schedstat"), reason="this system does not say who waits")
def test_the_own_team_takes_over_beside_other_programs():
    code = """
    import os, subprocess, sys, time, torch, fastops
    import fastops.functional as FF
    torch.set_num_threads(2)
    processors = len(os.sched_getaffinity(0))
    loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3 * processors)]
    try:
        x = torch.randn(500, 500)
        end = time.monotonic() + 60
        while fastops.info().team != "own" and time.monotonic() < end:
            for _ in range(20):
                FF.linear(x, x)
        print(fastops.info().team)
    finally:
        for loop in loops:
            loop.kill()
    """
    assert words_of(code, FASTOPS_TEAM="auto") == ["own"]
