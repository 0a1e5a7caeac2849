"""The templates of cluster/ are valid where that can be known without a cloud, close what they open, and share their storage."""

import copy
import json
import os
import re
import shlex
import signal
import subprocess
import time
import tomllib
from pathlib import Path

import jsonschema
import pytest
import ray
import yaml

from raysparse.recipes.pretrain import PretrainConfig

CLUSTER = Path(__file__).parents[2] / "cluster"
LAUNCHER = json.loads((Path(ray.__file__).parent / "autoscaler" / "ray-schema.json").read_text())
KUBERAY_TRIMMED = json.loads(Path(__file__).with_name("kuberay_trimmed.schema.json").read_text())


def documents(name):
    return list(yaml.safe_load_all((CLUSTER / name).read_text()))


def changed(value, path, new):
    value = copy.deepcopy(value)
    at = value
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return value


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_takes_them(name):
    (config,) = documents(name)
    jsonschema.validate(config, LAUNCHER)
    for path, wrong in {("max_workers",): "4", ("available_node_types", "gpu", "min_worker"): 1, ("dockre",): {}}.items():
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(changed(config, path, wrong), LAUNCHER)
    assert config["head_node_type"] in config["available_node_types"]
    assert config["provider"]["type"] == name.split(".")[0]


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml"])
def test_the_launcher_s_clusters_are_closed_and_share(name):
    (config,) = documents(name)
    head, worker = (" ".join(config[f"{kind}_start_ray_commands"]) for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in head
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token ray start" in command
    assert list(config["file_mounts"].values()) == ["~/.ray/auth_token"]
    assert any(option.startswith("--shm-size=") for option in config["docker"]["run_options"])
    assert "-v /shared:/shared" in config["docker"]["run_options"]
    assert any(" mount -t nfs" in command and "/shared" in command for command in config["initialization_commands"])
    assert config["available_node_types"]["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize("name", ["rayjob.yaml", "raycluster.yaml"])
def test_the_trimmed_schema_of_kuberay_takes_them(name):
    for document in documents(name):
        jsonschema.validate(document, KUBERAY_TRIMMED)


def specs():
    (_, cluster), (_, job) = documents("raycluster.yaml"), documents("rayjob.yaml")
    return {"raycluster": cluster["spec"], "rayjob": job["spec"]["rayClusterSpec"]}


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (("spec", "workerGroupSpecs", 0, "replica"), 1),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),  # Ray wants strings there
        (("spec", "authOptions", "mode"), "tokens"),
        (("spec", "rayVersion"), 2.6),
        (("kind",), "RayClusters"),
        (("metadata", "name"), "Not_A_Name"),
    ],
)
def test_the_trimmed_schema_refuses(path, wrong):
    document = documents("raycluster.yaml")[1]
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(changed(document, path, wrong), KUBERAY_TRIMMED)


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_kuberay_s_clusters_are_closed_and_share(name):
    spec = specs()[name]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["rayVersion"] == re.search(r"^ray==(\S+)", (CLUSTER.parent / "constraints.txt").read_text(), re.M)[1]
    head, (group,) = spec["headGroupSpec"], spec["workerGroupSpecs"]
    assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for pod in (head["template"]["spec"], group["template"]["spec"]):
        volumes = {volume["name"] for volume in pod["volumes"]}
        for container in pod["containers"]:
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert set(mounts.values()) <= volumes
            assert mounts["/shared"] == "shared"
        claim = next(volume for volume in pod["volumes"] if volume["name"] == "shared")
        assert claim["persistentVolumeClaim"]["claimName"] == documents("raycluster.yaml")[0]["metadata"]["name"]
        assert next(volume for volume in pod["volumes"] if volume["name"] == "shm")["emptyDir"]["medium"] == "Memory"
    assert int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]) > 0
    board = head["template"]["spec"]["containers"][1]
    assert board["name"] == "tensorboard"
    assert "--host=127.0.0.1" in board["command"]


def test_the_job_s_config_is_one_and_its_cluster_holds_it():
    config_map, job = documents("rayjob.yaml")
    entry = shlex.split(job["spec"]["entrypoint"])
    assert entry == ["python", "-m", "raysparse", "pretrain", f"/config/{next(iter(config_map['data']))}"]
    config = PretrainConfig.check(yaml.safe_load(next(iter(config_map["data"].values()))))
    assert config.run.folder.startswith("/shared/")
    assert config.data.cache_dir.startswith("/shared/")
    (group,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) * group["replicas"] >= config.run.workers
    assert int(limits["cpu"]) // config.run.threads * group["replicas"] >= config.run.workers


SLURM = CLUSTER / "slurm.sh"


def sbatch(text):
    """--name -> value of the #SBATCH lines, which sbatch reads up to the first command."""
    found = {}
    for line in text.splitlines():
        if line.startswith("#SBATCH "):
            (word,) = shlex.split(line.removeprefix("#SBATCH "))
            name, _, value = word.partition("=")
            assert name.startswith("--"), line
            assert name not in found, line
            found[name] = value
        elif line and not line.startswith("#"):
            break
    return found


