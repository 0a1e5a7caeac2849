"""Run jobs on Ray Train: find or start a cluster, start one worker group, show its progress, outlive what can be outlived."""

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from threading import Event, Thread, Timer, current_thread, main_thread
from typing import Any, cast

from raysparse.config import ConfigError
from raysparse.recipes.job import Job, carrying_out, finished
from raysparse.runtime.mask_actor import managers
from raysparse.runtime.nodes import check_storage, grows
from raysparse.runtime.ray_run import LEAVE, PROGRESS, RESIZE, follow
from raysparse.train.checkpoint import committed
from raysparse.train.error import Left, TrainingError
from raysparse.train.metrics import Console
from raysparse.train.run import RunConfig

log = logging.getLogger(__name__)

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # no telemetry
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # CPU workers see CUDA_VISIBLE_DEVICES as it is
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # the controller's poll: how soon a lost worker and the end are seen
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "10",  # a worker that is stopped is asked to leave its group, before it is killed
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths mean what they mean to the user
    "RAY_worker_niceness": "0",  # Ray's 15 would starve the workers beside anything else
    "RAY_ENABLE_AUTO_CONNECT": "0",  # a call after shutdown must not start another cluster
}

PATIENCE_S = 1800
"""How long ranks wait for one that judges, exports or reads alone; what hangs in a step, or is stopped, is ended by run.hang_timeout_s."""


