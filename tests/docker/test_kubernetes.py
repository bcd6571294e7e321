"""docker/kubernetes/, by the API's own schemas, strictly (package kubernetes-validate), and what no schema says."""

from pathlib import Path
from typing import Any

import cluster_commands
import kubernetes_validate
import pytest
import yaml
from conftest import ROOT

FOLDER = ROOT / "docker" / "kubernetes"
FILES = sorted(FOLDER.glob("*.yaml"))
OLDEST = "1.31"
"""podFailurePolicy is part of the API for good from here on."""


def resources(file: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(file.read_text(encoding="utf-8")))


def job(name: str) -> Any:
    (found,) = [r for r in resources(FOLDER / name) if r["kind"] == "Job"]
    return found


def refusal(resource: dict[str, Any], version: str) -> str | None:
    """What the API's schema has against it."""
    try:
        kubernetes_validate.validate(resource, version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return str(error)
    return None


def containers(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    (prepare,), (train,) = spec["initContainers"], spec["containers"]
    assert (prepare["name"], train["name"]) == ("prepare", "train")
    return prepare, train


@pytest.mark.parametrize("version", [OLDEST, kubernetes_validate.latest_version()])
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.name)
def test_the_api_takes_it(file: Path, version: str) -> None:
    assert [refusal(resource, version) for resource in resources(file)] == [None] * len(resources(file))


def test_a_mistake_would_be_found() -> None:
    wrong = job("job.yaml")
    wrong["spec"]["template"]["spec"]["containers"][0]["image_"] = wrong["spec"].pop("backoffLimit")
    assert "image_" in str(refusal(wrong, OLDEST))


@pytest.mark.parametrize("name", ["job.yaml", "nodes.yaml"])
def test_what_it_runs_composes_and_is_prepared_as_it_is_trained(name: str) -> None:
    prepare, train = containers(job(name)["spec"]["template"]["spec"])
    assert train["command"][:2] == ["tini", "--"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "0") for word in train["command"]]  # as the cluster does
    cluster_commands.check_torchrun([*words[2:], *train["args"]])
    settings = prepare["args"]
    if "command" in prepare:
        shell = prepare["command"][prepare["command"].index("-c") + 1]
        assert "exec posttrain prepare" in shell
    else:
        assert settings[0] == "prepare"
        settings = settings[1:]
    assert settings == [setting for setting in train["args"] if not setting.startswith("run.processes=")]
    cluster_commands.check_settings(["prepare", *settings])
    assert any(setting.startswith("run.dir=runs/") for setting in settings), "a new pod would start over"


@pytest.mark.parametrize("name", ["job.yaml", "nodes.yaml"])
def test_a_mistake_fails_the_job_and_a_drained_pod_does_not_count(name: str) -> None:
    spec = job(name)["spec"]
    fail, ignore = spec["podFailurePolicy"]["rules"]
    assert fail["action"] == "FailJob"
    assert fail["onExitCodes"] == {"containerName": "prepare", "operator": "In", "values": [2]}
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # the API asks for it where there is a podFailurePolicy


@pytest.mark.parametrize("name", ["job.yaml", "nodes.yaml"])
def test_a_pod_has_what_it_needs_and_no_more(name: str) -> None:
    pod = job(name)["spec"]["template"]["spec"]
    claims = {resource["metadata"]["name"] for resource in resources(FOLDER / "volumes.yaml")}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {v["persistentVolumeClaim"]["claimName"] for v in volumes.values() if "persistentVolumeClaim" in v} == claims
    assert volumes["memory"]["emptyDir"]["medium"] == "Memory"
    dockerfile = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['fsGroup']}\n" in dockerfile
    assert pod["securityContext"]["runAsNonRoot"]
    for container in containers(pod):
        assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/work", "/cache", "/dev/shm"}
        assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        env = {variable["name"]: variable for variable in container["env"]}
        assert int(env.pop("TORCH_ELASTIC_SHUTDOWN_TIMEOUT")["value"]) < pod["terminationGracePeriodSeconds"]
        assert all(set(variable) == {"name", "valueFrom"} for variable in env.values()), "a secret's value stands here"


def test_the_pods_of_several_nodes_find_each_other() -> None:
    (service,) = [r for r in resources(FOLDER / "nodes.yaml") if r["kind"] == "Service"]
    spec = job("nodes.yaml")["spec"]
    pod, name = spec["template"]["spec"], job("nodes.yaml")["metadata"]["name"]
    _, train = containers(pod)
    options = dict(word[2:].split("=", 1) for word in train["command"] if word.startswith("--") and "=" in word)
    nodes, gpus = spec["completions"], train["resources"]["limits"]["nvidia.com/gpu"]
    assert spec["completionMode"] == "Indexed"
    assert spec["parallelism"] == nodes == int(options["nnodes"])
    assert options["node_rank"] == "$(JOB_COMPLETION_INDEX)"
    assert f"run.processes={nodes * gpus}" in train["args"]
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert options["master_addr"] == f"{name}-0.{service['metadata']['name']}"
    assert int(options["master_port"]) == service["spec"]["ports"][0]["port"] == train["ports"][0]["containerPort"]
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
