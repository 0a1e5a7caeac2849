"""The dense teacher of a fine-tuning: a model that reads the same tokens in as many blocks."""

from typing import Any

from raysparse.config import ConfigError
from raysparse.models.build import ModelConfig, architecture
from raysparse.recipes import evaluate
from raysparse.recipes.reading import Reader, kinds_for
from raysparse.recipes.training import first_builds
from raysparse.train.distill import DistillationConfig
from raysparse.train.run import Run

_ALIKE = ("model_type", "num_hidden_layers", "num_decoder_layers", "decoder_layers", "hidden_size", "vocab_size", "max_source_positions")


def check(config: DistillationConfig, student: ModelConfig, reader: Reader) -> str:
    """Names the teacher's weights; a `ConfigError` if its tokenizer is not the student's, or its blocks, if these are known by now."""
    its = architecture(_section(config, student), len(reader.tokenizer), reader.context, kinds_for(reader.task))
    if reader.hf_config is not None:
        _check_alike(config, reader.hf_config, its)
    folder = evaluate.model_folder(config.teacher)
    if evaluate.load_tokenizer(folder).get_vocab() != reader.tokenizer.get_vocab():
        raise ConfigError(
            f"Expected the student's tokenizer with distillation.teacher={config.teacher}. Got another vocabulary. "
            "Take a teacher that reads the same tokens."
        )
    return evaluate.weights_digest(folder)


def read(run: Run, config: DistillationConfig, student: ModelConfig, reader: Reader) -> Any:
    """The model (see `first_builds`), for a student whose `reader` it is. Every rank calls this."""
    model = first_builds(run, _section(config, student), 0, len(reader.tokenizer), reader.context, kinds_for(reader.task))
    _check_alike(config, reader.hf_config, model.config)
    return model


def _section(config: DistillationConfig, student: ModelConfig) -> ModelConfig:
    return student.model_copy(update={"preset": None, "path": evaluate.model_folder(config.teacher), "overrides": {}})


def _check_alike(config: DistillationConfig, mine: Any, its: Any) -> None:
    if keys := [key for key in _ALIKE if getattr(mine, key, None) != getattr(its, key, None)]:
        raise ConfigError(
            f"Expected a teacher of the student's architecture in distillation.teacher={config.teacher}. "
            f"Got {', '.join(f'{key} {getattr(its, key, None)} instead of {getattr(mine, key, None)}' for key in keys)}. "
            "Take the dense model that the student was pruned from, fine-tuned on the task."
        )
