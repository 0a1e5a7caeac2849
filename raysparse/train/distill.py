"""Learn from a dense teacher: its distribution over tokens (logits), and what each of its blocks gives (SquareHead, arXiv:2310.06927).

loss = task * cross-entropy + logit * KL(teacher || student) + feature * SquareHead

Every mean is one over the global batch, so that training is the same, up to the order of summation, in any split of it. For SquareHead that
takes the norms of the teacher's features of the whole batch before the first loss: L numbers are summed over the ranks in each step.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import NamedTuple, Self

import torch
import torch.distributed as dist
from pydantic import Field, model_validator
from torch import Tensor

from raysparse.config import Config
from raysparse.data.batch import IGNORED, Batch
from raysparse.losses import cross_entropy_sum, feature_norms, kl_sum, squarehead
from raysparse.models.features import BlockOutputs, ChosenLogits
from raysparse.train.objective import Forward
from raysparse.train.shard import Sharded


class DistillationConfig(Config):
    """A teacher, and what is learned from it: task * cross-entropy + logit * KL + feature * SquareHead (arXiv:2310.06927)."""

    teacher: str
    """A model of the student's architecture, best the dense one fine-tuned on the same task: a run, a Hugging Face folder or a hub name."""
    task: float = Field(1.0, ge=0)
    """Weight of the cross-entropy with the data. SquareHead's paper: 1; Whisper 0.5."""
    logit: float = Field(0.0, ge=0)
    """Weight of KL(teacher || student) over the predicted tokens. SquareHead's paper: 0; its standard distillation 1."""
    feature: float = Field(1.0, ge=0)
    """Weight of SquareHead: squared differences of every block's output, relative to the teacher's squares, summed over blocks."""
    temperature: float = Field(1.0, gt=0)
    """Divides both models' logits in the KL."""
    eps: float = Field(2**-7, gt=0)
    """Added to a block's mean square. The paper's models: MPT 2^-7, T5 1e-9, Whisper 1e-8."""
    keep_features: bool = True
    """Go through the teacher once a step and keep what its blocks give until the student needs it: [blocks, tokens of the worker's share,
    width]. false: keep that of one micro-batch alone; where a worker has several the teacher then computes twice."""
    offload: bool = False
    """FSDP2 on GPUs: the teacher's weights stay in the memory of the host, and come to the GPU block by block."""

    @model_validator(mode="after")
    def _teaches(self) -> Self:
        if self.logit == self.feature == 0:
            raise ValueError("Expected distillation.logit or distillation.feature above 0. Got 0 for both. Leave distillation out instead")
        return self


class Lesson(NamedTuple):
    """What a teacher says of a micro-batch.

    Attributes:
        features: [rows, length, width] of each block; empty if nobody asked.
        logits: [predicted tokens, vocabulary], or None.
    """

    features: list[Tensor]
    logits: Tensor | None


class Teacher:
    """A frozen model in evaluation mode, sharded like its student; no gradient ever reaches it."""

    def __init__(self, sharded: Sharded, outputs: BlockOutputs, head: ChosenLogits):
        self._sharded, self._outputs, self._head = sharded, outputs, head
        sharded.module.eval().requires_grad_(False)

    @torch.no_grad()
    def teach(self, batch: Batch, features: bool, logits: bool) -> Lesson:
        noted, asked = self._outputs.noted() if features else nullcontext([]), (batch.labels != IGNORED) & logits
        with self._sharded.accumulate(last=True), noted as found, self._head.of(asked):
            said = self._sharded.module(**batch.inputs).logits
        return Lesson(found, said if logits else None)

    def rest(self) -> None:
        """Nothing stays gathered."""
        self._sharded.rest()


class Distillation:
    """An `Objective`: see the top of this file."""

    def __init__(self, config: DistillationConfig, forward: Forward, outputs: BlockOutputs, teacher: Teacher, smoothing: float):
        self._config, self._forward, self._outputs, self._teacher, self._smoothing = config, forward, outputs, teacher, smoothing
        self._targets, self._norms = 1, torch.empty(0)
        self._kept: list[Lesson] | None = None
        self._parts: dict[str, Tensor] = {}
        self.passes, self.logits = 1, 0

    def begin(self, batches: Sequence[Batch], targets: int, beat: Callable[[], None] = lambda: None) -> None:
        config, self._targets, self._parts = self._config, max(1, targets), {}
        keep = config.keep_features or len(batches) == 1
        self._kept, norms = [] if keep else None, []
        self.passes, self.logits = 1 if keep or not config.feature else 2, targets if config.logit else 0
        for batch in batches if keep or config.feature else ():
            beat()
            lesson = self._teacher.teach(batch, config.feature > 0, keep and config.logit > 0)
            norms.append(feature_norms(lesson.features, self._masks(batch, lesson), config.eps) if config.feature else None)
            if self._kept is not None:
                self._kept.append(lesson)
        if config.feature:
            self._norms = torch.stack(norms).sum(0)
            dist.all_reduce(self._norms)
        self._teacher.rest()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        config, lesson = self._config, self._lesson(batch)
        with self._outputs.noted() as features:
            logits = self._forward(batch)
        total = cross_entropy_sum(logits, batch.labels, self._smoothing)
        loss = config.task * total / self._targets
        if lesson.logits is not None:
            kl = kl_sum(logits[batch.labels != IGNORED], lesson.logits, config.temperature) / self._targets
            self._note("logit", kl)
            loss = loss + config.logit * kl
        if config.feature:
            relative = squarehead(features, lesson.features, self._masks(batch, lesson), self._norms)
            self._note("feature", relative)
            loss = loss + config.feature * relative
        return loss, total.detach()

    def _lesson(self, batch: Batch) -> Lesson:
        if self._kept is not None:
            return self._kept.pop(0)
        lesson = self._teacher.teach(batch, self._config.feature > 0, self._config.logit > 0)
        self._teacher.rest()
        return lesson

    def parts(self) -> dict[str, Tensor]:
        return self._parts

    def _note(self, name: str, value: Tensor) -> None:
        value = value.detach()
        self._parts[name] = self._parts[name] + value if name in self._parts else value

    def _masks(self, batch: Batch, lesson: Lesson) -> list[Tensor]:
        """What counts of each block's output: of an encoder the source without its padding, of a decoder the tokens that it reads up to the
        last that predicts; of a row without labels nothing."""
        encoder = self._outputs.num_encoder
        return [_heard(batch, features) for features in lesson.features[:encoder]] + [batch.tokens] * (len(lesson.features) - encoder)


def _heard(batch: Batch, features: Tensor) -> Tensor:
    """[rows, source positions] bool, of what an encoder's block gives; a model that hears has fewer positions than the audio has frames."""
    counts = (batch.labels != IGNORED).any(1, keepdim=True)
    return counts.expand(features.shape[:2]) if batch.source_mask is None else batch.source_mask & counts
