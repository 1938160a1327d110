"""The docstrings of fastops.nn and of replace_: each says what it has to, and its example runs."""

import doctest
import inspect
import pydoc

import pytest
import torch
from torch import nn

import fastops
import fastops.nn as fnn
from fastops._modules import modules
from fastops.nn._fused import FUSED

NAMES = {"torch": torch, "nn": nn, "fnn": fnn, "fastops": fastops}
PARTS = ("    Args:", "    Shape: ", "    Dtypes: ", "    Raises: ", "    Source: ", "    >>> ")


def run_examples(thing, name):
    """The number of examples; each must give what stands below it."""
    tests = doctest.DocTestFinder(recurse=False).find(thing, name, globs=dict(NAMES))
    runner = doctest.DocTestRunner()
    for test in tests:
        torch.manual_seed(0)
        output = []
        runner.run(test, out=output.append)
        assert not runner.failures, "".join(output)
    return runner.tries


def test_the_list_is_complete():
    found = set()
    for module in (module for module in modules("fastops.nn") if hasattr(module, "__all__")):
        classes = {name for name, cls in vars(module).items() if getattr(cls, "__module__", "") == module.__name__}
        found |= {name for name in classes if inspect.isclass(vars(module)[name]) and not name.startswith("_")}
    assert found == {*fnn.__all__, *(fused.__name__ for fused in FUSED.values())}
    for name in fnn.__all__:
        assert issubclass(getattr(fnn, name), getattr(nn, name, nn.Sequential))


@pytest.mark.parametrize("name", fnn.__all__)
def test_every_class_says_what_it_has_to(name):
    cls = getattr(fnn, name)
    text = vars(cls)["__doc__"]
    lines = text.splitlines()
    places = [next((i for i, line in enumerate(lines) if line.startswith(part)), -1) for part in PARTS]
    assert -1 not in places, PARTS[places.index(-1)]
    assert places == sorted(places)
    assert name not in fnn.LAYERS or f"    Source: torch.nn.{name}." in lines
    arguments = " ".join(lines[places[0] : places[1]])
    for parameter in list(inspect.signature(cls.__init__).parameters)[1:]:
        # torch.nn.Hardtanh's and Threshold's other spellings are gone from its documentation too.
        if parameter not in ("args", "kwargs", "min_value", "max_value"):
            assert parameter in arguments.replace(",", " ").replace(":", " ").split(), parameter
    assert f"fnn.{name}(" in "".join(lines[places[-1] :])
    assert run_examples(cls, name) > 0


def test_no_class_says_what_another_says():
    first = [vars(cls)["__doc__"].splitlines()[0] for cls in (getattr(fnn, name) for name in fnn.__all__)]
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("name", fnn.LAYERS)
def test_help_describes_the_class(name):
    cls = getattr(fnn, name)
    text = pydoc.plain(pydoc.render_doc(cls))
    assert f" |  {cls.__doc__.splitlines()[0]}" in text.splitlines()[:8]
    names = {fnn.RMSNorm: "x", fnn.MultiheadAttention: "query", fnn.TransformerEncoderLayer: "src"}
    input = names.get(cls, "input")  # as torch.nn names it
    assert f"forward(self, {input}" in text.split("Methods inherited")[0]
    # Nothing of ours is between most classes and torch.nn's; those with activation= share its constructor and setter.
    ours = [base for base in cls.__mro__[1:] if base.__module__.startswith("fastops")]
    assert len(ours) <= (2 if cls in FUSED else 0)


@pytest.mark.parametrize("fused", FUSED.values(), ids=lambda cls: cls.__name__)
def test_fused_classes_say_what_makes_them(fused):
    assert vars(fused)["__doc__"].startswith(f"What {fused.__name__.removeprefix('Fused')}(..., activation=f) makes")


@pytest.mark.parametrize("name", ["replace_", "restore_", "replaced", "Report", "Row"])
def test_replace(name):
    thing = getattr(fastops.replace, name, None) or getattr(fastops, name)
    assert thing.__doc__
    if inspect.isfunction(thing):
        assert run_examples(thing, name) > 0
