"""Run jobs on Ray Train: find or start a cluster, start one worker group, show its progress, outlive what can be outlived."""

import logging
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread
from typing import Any, cast

from raysparse.config import ConfigError
from raysparse.recipes.job import Job, finished
from raysparse.runtime.mask_actor import managers
from raysparse.runtime.nodes import check_storage, grows
from raysparse.runtime.ray_run import PROGRESS, follow
from raysparse.train.error import TrainingError
from raysparse.train.metrics import Console
from raysparse.train.run import RunConfig

log = logging.getLogger(__name__)

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # CPU workers see CUDA_VISIBLE_DEVICES as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's poll: how soon a lost worker and the end are seen
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to the user
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the workers beside anything else
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after shutdown must not start another cluster
}


def launch(jobs: Sequence[Job], run: RunConfig, console: Console) -> list[dict[str, Any]]:
    """Carry out the jobs one after another in one group of ``run.workers`` ranks; returns their summaries.

    Ranks that die are replaced up to ``run.max_failures`` times; the group then skips the jobs that are finished and goes on
    from the newest checkpoint of the one that is not.

    Raises:
        ConfigError: the cluster cannot hold the workers, or what a rank found wrong in the config or data.
        TrainingError: the run cannot go on (NaN, say); it is not retried.
    """
    done = [summary for summary in map(finished, jobs) if summary is not None]
    if len(done) == len(jobs):
        return done
    started = start(run)
    import ray

    progress = run.path / PROGRESS
    progress.touch()
    stop = Event()
    watcher = Thread(target=follow, args=(progress, console, stop), daemon=True)
    watcher.start()
    try:
        check_resources(run)
        check_storage(_folders(jobs))
        with managers(jobs):
            return _fit(jobs, run, progress)
    finally:
        stop.set()
        watcher.join()
        console.close()
        if started:
            ray.shutdown()


def start(run: RunConfig, spare: int = 1, dashboard: bool = False) -> bool:
    """Join the cluster of RAY_ADDRESS, else start one in this machine that ends with this process; False if this process is in one.

    Args:
        spare: logical CPUs of a cluster of our own beyond those of the machine, or of the workers if they are more.
        dashboard: of a cluster of our own.
    """
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        return False
    _start(ray, run, spare, dashboard)
    return True


def _start(ray: Any, run: RunConfig, spare: int, dashboard: bool) -> None:
    if address := os.environ.get("RAY_ADDRESS"):
        check_address(address)
        ray.init(logging_level="WARNING", log_to_driver=False, namespace="raysparse")
        return
    cores = os.cpu_count() or 1
    if run.workers * run.threads > cores:
        log.warning(
            "%d workers of %d threads share %d cores: slow, not wrong. Lower run.workers or run.threads.", run.workers, run.threads, cores
        )
    cpus = max(run.workers * run.threads, cores) + spare  # logical
    ray.init(
        address="local",  # else it would join, or fail at, whatever `ray start` has left running here
        num_cpus=cpus,
        include_dashboard=dashboard,
        object_store_memory=256 << 20,
        logging_level="ERROR",
        log_to_driver=False,
        namespace="raysparse",
    )


def check_address(address: str) -> None:
    """Ray would retry for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(
            f"Expected a Ray cluster at RAY_ADDRESS={address}. Got: {error}. "
            "Start it (ray start --head), correct the address, or unset RAY_ADDRESS to use this machine."
        ) from None


def check_resources(run: RunConfig) -> None:
    """A group that can never be placed waits without end; say so instead."""
    import ray

    if grows():
        return
    have = ray.cluster_resources()
    need = {"CPU": float(run.workers * run.threads)} | ({"GPU": float(run.workers)} if uses_gpu(run) else {})
    for name, amount in need.items():
        if have.get(name, 0.0) < amount:
            raise ConfigError(
                f"Expected a cluster with {amount:g} {name} for run.workers={run.workers} (run.threads={run.threads}). "
                f"Got {have.get(name, 0.0):g}. Lower run.workers, or add nodes."
            )


def uses_gpu(run: RunConfig) -> bool:
    """Whether a worker of this run has a GPU, on the cluster that this process is in."""
    import ray

    return run.device == "cuda" or (run.device == "auto" and ray.cluster_resources().get("GPU", 0) >= run.workers)


def _folders(jobs: Sequence[Job]) -> list[Path]:
    """Where the jobs read and write: those of the runs, and the caches of what was prepared."""
    caches = {cache for job in jobs for at in (job.config, job.config.get("data") or {}) if (cache := at.get("cache_dir"))}
    return list(dict.fromkeys([*(job.path.parent for job in jobs), *(Path(cache).expanduser().absolute() for cache in sorted(caches))]))


def _fit(jobs: Sequence[Job], run: RunConfig, progress: Path) -> list[dict[str, Any]]:
    import ray
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import ControllerError

    from raysparse.runtime.worker import work

    api: Any = ray.train  # its types are a union of two generations of the API
    gpu = uses_gpu(run)
    for attempt in range(run.max_failures + 1):
        _forget_snapshot(run)
        trainer = cast(Any, TorchTrainer)(
            work,
            train_loop_config={"jobs": [asdict(job) for job in jobs], "threads": run.threads, "progress": str(progress)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=300),
            scaling_config=api.ScalingConfig(num_workers=run.workers, use_gpu=gpu, resources_per_worker=per_worker(run)),
            run_config=api.RunConfig(
                name=run.name,
                storage_path=str(run.path.parent),
                failure_config=api.FailureConfig(max_failures=run.max_failures),
                checkpoint_config=api.CheckpointConfig(num_to_keep=None),  # raysparse deletes its own, in all runtimes alike
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(run.threads)} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})},
            ),
        )
        try:
            result = trainer.fit().return_value
        except SystemExit:  # Ray Train's handler of Ctrl-C
            raise KeyboardInterrupt from None
        except ControllerError as error:  # a group that could not start; Train itself does not try again
            if attempt == run.max_failures:
                raise
            log.warning("The worker group could not start (%s); trying again in %s s.", error, 2**attempt)
            time.sleep(2**attempt)
            continue
        if "error" in result:
            raise {"ConfigError": ConfigError, "TrainingError": TrainingError}[result["kind"]](result["error"])
        return result["summaries"]
    raise AssertionError("unreachable")


def per_worker(run: RunConfig) -> dict[str, float]:
    """What a worker takes of the cluster."""
    return {"CPU": float(run.threads)} | ({"GPU": 1.0} if uses_gpu(run) else {})


def _forget_snapshot(run: RunConfig) -> None:
    """Ray Train's own list of checkpoints: raysparse finds the newest undamaged one itself, and a list that names a deleted
    checkpoint would keep Train from starting."""
    snapshot = run.path / "checkpoint_manager_snapshot.json"
    snapshot.unlink(missing_ok=True)
