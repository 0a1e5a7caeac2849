"""The first level of a search: models that its tasks start from, each made once and shared by every search of one run.folder.

Two kinds. They are pre-trained, or pruned of one trained model, which at sparsity.target 0 is itself among them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from raysparse.recipes import MODULES, pretrain, prune
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from tuning.config import SearchConfig, StageConfig

UNPRUNED = {"sparsity.target": 0}
"""Settings of the model that is pruned, as it is: the dense baseline."""


@dataclass(frozen=True)
class Level:
    """A kind of first level.

    Attributes:
        verb: of `raysparse` that makes a model; also the section of the search.
        made: what is said of such a model.
        folder: beside the folder of a search, for its models.
        gives: what every fine-tuning has set besides model.path.
        tokenizer_of: checks everything before a run; its tokenizer's folder.
        loss_of: a model's validation loss, by the summary of its run; None where it was not measured.
    """

    verb: str
    made: str
    folder: str
    config: type[PretrainConfig] | type[PruneConfig]
    gives: Mapping[str, Any]
    tokenizer_of: Callable[[Any], str]
    loss_of: Callable[[Mapping[str, Any]], float | None]

    def stage(self, config: SearchConfig) -> StageConfig | None:
        return getattr(config, self.verb)

    def check(self, config: Any) -> str:
        """As `tokenizer_of`; of a run that has ended, whether it was of the same data."""
        if (config.run.path / "summary.json").exists():
            return MODULES[self.verb].open_run(config).prepared["tokenizer"]
        return self.tokenizer_of(config)


PRETRAINED = Level(
    "pretrain",
    "pre-trained",
    "pretrained",
    PretrainConfig,
    {},
    lambda config: pretrain.check(config).tokenizer,
    lambda summary: summary["loss"]["validation"],
)
PRUNED = Level(
    "prune",
    "pruned",
    "pruned",
    PruneConfig,
    {"sparsity": {"masks": "keep"}},
    lambda config: prune.check(config)["tokenizer"],
    lambda summary: summary["pruning"]["loss"]["after"],
)
LEVELS = (PRETRAINED, PRUNED)


def level_of(config: SearchConfig) -> Level | None:
    """None: the tasks' model.path says what they start from."""
    return next((level for level in LEVELS if level.stage(config) is not None), None)
