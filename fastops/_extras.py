"""What fastops' optional parts need beside torch, and how to get it."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def needs(part: str, extra: str) -> Iterator[None]:
    """Around imports: what is missing is named in one line, with the extra of pyproject.toml that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = error.name.partition(".")[0]
        raise ModuleNotFoundError(f"{part} needs {package}: pip install fastops[{extra}]", name=error.name) from None
