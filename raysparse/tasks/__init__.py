"""Downstream tasks; the union is the registry."""

from typing import Annotated

from pydantic import Field

from raysparse.tasks.base import Example, Split, Task
from raysparse.tasks.curation import Curation
from raysparse.tasks.docstrings import Docstrings
from raysparse.tasks.e2e import E2E
from raysparse.tasks.gsm8k import GSM8K
from raysparse.tasks.seq2seq import Completion, Seq2seq
from raysparse.tasks.speech import Speech
from raysparse.tasks.translation import Translation
from raysparse.tasks.triples import Dart, WebNLG

AnyTask = Annotated[
    Docstrings | E2E | WebNLG | Dart | Curation | GSM8K | Translation | Speech | Seq2seq | Completion, Field(discriminator="type")
]

__all__ = [
    "E2E",
    "GSM8K",
    "AnyTask",
    "Completion",
    "Curation",
    "Dart",
    "Docstrings",
    "Example",
    "Seq2seq",
    "Speech",
    "Split",
    "Task",
    "Translation",
    "WebNLG",
]