ELASTIC = SETTINGS | {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15"}
"""Of a run that goes on with fewer workers: the first group after a loss is tried at the old size, in vain."""

LOOKS_EVERY_S = 30.0
"""How often it is seen whether an elastic run may have more workers."""


def launch(jobs: Sequence[Job], run: RunConfig, console: Console) -> list[dict[str, Any]]:
    """Carry out the jobs one after another in one group of as many ranks as `run.workers` allows; returns their summaries.

    Ranks that die are replaced up to ``run.max_failures`` times, and as often again where a newer checkpoint was saved meanwhile; the
    group then skips the jobs that are finished and goes on from the newest checkpoint of the one that is not.

    Raises:
        ConfigError: the cluster cannot hold the workers, or what a rank found wrong in the config or data.
        TrainingError: the run cannot go on (NaN, say); it is not retried.
        Left: this process was told to end (SIGTERM), and the workers have saved and left.
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
        with carrying_out(jobs):
            check_resources(run)
            check_storage(_folders(jobs))
            with managers(jobs), _passing_on_sigterm(progress.with_name(LEAVE), run.grace_s):
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
    for key, value in (ELASTIC if run.elastic else SETTINGS).items():
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
    workers = run.sizes[-1]
    if workers * run.threads > cores:
        log.warning(
            "%d workers of %d threads share %d cores: slow, not wrong. Lower run.workers or run.threads.", workers, run.threads, cores
        )
    cpus = max(workers * run.threads, cores) + spare  # logical
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
    need = {name: run.sizes[0] * amount for name, amount in per_worker(run).items()}
    for name, amount in need.items():
        if have.get(name, 0.0) < amount:
            raise ConfigError(
                f"Expected a cluster with {amount:g} {name} for run.workers={run.workers} (run.threads={run.threads}). "
                f"Got {have.get(name, 0.0):g}. Lower run.workers, or add nodes."
            )


def uses_gpu(run: RunConfig) -> bool:
    """Whether a worker of this run has a GPU, on the cluster that this process is in."""
    import ray

    return run.device == "cuda" or (run.device == "auto" and ray.cluster_resources().get("GPU", 0) >= run.sizes[0])


@contextmanager
def _passing_on_sigterm(leave: Path, grace_s: float) -> Iterator[None]:
    """Inside, a SIGTERM asks the workers to save and leave; this process waits for them, up to `grace_s`, or to a second SIGTERM.

    `ray job stop`, and whoever takes a machine back, signals this process alone.
    """
    leave.unlink(missing_ok=True)
    if current_thread() is not main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGTERM)
    timer = Timer(grace_s, lambda: os.kill(os.getpid(), signal.SIGTERM))
    timer.daemon = True

    def late(*_: object) -> None:
        raise KeyboardInterrupt("The workers did not save and leave in time. The same command goes on from the last checkpoint.")

    def ask(*_: object) -> None:
        signal.signal(signal.SIGTERM, late)
        leave.touch()
        timer.start()

    signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
        leave.unlink(missing_ok=True)


def _folders(jobs: Sequence[Job]) -> list[Path]:
    """Where the jobs read and write: those of the runs, and the caches of what was prepared."""
    caches = {cache for job in jobs for at in (job.config, job.config.get("data") or {}) if (cache := at.get("cache_dir"))}
    return list(dict.fromkeys([*(job.path.parent for job in jobs), *(Path(cache).expanduser().absolute() for cache in sorted(caches))]))


def _fit(jobs: Sequence[Job], run: RunConfig, progress: Path) -> list[dict[str, Any]]:
    import ray
    import ray.train
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.constants import WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR
    from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError

    from raysparse.runtime.backend import Backend
    from raysparse.runtime.resize import SaveFirst
    from raysparse.runtime.worker import work

    api: Any = ray.train  # its types are a union of two generations of the API
    gpu, attempt = uses_gpu(run), 0
    os.environ[WORKER_HEALTH_CHECK_TIMEOUT_S_ENV_VAR] = str(run.hang_timeout_s)
    resize = run.path / RESIZE
    resize.unlink(missing_ok=True)
    while True:
        before = _saved(jobs)
        _forget_snapshot(run)
        trainer = cast(Any, TorchTrainer)(
            work,
            train_loop_config={"jobs": [asdict(job) for job in jobs], "threads": run.threads, "progress": str(progress)},
            torch_config=Backend(backend="nccl" if gpu else "gloo", timeout_s=PATIENCE_S),
            scaling_config=api.ScalingConfig(
                num_workers=run.workers, use_gpu=gpu, resources_per_worker=per_worker(run), elastic_resize_monitor_interval_s=LOOKS_EVERY_S
            ),
            run_config=api.RunConfig(
                name=run.name,
                storage_path=str(run.path.parent),
                callbacks=[SaveFirst(resize, run.grace_s)] if run.elastic else [],
                failure_config=api.FailureConfig(max_failures=run.max_failures),
                checkpoint_config=api.CheckpointConfig(num_to_keep=None),  # raysparse deletes its own, in all runtimes alike
                worker_runtime_env={"env_vars": {"OMP_NUM_THREADS": str(run.threads)} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})},
            ),
        )
        try:
            result = trainer.fit().return_value
        except SystemExit:  # Ray Train's handler of Ctrl-C
            raise KeyboardInterrupt from None
        except TrainingFailedError as error:
            if _saved(jobs) > before and run.max_failures:  # Train counts the losses of its whole life
                attempt = 0
            elif isinstance(error, ControllerError) and attempt < run.max_failures:  # no group could start; Train does not try again
                attempt += 1
            else:
                raise
            log.warning("The worker group was lost (%s); trying again in %s s.", error, 2**attempt)
            time.sleep(2**attempt)
            continue
        if "error" in result:
            raise {"ConfigError": ConfigError, "TrainingError": TrainingError, "Left": Left}[result["kind"]](result["error"])
        return result["summaries"]


def _saved(jobs: Sequence[Job]) -> tuple[int, str]:
    """How far the jobs would go on from: how many are finished, and the newest checkpoint of the one that is not."""
    done = [finished(job) is not None for job in jobs]
    checkpoints = committed(jobs[done.index(False)].path / "checkpoints") if False in done else []
    return sum(done), checkpoints[-1].name if checkpoints else ""


def per_worker(run: RunConfig) -> dict[str, float]:
    """What a worker takes of the cluster."""
    return {"CPU": float(run.threads)} | ({"GPU": 1.0} if uses_gpu(run) else {})


def _forget_snapshot(run: RunConfig) -> None:
    """Ray Train's own list of checkpoints: raysparse finds the newest undamaged one itself, and a list that names a deleted
    checkpoint would keep Train from starting."""
    snapshot = run.path / "checkpoint_manager_snapshot.json"
    snapshot.unlink(missing_ok=True)
