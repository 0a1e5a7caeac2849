"""Parts of a search that do not go together."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from raysparse.config import ConfigError
from tuning.config import NSGA2, PBT, Grid, NoScheduler, Optuna, Random
from tuning.domain import is_plain
from tuning.first import PRUNED
from tuning.keys import flat

if TYPE_CHECKING:
    from tuning.space import Search


def check_parts(search: "Search") -> None:
    """Which stages there are, and which keys are theirs: before any config is made.

    Raises:
        ConfigError: no stage, a first level without tasks to start from it, or a key that the search sets itself.
    """
    config = search.config
    if config.pretrain is None and not config.tasks:
        found = "prune alone: it is the tasks that are searched" if config.prune is not None else "neither"
        raise ConfigError(f"Expected pretrain or tasks. Got {found}. Example: tuning/spaces/docstrings.yaml")
    for name, stage in search.stages.items():
        keys = [*dict(flat(stage.set)), *stage.space]
        if taken := [key for key in keys if key in _owned(search, name) or key.startswith("run.")]:
            instead = "" if search.level is None else f", or leave {search.level.verb} out to fine-tune models that are there"
            raise ConfigError(
                f"Expected {name} without {', '.join(taken)}, which the search sets. Change the search's own run section (run.seed is of "
                f"the first level, seeds of the trials){instead}."
            )
    if config.prune is not None and "model.path" in config.prune.space:
        raise ConfigError(
            "Expected one model.path for all that is pruned. Got it in prune.space. Set prune.set.model.path, and search one after another."
        )


def _owned(search: "Search", name: str) -> Iterator[str]:
    yield "run"
    if search.level is not None and name != search.level.verb:
        yield from ("model.path", *dict(flat(search.level.gives)))


def check_pruned(search: "Search") -> None:
    """Of models that are pruned: that there are any, of a trained one."""
    if search.level is not PRUNED:
        return
    made = search.first_level()
    if not made:
        raise ConfigError(
            "Expected a sparsity.target above 0 in prune.space. Got 0 alone, which is the model as it is. "
            "Add one, or leave prune out and set the tasks' model.path."
        )
    if made[0][1].model.path is None:
        raise ConfigError("Expected prune.set.model.path: a trained model to prune. Got a preset: random weights.")


def check_together(search: "Search") -> None:
    """Algorithm and scheduler, and what they are to search.

    Raises:
        ConfigError: they cannot do that.
    """
    config = search.config
    config.run.check_fixed("a trial that grows would take the room of the next one")
    for task, space in search.space.items():
        search.metric(task)
        if isinstance(config.algorithm, Optuna) and not space:
            raise ConfigError(f"Expected keys in {search.where(task)} for algorithm.type=optuna. Got none. Use algorithm.type=grid.")
    if isinstance(config.scheduler, PBT):
        _check_population(search)
    if isinstance(config.algorithm, NSGA2) and not isinstance(config.scheduler, NoScheduler):
        raise ConfigError(
            f"Expected scheduler.type=none with algorithm.type=nsga2, which judges FLOPs and score of whole runs. "
            f"Got {config.scheduler.type}. Use scheduler.type=none or algorithm.type=optuna."
        )


def _check_population(search: "Search") -> None:
    config = search.config
    if config.is_nested:
        raise ConfigError(
            f"Expected run.workers=1 with scheduler.type=pbt. Got {config.run.workers}: Ray Tune cannot hand a checkpoint to a "
            "trial whose weights are in a worker group of its own, so no trial could go on from a better one's. "
            "Use run.workers=1 or scheduler.type=asha."
        )
    if len(search.cells()) > 1 or not isinstance(config.algorithm, Grid | Random):
        raise ConfigError(
            f"Expected one task, one model and algorithm.type grid or random with scheduler.type=pbt: one population. "
            f"Got {len(search.cells())} cells and {config.algorithm.type}. Search them one after another, or use scheduler.type=asha."
        )
    if fixed := [key for space in search.space.values() for key, domain in space.items() if not is_plain(domain)]:
        raise ConfigError(f"Expected plain values to perturb with scheduler.type=pbt. Got sections in {', '.join(fixed)}.")
