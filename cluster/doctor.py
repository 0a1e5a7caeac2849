"""A cluster from the inside: whether its nodes are alike, see each other and the same storage; what is wrong, and what to do."""

import logging
import os
import secrets
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster import probe
from raysparse.config import ConfigError
from raysparse.report import bytes_text
from raysparse.runtime import interface
from raysparse.runtime.launch import SETTINGS

PATIENCE_S = 60.0
"""For any answer of a node."""
SENT_BYTES = 32 << 20
"""Of the object that is sent from node to node."""
SLOW_BYTES_PER_S = 50e6
LEAST_SHM_BYTES = 1 << 30
MOST_CLOCK_S = 1.0
"""Clocks that differ more make logs and timeouts lie."""


def examine(address: str | None, folder: str | None) -> dict[str, Any]:
    """The facts of every node, and ``problems``: what is wrong and what to do; ``well`` is whether there are none.

    Args:
        address: of the cluster as `ray.init` takes it; None is RAY_ADDRESS, else the one on this machine.
        folder: that all nodes shall share.

    Raises:
        ConfigError: there is no cluster, or it does not let us in.
    """
    ray = _join(address or os.environ.get("RAY_ADDRESS") or "auto")
    try:
        return _examine(ray, folder)
    finally:
        ray.shutdown()


def _join(address: str) -> Any:
    if address.startswith("http"):
        raise ConfigError(
            f"Expected to be on a node of the cluster. Got the address of its dashboard, {address}. Run this there: "
            f"ray job submit --address {address} -- raysparse doctor --cluster"
        )
    host, _, port = address.removeprefix("ray://").rpartition(":")
    try:
        if host and port.isdigit():  # Ray would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _nobody(address, str(error)) from None
    for key, value in SETTINGS.items():
        os.environ.setdefault(key, value)
    import ray
    from ray.exceptions import AuthenticationError

    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, namespace="raysparse")
    except AuthenticationError as error:
        raise ConfigError(
            f"Expected a token that the cluster at {address} takes. Got: {str(error).splitlines()[0]}. "
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH."
        ) from None
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise _nobody(address, str(error).splitlines()[0]) from None
    return ray


def _nobody(address: str, problem: str) -> ConfigError:
    return ConfigError(
        f"Expected a Ray cluster at {address}. Got: {problem:.300}. Run this on one of its nodes, or give its address: "
        "raysparse doctor --cluster HEAD:6379. A cluster with tokens wants RAY_AUTH_MODE=token and RAY_AUTH_TOKEN."
    )


def _examine(ray: Any, folder: str | None) -> dict[str, Any]:
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    for module in (probe, interface):
        ray.cloudpickle.register_pickle_by_value(module)
    alive = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: (node["NodeManagerAddress"], node["NodeID"]))
    names = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:6]})" for node in alive}
    actor = ray.remote(num_cpus=0, max_restarts=0)(probe.Probe)
    probes = {n: actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(n, soft=False)).remote() for n in names}
    told = _ask(ray, {n: p.facts.remote() for n, p in probes.items()})
    nodes: dict[str, Any] = {names[n]: told[n] for n in names if isinstance(told[n], dict)}
    problems = [
        f"{names[n]} gave no answer: {told[n]}. See its logs (ray logs), or take it out of the cluster."
        for n in names
        if names[n] not in nodes
    ]
    probes = {names[n]: p for n, p in probes.items() if names[n] in nodes}
    for node in alive:
        if (name := names[node["NodeID"]]) in nodes:
            nodes[name] |= {"ray_gpus": int(node["Resources"].get("GPU", 0)), "ray_cpus": int(node["Resources"].get("CPU", 0))}
            nodes[name] |= {"clock_s": _clock(ray, probes[name])}
    links = _links(ray, probes)
    problems += [
        *check_versions(nodes),
        *check_gpus(nodes),
        *check_memory(nodes),
        *check_clocks(nodes),
        *check_links(links),
        *check_interfaces(nodes),
    ]
    if folder is not None:
        problems += _check_folder(ray, probes, Path(folder).expanduser().absolute())
    notes = ["No folder was looked at: --folder FOLDER tells whether all nodes share it."] if folder is None and len(nodes) > 1 else []
    return {"nodes": nodes, "links": links, "folder": folder, "problems": problems, "notes": notes, "well": not problems}


