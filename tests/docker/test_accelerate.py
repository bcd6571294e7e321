"""docker/accelerate/: accelerate's launcher reads them, and says what the posttrain command of their header says."""

import os
from pathlib import Path
from typing import Any

import cluster_commands
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import is_fp8_available
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env
from conftest import ROOT, small_arguments

from posttrain import cli
from posttrain.places import package_folder

FOLDER = ROOT / "docker" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))
DISTRIBUTION = {"NO": {"ddp"}, "MULTI_GPU": {"ddp"}, "FSDP": {"fsdp"}}
"""What accelerate calls it, and posttrain; with one process ddp is a plain run."""


def commands(file: Path) -> list[list[str]]:
    found = cluster_commands.header_commands(file)
    assert found
    for words in found:
        assert words[:2] == ["accelerate", "launch"]
        assert ROOT / words[words.index("--config_file") + 1] == file
    return found


def launched(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, str]]:
    """The launcher's own arguments and what it sets in the environment, as far as it goes without starting a process."""
    monkeypatch.chdir(ROOT)
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words[2:]))
    several = arguments.multi_gpu or arguments.use_fsdp
    made = prepare_multi_gpu_env(arguments) if several else prepare_simple_launcher_cmd_env(arguments)[1]
    return arguments, {name: value for name, value in made.items() if os.environ.get(name) != value}


def settings(arguments: Any) -> dict[str, str]:
    assert (arguments.module, arguments.training_script) == (True, "posttrain")
    return dict(setting.split("=", 1) for setting in arguments.training_script_args)


def needs_groups(file: Path, given: dict[str, str]) -> None:
    """Of a group that this version does not have, nothing can be composed."""
    for group in ("precision", "distribution"):
        name = given.get(group, "ddp")
        if group in given and not (package_folder("conf") / group / f"{name}.yaml").is_file():
            pytest.skip(f"{file.name}: there is no {group}={name}")


def test_there_is_one_for_each_way() -> None:
    assert [file.stem for file in FILES] == ["ddp_bf16", "ddp_fp8", "fsdp2_nodes", "one_gpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_file_says_what_its_command_says(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config_from_file(str(file))  # a key that accelerate does not know is an error
    if config.mixed_precision == "fp8" and not is_fp8_available():
        pytest.skip("no torchao, without which accelerate refuses mixed_precision: fp8")
    for rank, words in enumerate(commands(file)):
        arguments, environment = launched(words, monkeypatch)
        given = settings(arguments)
        assert environment["ACCELERATE_MIXED_PRECISION"] == given["precision"]
        assert given.get("distribution", "ddp") in DISTRIBUTION[config.distributed_type.value]
        assert ("ACCELERATE_USE_FSDP" in environment) == (given.get("distribution") == "fsdp")
        assert int(given.get("run.processes", "1")) == config.num_processes == arguments.num_processes
        if config.num_machines > 1:
            assert (arguments.nnodes, arguments.node_rank) == (str(config.num_machines), rank)
            assert environment["FSDP_VERSION"] == "2"
    assert config.num_machines in (1, rank + 1)


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_the_settings_compose(file: Path) -> None:
    for words in commands(file):
        given = words[words.index("posttrain") + 1 :]
        needs_groups(file, dict(setting.split("=", 1) for setting in given))
        cluster_commands.check_settings(given, verbs=False)


@pytest.mark.usefixtures("warm_process")
@pytest.mark.parametrize(("precision", "status"), [("bf16", 0), ("fp32", 2)])
def test_posttrain_takes_what_agrees_and_refuses_what_does_not(
    precision: str, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With what the launcher has set for one GPU; with several it sets no more that posttrain looks at."""
    folder = Path.cwd()
    _, environment = launched(commands(FOLDER / "one_gpu.yaml")[0], monkeypatch)
    monkeypatch.chdir(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.main(small_arguments(f"precision={precision}", "train.steps=1", "run.dir=r")) == status
    assert ("ACCELERATE_MIXED_PRECISION=bf16" in capsys.readouterr().err) == (status == 2)
