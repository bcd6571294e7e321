"""docker/compose.yaml, read by the compose specification's own model (package compose-spec) with the variables filled in."""

import re
from typing import Any

import cluster_commands
import pytest
from compose_spec import PyOptions
from conftest import ROOT

FILE = ROOT / "docker" / "compose.yaml"


def compose(**variables: str) -> dict[str, Any]:
    """What compose sees with these in its environment; its model refuses unknown keys and wrong types."""
    text = FILE.read_text(encoding="utf-8")
    text = re.sub(r"\$\{(\w+):-(\w*)\}", lambda found: variables.get(found[1], found[2]), text)
    assert "$" not in text
    read = PyOptions(apply_merge=True).from_yaml(text)
    read.validate()
    found: dict[str, Any] = read.to_dict()
    return found


def test_both_services_are_the_same_image_and_hold_no_secret() -> None:
    made = compose()
    assert set(made["services"]) == {"gpu", "gpus"}
    assert set(made["volumes"]) == {"runs", "cache"}
    for service in made["services"].values():
        assert service["env_file"] == [{"path": "../.env", "required": False}]
        assert "environment" not in service
        assert service["build"]["dockerfile"] == "docker/Dockerfile"
        assert (FILE.parent / service["build"]["context"] / service["build"]["dockerfile"]).is_file()
        assert set(service["build"]["args"]) <= cluster_commands.build_arguments(ROOT / "docker" / "Dockerfile")
        assert service["volumes"] == ["../data:/work/data:ro", "runs:/work/runs", "cache:/cache"]
        assert int(service["shm_size"].removesuffix("gb")) >= 1


@pytest.mark.parametrize(("variables", "gpus"), [({}, 1), ({"GPUS": "4"}, 4)])
def test_as_many_processes_as_gpus(variables: dict[str, str], gpus: int) -> None:
    service = compose(**variables)["services"]["gpus"]
    (device,) = service["deploy"]["resources"]["reservations"]["devices"]
    assert (device["count"], device["capabilities"]) == (gpus, ["gpu"])
    assert service["entrypoint"][:2] == ["tini", "--"]
    cluster_commands.check_torchrun(service["entrypoint"][2:])
    assert f"--nproc_per_node={gpus}" in service["entrypoint"]
    assert f"run.processes={gpus}" in service["entrypoint"]


def test_the_time_to_stop_holds_a_checkpoint() -> None:
    """torchrun must have killed its ranks, and said so, before compose kills torchrun."""
    (waits,) = re.findall(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", (ROOT / "docker" / "Dockerfile").read_text())
    for service in compose()["services"].values():
        assert int(service["stop_grace_period"].removesuffix("m")) * 60 > int(waits)