def test_slurm_s_directives():
    text = SLURM.read_text()
    found = sbatch(text)
    assert len(found) == text.count("#SBATCH "), "a directive after the first command is not read"
    assert found["--ntasks-per-node"] == "1"  # one Ray node each
    assert {"--exclusive", "--requeue"} <= found.keys()  # ray symmetric-run ends all of Ray on a node; a requeued run goes on
    assert int(found["--nodes"]) > 1
    assert re.fullmatch(r"\d+:\d\d:\d\d", found["--time"])
    assert found["--open-mode"] == "append"


def test_slurm_s_script_is_bash_and_calls_what_ray_has():
    done = subprocess.run(["bash", "-n", str(SLURM)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args, symmetric_run

    command = SLURM.read_text().replace("\\\n", " ").split("ray symmetric-run ")[1].partition(" &\n")[0]
    start, _, entry = command.partition(" -- ")
    words = shlex.split(start)
    assert {"address", "min_nodes"} <= {parameter.name for parameter in symmetric_run.params}
    left = curate_and_validate_ray_start_args(words)
    from ray.scripts.scripts import start as ray_start

    known = {name for parameter in ray_start.params for name in parameter.opts}
    assert {word.partition("=")[0] for word in left} <= known
    assert shlex.split(entry) == ["python", "-m", "raysparse", "$@"]
    assert "RAY_AUTH_MODE=token" in SLURM.read_text()


def test_slurm_s_words_reach_raysparse_as_they_are(tmp_path):
    """Run with stand-ins for Slurm: nothing that a user writes is read by a shell again."""
    for name, text in {"scontrol": "echo node1; sleep 0.1; echo node2", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NUM_NODES": "2", "SLURM_CPUS_ON_NODE": "8"}
    words = ["pretrain", "my config.yaml", "run.folder=/s/$(touch gone)", "x=`id`"]
    done = subprocess.run(["bash", str(SLURM), *words], env=env, cwd=tmp_path, capture_output=True, text=True, check=True)
    got = done.stdout.splitlines()
    assert got[-4:] == words
    assert got[got.index("--address") + 1] == "node1:6379"
    assert "--num-gpus=0" in got
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("left", [143, 0, 7])
def test_slurm_s_signal_reaches_the_run_and_its_status_comes_back(tmp_path, left):
    """Of a run that saves and leaves, one that ends by itself, and one that fails: only the first is put in the queue again."""
    stand_ins = {
        "python": f"trap 'sleep 0.3; touch left; exit {left}' TERM; echo $$ > pid; mv pid began; while true; do sleep 0.05; done",
        "scontrol": 'if [ "$1" = requeue ]; then touch "requeued $2"; else echo node1; fi',
        "srun": "exec python -m raysparse pretrain x",
        "pkill": 'printf "%s\\n" "$@" > told; kill -TERM "$(cat began)"',  # never the real one: it would find what others run here
    }
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "node1", "SLURM_JOB_NUM_NODES": "1", "SLURM_CPUS_ON_NODE": "8"}
    job = subprocess.Popen(["bash", str(SLURM), "pretrain", "x"], env=env | {"SLURM_JOB_ID": "12"}, cwd=tmp_path)
    deadline = time.monotonic() + 60
    while not (tmp_path / "began").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(60) == left
    assert (tmp_path / "left").exists()
    assert (tmp_path / "requeued 12").exists() == (left == 143)
    *words, pattern = (tmp_path / "told").read_text().splitlines()
    assert words == ["-TERM", "-u", str(os.getuid()), "-f"]
    told = ["python -m raysparse pretrain x", "/venv/bin/python3.11 -m raysparse finetune y"]
    spared = ["/venv/bin/python3 /venv/bin/ray symmetric-run --address a:6379 -- python -m raysparse pretrain x", "vim python -m raysparse"]
    assert [line for line in told + spared if re.search(pattern, line)] == told


def test_the_image_has_what_a_node_needs():
    lines = (CLUSTER / "Dockerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    project = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text())
    packages = {name.rstrip("*") for name in project["tool"]["setuptools"]["packages"]["find"]["include"]}
    assert {name for name in packages if (CLUSTER.parent / name).is_dir()} <= copied
    assert all((CLUSTER.parent / name).exists() for name in copied)
    allowed = {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied <= allowed
    assert "USER ray" in lines
    for program in ("wget", "rsync", "g++"):  # KubeRay's probes, the launcher, the kernels
        assert any(program in line.split() for line in lines)


def test_the_page_names_every_template():
    page = (CLUSTER / "README.md").read_text()
    for file in CLUSTER.iterdir():
        if file.suffix in (".yaml", ".sh") or file.name == "Dockerfile":
            assert f"({file.name})" in page, f"{file.name} is not in cluster/README.md"


def test_the_page_lists_every_secret():
    from cluster.ship import SECRETS

    page = (CLUSTER / "README.md").read_text()
    assert [pattern for pattern in SECRETS if f"`{pattern}`" not in page] == []
