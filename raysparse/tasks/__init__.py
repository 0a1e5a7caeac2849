"""Downstream tasks; the union is the registry."""

from typing import Annotated

from pydantic import Field

from raysparse.tasks.base import Example, Split, Task
from raysparse.tasks.docstrings import Docstrings
from raysparse.tasks.pairs import Pairs

AnyTask = Annotated[Docstrings | Pairs, Field(discriminator="type")]

__all__ = ["AnyTask", "Docstrings", "Example", "Pairs", "Split", "Task"]
