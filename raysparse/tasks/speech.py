"""Speech: a recording to what is said in it, or to its translation."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, ClassVar, Literal

from raysparse.data import files
from raysparse.data.audio import Clip, content
from raysparse.data.sources import Split
from raysparse.tasks.base import Example
from raysparse.tasks.metrics import MetricName
from raysparse.tasks.tables import Layout, TableTask


class Speech(TableTask):
    """Recordings and their texts. Needs ``pip install 'raysparse[audio]'``."""

    merges: ClassVar[bool] = False
    hears: ClassVar[bool] = True

    type: Literal["speech"] = "speech"
    audio: str = "audio"
    """Column of the recordings: paths, relative to the table's folder, or bytes and path, as `datasets.Audio` stores them."""
    target: str = "text"
    """Column of what is said, or of its translation."""
    language: str | None = None
    """What is spoken, as Whisper's tokens name it (``hi``, ``de``); null for a model that knows no languages, such as one made here."""
    translate: bool = False
    """The targets are English, whatever is spoken. false: in the language that is spoken."""
    resample: bool = False
    """Recordings of another rate than 16 kHz are resampled. false: they are an error."""
    metrics: tuple[MetricName, ...] = ("wer", "cer")
    """Error rates of words and characters; of translations ``[bleu]``."""

    @property
    def layouts(self) -> Sequence[Layout]:
        return [(self.audio, self.target)]

    @property
    def markers(self) -> tuple[str, ...]:
        if self.language is None:
            return ()
        return f"<|{self.language}|>", "<|translate|>" if self.translate else "<|transcribe|>", "<|notimestamps|>"

    def read(self, row: dict[str, Any], where: str) -> tuple[str, list[str]]:
        return where, files.as_texts(row[self.target], where, self.target)

    def clips(self, split: Split, count: int) -> Iterator[Clip]:
        """The recordings of the first `count` examples of a split."""
        for where, row in islice(self.data.rows(split, self.layouts), count):
            yield where, content(row[self.audio], where, self.audio, where.folder)

    def baseline(self, example: Example) -> str:
        """Nothing: all words of the reference are missing."""
        return ""
