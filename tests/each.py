"""Many cases in one test, where a case is small beside what pytest does for a test: it collects it in every process,
sets up its fixtures and reports on it three times."""

import functools
import inspect
from collections.abc import Callable, Iterable

import pytest
import torch


def each(name: str, cases: Iterable, ids: Callable[[object], str] = str) -> Callable[[Callable], Callable]:
    """As pytest.mark.parametrize, in one test. Each case finds the same random numbers, and a failure names it.

    A test of which every case is skipped, or that has none, is skipped.
    """
    cases = list(cases)

    def decorate(test: Callable) -> Callable:
        @functools.wraps(test)
        def loop(*args: object, **kwargs: object) -> None:
            ran, why = 0, "no cases"
            for case in cases:
                torch.manual_seed(0)
                try:
                    test(*args, **kwargs, **{name: case})
                    ran += 1
                except pytest.skip.Exception as skipped:
                    why = str(skipped)
                except BaseException as error:
                    if hasattr(error, "add_note"):  # Python 3.11
                        error.add_note(f"{name}: {ids(case)}")
                    raise
            if not ran:
                pytest.skip(why)

        signature = inspect.signature(test)
        others = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        assert len(others) < len(signature.parameters), f"{test.__name__} has no argument {name}"
        loop.__signature__ = signature.replace(parameters=others)
        return loop

    return decorate
