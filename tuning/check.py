"""Everything that can be known to be wrong with a search before its first trial."""

import shutil
from pathlib import Path

from raysparse.config import ConfigError, read_yaml
from raysparse.models.build import skeleton
from raysparse.recipes import finetune, pretrain, prune
from raysparse.recipes.export import MASKS
from raysparse.recipes.finetune import FinetuneConfig
from raysparse.recipes.job import GOES_ON, different_keys
from raysparse.recipes.lease import is_of_driver
from raysparse.recipes.pretrain import PretrainConfig
from raysparse.recipes.prune import PruneConfig
from raysparse.report import bytes_text
from raysparse.runtime.launch import per_worker
from raysparse.runtime.nodes import grows
from tuning.config import NSGA2, Optuna, SearchConfig
from tuning.first import UNPRUNED
from tuning.space import Search

CONFIG = "search.yaml"


def check_folder(config: SearchConfig, resume: bool) -> None:
    """The search's folder must be new, or hold this very search if it is resumed."""
    file = config.path / CONFIG
    if not file.exists():
        if config.path.exists() and not all(map(is_of_driver, config.path.iterdir())):
            raise ConfigError(f"Expected {config.path} to be a search, or empty. Got other files there. Choose another run.name.")
        return
    keys = different_keys(read_yaml(file), config.model_dump(mode="json"))
    if keys and keys != ["tolerance"]:
        raise ConfigError(
            f"Expected run.name={config.run.name} to be new, or the search as it was. Got other values of: {', '.join(keys)}. "
            f"Choose another run.name, or go back to {file}."
        )
    if not resume:
        raise ConfigError(
            f"Expected a new run.name. Got {config.run.name}, a search that was begun in {config.path}. "
            f"Add --resume to go on with it, or choose another run.name; `raysparse report {config.path}` reports it as it stands."
        )


def check(search: Search) -> None:
    """Every point that is known by now, models and data, before anything is started; tokenizes the data (cached)."""
    config = search.config
    for point in () if isinstance(config.algorithm, Optuna | NSGA2) else search.points():
        search.trial_config(point)
    tokenizer: str | None = None
    for _, model in search.first_level():
        assert search.level is not None
        tokenizer = search.level.check(model)
        if isinstance(model, PruneConfig):
            _check_baseline(search, prune.model_of(model))
    for task in search.space:
        some = search.trial_config(search.some_point(task))
        if isinstance(some, FinetuneConfig):
            finetune.check(some, tokenizer)
        else:
            pretrain.check(some)
    if isinstance(config.algorithm, Optuna | NSGA2):
        try:
            import optuna  # noqa: F401
        except ImportError:
            raise ConfigError(
                f"Expected the package optuna for algorithm.type={config.algorithm.type}. Got an ImportError. "
                "pip install 'raysparse[tune]', or use algorithm.type=random."
            ) from None


def _check_baseline(search: Search, folder: str) -> None:
    """A model that is to be compared with as dense must be dense."""
    if UNPRUNED in search.models(next(iter(search.space))) and (Path(folder) / MASKS).exists():
        raise ConfigError(
            f"Expected a dense model at {folder} for sparsity.target 0 of prune.space, the dense baseline. Got one with {MASKS}. "
            "Leave 0 out, or name the dense model."
        )


def check_disk(search: Search, at_once: int) -> None:
    """Room for the checkpoints and models that are there at once, estimated from the number of parameters."""
    config, cells = search.config, len(search.cells())
    models = [model for _, model in search.first_level()]
    some = search.trial_config(search.some_point(next(iter(search.space))))
    parameters = _parameters(models[0] if models else some)
    kept, running = 4, 12 * (some.checkpoint.keep + 1) + 4  # bytes: the export; checkpoints with moments, one more being written
    made = running if search.level is None or search.level.verb in GOES_ON else kept  # pruning keeps no checkpoints
    need = parameters * (kept * cells * config.keep + made * len(models) + running * at_once)
    place = next(path for path in (config.path, *config.path.parents) if path.exists())
    if (free := shutil.disk_usage(place).free) < need:
        raise ConfigError(
            f"Expected about {bytes_text(need)} of disk at {place}: {len(models)} models ({made} bytes a parameter) and {at_once} trials "
            f"at a time ({running}) of {parameters:,} parameters, {cells} cells that keep {config.keep} trials ({kept}). "
            f"Got {bytes_text(free)} free. Choose another run.folder, or lower keep, checkpoint.keep or max_concurrent."
        )


def _parameters(config: PretrainConfig | PruneConfig | FinetuneConfig) -> int:
    if isinstance(config, PretrainConfig):
        model = skeleton(config.model, getattr(config.data.tokenizer, "vocab_size", None), config.data.context)
    elif isinstance(config, PruneConfig):
        model = prune.model_skeleton(config, prune.model_of(config))
    else:
        model = finetune.model_skeleton(config)
    return sum(parameter.numel() for parameter in model.parameters())


def check_dashboard() -> None:
    """Ray Train frees what a stopped trial held by asking the dashboard; without one the next trial would wait for ever."""
    import ray
    from ray.util.state import list_nodes
    from ray.util.state.exception import RayStateApiException, ServerUnavailable

    try:
        list_nodes(address=ray.get_runtime_context().gcs_address, limit=1, timeout=20)
    except (RayStateApiException, ServerUnavailable, OSError) as error:
        raise ConfigError(
            f"Expected a Ray cluster with a dashboard for trials of several workers. Got: {str(error).splitlines()[0]}. "
            "Start it with `ray start --head --include-dashboard=true` (pip install 'ray[default]'), or use run.workers=1."
        ) from None


def concurrency(config: SearchConfig) -> int:
    """Trials at a time: what the nodes hold, which Ray Tune does not know of trials with a worker group of their own; on a cluster that
    grows max_concurrent, and without it what is there.

    Raises:
        ConfigError: no node holds a worker, or all of them fewer than a trial has: it would wait for ever.
    """
    import ray

    need, nodes = per_worker(config.run), [node["Resources"] for node in ray.nodes() if node["Alive"]]
    slots = [min(int(node.get(name, 0) // amount) for name, amount in need.items()) for node in nodes]
    fits = sum(slots) // config.run.sizes[-1]
    if grows():
        return config.max_concurrent or max(1, fits)
    if not fits:
        have = ", ".join(" ".join(f"{node.get(name, 0):g} {name}" for name in need) for node in nodes)
        each = " and ".join(f"{amount:g} {name}" for name, amount in need.items())
        raise ConfigError(
            f"Expected nodes that hold {config.run.workers} workers of {each}. Got nodes of {have}: room for {sum(slots)}. "
            "Lower run.workers or run.threads, or add nodes."
        )
    return min(fits, config.max_concurrent or fits)