def _ask(ray: Any, references: Mapping[str, Any], patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """Name -> answer, or the text of what came instead."""
    from ray.exceptions import GetTimeoutError, RayError

    told, deadline = {}, time.monotonic() + patience_s
    for name, reference in references.items():
        try:
            told[name] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except GetTimeoutError:
            told[name] = f"nothing within {patience_s:g} s"
        except RayError as error:
            told[name] = str(error).strip().splitlines()[-1]
    return told


def _clock(ray: Any, node: Any) -> list[float]:
    """[how far a node's clock is before ours, how far that may be wrong]: the best of some questions, as NTP does it."""
    best = [0.0, float("inf")]
    for _ in range(5):
        before = time.time()
        there = ray.get(node.clock.remote(), timeout=PATIENCE_S)
        after = time.time()
        if (after - before) / 2 < best[1]:
            best = [there - (before + after) / 2, (after - before) / 2]
    return best


def _links(ray: Any, probes: Mapping[str, Any]) -> dict[str, float]:
    """``A -> B`` -> bytes a second, around the ring of nodes, one link after another: through Ray's object store, over TCP."""
    found, names = {}, list(probes)
    if len(names) < 2:
        return found
    for giver, taker in zip(names, [*names[1:], names[0]], strict=True):
        warm, payload = (probes[giver].give.remote(size) for size in (1 << 20, SENT_BYTES))
        ray.wait([warm, payload], num_returns=2, timeout=PATIENCE_S, fetch_local=False)
        ray.get(probes[taker].take.remote([warm]), timeout=PATIENCE_S)
        found[f"{giver} -> {taker}"] = SENT_BYTES / ray.get(probes[taker].take.remote([payload]), timeout=PATIENCE_S)
    return found


def check_versions(nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for package in ("python", *probe.PACKAGES):
        found: dict[str, list[str]] = {}
        for name, facts in nodes.items():
            found.setdefault(facts["versions"][package], []).append(name)
        if len(found) > 1:
            told = "; ".join(f"{version} on {', '.join(where)}" for version, where in found.items())
            problems.append(f"{package} differs: {told}. Install the same everywhere, best from one image.")
        elif "none" in found:
            problems.append(f"{package} is on no node. Install it on all of them.")
    return problems


def check_gpus(nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, facts in nodes.items():
        if len(facts["gpus"]) != facts["ray_gpus"]:
            problems.append(
                f"{name} has {len(facts['gpus'])} GPUs by nvidia-smi, and {facts['ray_gpus']} in Ray. "
                f"Start Ray there with --num-gpus={len(facts['gpus'])}, and a container with --gpus all."
            )
    kinds = {kind for facts in nodes.values() for kind in facts["gpus"]}
    if len(kinds) > 1:
        problems.append(f"GPUs differ: {', '.join(sorted(kinds))}. The slowest sets the pace: use nodes of one kind for a run.")
    return problems


def check_memory(nodes: Mapping[str, Any]) -> list[str]:
    problems = []
    for name, facts in nodes.items():
        if (facts["shm_bytes"] or 0) < LEAST_SHM_BYTES:
            problems.append(
                f"{name} has {bytes_text(facts['shm_bytes'] or 0)} of /dev/shm; Ray's object store and NCCL want at least "
                f"{bytes_text(LEAST_SHM_BYTES)}. Give it more: docker run --shm-size=16g, or an emptyDir of medium Memory at /dev/shm."
            )
    return problems


def check_clocks(nodes: Mapping[str, Any]) -> list[str]:
    return [
        f"The clock of {name} is {offset:+.1f} s off that of this machine. Run chrony or ntpd on all nodes."
        for name, (offset, error) in ((name, facts["clock_s"]) for name, facts in nodes.items())
        if abs(offset) - error > MOST_CLOCK_S
    ]


def check_links(links: Mapping[str, float]) -> list[str]:
    remedy = "Put the nodes into one zone, and see that no tunnel or proxy lies between them."
    return [f"{link} carries {bytes_text(speed)}/s. {remedy}" for link, speed in links.items() if speed < SLOW_BYTES_PER_S]


def check_interfaces(nodes: Mapping[str, Any]) -> list[str]:
    """Of one node alone the host name will do."""
    return [
        f"No network interface of {name} has the address that Ray knows it by, so ranks may look for each other at a wrong one. Start "
        f"Ray there with --node-ip-address, or with {interface.VARIABLE} (and on GPUs NCCL_SOCKET_IFNAME) set to the interface to use."
        for name, facts in nodes.items()
        if len(nodes) > 1 and facts["interface"] is None
    ]


def _check_folder(ray: Any, probes: Mapping[str, Any], folder: Path) -> list[str]:
    """Every node sees what this process writes, and this process sees what every node writes."""
    mark = folder / f".raysparse-{secrets.token_hex(6)}"
    try:
        mark.mkdir(parents=True)
        (mark / "driver").write_text("here")
    except OSError as error:
        return [f"{folder} cannot be written on this machine: {error.strerror}. Mount it, or let your user write there."]
    try:
        files = {name: f"node{k}" for k, name in enumerate(probes)}
        told = _ask(ray, {name: node.visit.remote(str(mark), files[name], 5.0) for name, node in probes.items()})
        for name, file in files.items():
            if told[name] is None and not (mark / file).exists():
                told[name] = f"writes to another {folder} than this machine's"
    finally:
        shutil.rmtree(mark, ignore_errors=True)
    remedy = f"Mount one file system at {folder} on every node, writable for the user that runs Ray."
    return [f"{folder} is not shared: {name} {problem}. {remedy}" for name, problem in told.items() if problem]


def show(facts: Mapping[str, Any]) -> str:
    """The facts in plain lines, the verdict last."""
    lines = []
    for name, node in facts["nodes"].items():
        versions = ", ".join(f"{package} {version}" for package, version in node["versions"].items())
        gpus = ", ".join(f"{node['gpus'].count(kind)} x {kind}" for kind in dict.fromkeys(node["gpus"])) or "no GPU"
        offset, error = node["clock_s"]
        lines += [
            f"node          {name}, {node['host']}",
            f"              {versions}",
            f"              {node['cores']} cores ({node['ray_cpus']} in Ray), {gpus}, /dev/shm {bytes_text(node['shm_bytes'] or 0)}, "
            f"clock {offset:+.3f} s ± {error:.3f}, interface {node['interface'] or 'unknown'}",
        ]
    lines += [
        f"link          {link}: {bytes_text(speed)}/s (object store, {bytes_text(SENT_BYTES)})" for link, speed in facts["links"].items()
    ]
    if facts["folder"] is not None:
        lines.append(f"folder        {facts['folder']}")
    lines += _paragraphs("note", facts["notes"]) + _paragraphs("mend", facts["problems"])
    number = len(facts["nodes"])
    lines.append(f"{number} node{'s' * (number != 1)}: " + ("all is well." if facts["well"] else f"{len(facts['problems'])} to mend."))
    return "\n".join(lines)


def _paragraphs(word: str, texts: Sequence[str]) -> list[str]:
    return [f"{word:<13} {text}" for text in texts]
