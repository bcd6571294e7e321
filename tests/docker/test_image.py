"""docker/Dockerfile: what its linter says, and what of it can be checked where no image can be built."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import cluster_commands
import pytest
import torch
from conftest import ROOT

DOCKERFILE = ROOT / "docker" / "Dockerfile"
DEPENDENCIES = ROOT / "docker" / "dependencies.py"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = dict(
    line.split("==")
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
)


def program(name: str) -> str:
    """A linter of the dev extra, beside this Python."""
    return str(Path(sys.executable).parent / name)


def instructions() -> list[tuple[str, str]]:
    """(FROM, ...), (RUN, ...), one a row, comments apart."""
    text = "\n".join(line for line in DOCKERFILE.read_text(encoding="utf-8").splitlines() if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(words[0], words[1]) for line in lines if (words := line.split(" ", 1)) and line.strip()]


def final_stage() -> list[tuple[str, str]]:
    found = instructions()
    return found[max(i for i, (name, _) in enumerate(found) if name == "FROM") :]


def from_the_context() -> set[str]:
    """The paths of the repository that the build reads."""
    found: set[str] = set()
    for name, rest in instructions():
        if name == "COPY" and not rest.startswith("--from"):
            found.update(rest.split()[:-1])
        found.update(re.findall(r"--mount=type=bind,source=([^,]+)", rest))
    return found


def is_sent(path: str) -> bool:
    """By Dockerfile.dockerignore: the last pattern that fits the path, or a folder above it, decides."""
    sent, parts = True, path.split("/")
    for line in Path(f"{DOCKERFILE}.dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = re.escape(line.removeprefix("!")).replace(r"\*\*/", "(?:.*/)?").replace(r"\*", "[^/]*")
        if not line.startswith("#") and any(
            re.fullmatch(pattern, "/".join(parts[:n])) for n in range(1, len(parts) + 1)
        ):
            sent = line.startswith("!")
    return sent


def test_hadolint_finds_nothing() -> None:
    done = subprocess.run([program("hadolint"), str(DOCKERFILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_shellcheck_finds_nothing() -> None:
    scripts = [ROOT / "docker" / "slurm.sh", ROOT / ".ci" / "run", *(ROOT / "tests/docker/fake_slurm").iterdir()]
    done = subprocess.run([program("shellcheck"), *map(str, scripts)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_yamllint_finds_nothing() -> None:
    folder = ROOT / "docker"
    command = [program("yamllint"), "--strict", "-c", str(folder / ".yamllint.yaml"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_base_has_the_tested_torch_and_is_pinned_by_its_digest() -> None:
    (base,) = [rest for name, rest in instructions() if name == "ARG" and rest.startswith("BASE=")]
    assert re.fullmatch(
        rf"BASE=pytorch/pytorch:{re.escape(PINS['torch'])}-cuda[\d.]+-cudnn\d+-runtime@sha256:[0-9a-f]{{64}}", base
    )


def test_a_changed_source_leaves_the_dependencies_layer() -> None:
    """Nothing of the repository but what decides the dependencies comes into the final stage before they are installed."""
    installs = [rest for name, rest in final_stage() if name == "RUN" and "pip install" in rest]
    assert len(installs) == 2
    bound = set(re.findall(r"--mount=type=bind,source=([^,]+)", installs[0]))
    assert bound == {"pyproject.toml", "constraints.txt", "docker/dependencies.py"}
    assert "--mount=type=cache,target=/root/.cache/pip" in installs[0]
    assert "from=wheel" in installs[1]
    assert not [rest for name, rest in final_stage() if name in ("COPY", "ADD")]


def test_it_runs_as_nobody_in_particular() -> None:
    stage = final_stage()
    (user,) = [rest for name, rest in stage if name == "USER"]
    assert user.split(":")[0].isdigit()
    assert int(user.split(":")[0]) > 0
    assert [rest for name, rest in stage if name == "ENTRYPOINT"] == ['["tini", "--", "posttrain"]']
    assert max(i for i, (name, _) in enumerate(stage) if name == "RUN") < stage.index(("USER", user))


def test_no_secret_comes_in() -> None:
    """Neither by name nor with the context, of which only what is listed is seen."""
    for name, rest in instructions():
        if name in ("ARG", "ENV"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|API_KEY|CREDENTIAL", rest, re.IGNORECASE), rest
    for path in (".env", ".git/config", "runs/a/config.json", "data/my.jsonl", "docker/.env", "conf/__pycache__/a.pyc"):
        assert not is_sent(path), path
    for path in from_the_context():
        files = [ROOT / path] if (ROOT / path).is_file() else list((ROOT / path).rglob("*.*"))
        sent = {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts and file.is_file()}
        assert sent
        assert all(map(is_sent, sent))


def test_the_wheel_is_made_from_all_of_its_parts() -> None:
    wheel, project = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"], PROJECT["project"]
    needed = {*wheel["packages"], *wheel["force-include"], project["readme"], *project["license-files"]}
    assert needed | {"pyproject.toml", "constraints.txt", "docker/dependencies.py"} == from_the_context()


def dependencies(*extras: str) -> list[str]:
    command = [sys.executable, str(DEPENDENCIES), *extras]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_dependencies_begin_with_the_torch_that_is_there() -> None:
    own = PROJECT["project"]["dependencies"]
    offered = PROJECT["project"]["optional-dependencies"]
    assert dependencies("") == [f"torch=={torch.__version__}", *own]
    assert dependencies("wandb,math") == [f"torch=={torch.__version__}", *own, *offered["wandb"], *offered["math"]]
    assert set(dependencies("dev")) > {*offered["gguf"], *offered["harness"], "ruff>=0.9"}  # dev names them in turn


def test_an_extra_that_is_none_ends_the_build() -> None:
    done = subprocess.run([sys.executable, str(DEPENDENCIES), "wnb"], capture_output=True, text=True)
    assert done.returncode == 1
    assert "EXTRAS: wnb is no extra; there are wandb, " in done.stderr


WITH_COMMANDS = ("Dockerfile", "compose.yaml", "slurm.sh", "kubernetes/job.yaml", "kubernetes/nodes.yaml")


@pytest.mark.parametrize("file", WITH_COMMANDS)
def test_the_commands_of_a_header(file: str) -> None:
    found = cluster_commands.header_commands(ROOT / "docker" / file)
    assert len(found) >= 2
    for words in found:
        cluster_commands.check(words)
