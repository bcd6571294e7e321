"""The commands of docker/ and of the README's section on it: whatever of them can be checked without a cluster."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path

import yaml
from torch.distributed.run import get_args_parser

from posttrain import cli
from posttrain.config import resolve

ROOT = Path(__file__).resolve().parent.parent


def header(file: Path) -> str:
    """The comment at a file's top, without its marks."""
    lines = file.read_text(encoding="utf-8").splitlines()
    lines = lines[1:] if lines[0].startswith("#!") else lines
    return "\n".join(line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def header_commands(file: Path) -> list[list[str]]:
    """What stands indented in it."""
    found = re.findall(r"^   (\S.*)$", header(file).replace("\\\n", " "), re.MULTILINE)
    return [shlex.split(line) for line in found]


def build_arguments(dockerfile: Path) -> set[str]:
    return set(re.findall(r"^ARG (\w+)", dockerfile.read_text(encoding="utf-8"), re.MULTILINE))


def services() -> set[str]:
    return set(yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))["services"])


def check_settings(words: list[str], verbs: bool = True) -> None:
    """They compose, under the verb if there is one; a run's directory needs none."""
    verb, rest = cli.split_verb(words)
    assert verbs or verb is None, words
    if verb is None or cli.VERBS[verb].takes_config:
        resolve(rest, verb or "train")


def check_torchrun(words: list[str]) -> None:
    """torchrun itself reads the options; what it starts is posttrain with settings that compose."""
    assert words[0] == "torchrun"
    read = get_args_parser().parse_args(words[1:])
    assert (read.module, read.training_script) == (True, "posttrain")
    check_settings(read.training_script_args, verbs=False)


def after(words: list[str], options: dict[str, bool]) -> tuple[list[str], dict[str, str]]:
    """The words behind a program's options, and those. options: name → whether it takes the next word as its value."""
    found: dict[str, str] = {}
    while words and words[0].startswith("-"):
        name, equals, value = words[0].partition("=")
        assert name in options, f"{name} is no option known here"
        takes_next = options[name] and not equals
        found[name] = words[1] if takes_next else value
        words = words[2 if takes_next else 1 :]
    return words, found


def check_build(words: list[str]) -> None:
    rest, options = after(words, {"-f": True, "-t": True, "--build-arg": True})
    assert rest == ["."]
    assert (ROOT / options["-f"]).is_file()
    if "--build-arg" in options:
        assert options["--build-arg"].partition("=")[0] in build_arguments(ROOT / options["-f"])


def check_run(words: list[str]) -> None:
    takes = {"--gpus": True, "--shm-size": True, "-v": True, "-e": True, "--user": True, "--entrypoint": True}
    (image, *rest), options = after(words, {**takes, "--env-file": True, "--rm": False})
    assert image == "posttrain"
    if options.get("--entrypoint") == "torchrun":
        check_torchrun(["torchrun", *rest])
    else:
        check_settings(rest)


def check_compose(words: list[str]) -> None:
    (action, *rest), options = after(words, {"-f": True})
    assert (ROOT / options["-f"]).is_file()
    if action == "build":
        return
    assert action == "run"
    (service, *settings), options = after(rest, {"--rm": False, "-T": False, "--entrypoint": True})
    assert service in services()
    if "--entrypoint" not in options:
        check_settings(settings, verbs=service == "gpu")


def check_sbatch(words: list[str]) -> None:
    options = {"--nodes": False, "--gpus-per-node": False, "--time": False, "--export": False, "--signal": False}
    (script, *settings), _ = after(words, options)
    assert (ROOT / script).is_file()
    check_settings(settings, verbs=False)


def check_kubectl(words: list[str]) -> None:
    if words[0] == "apply":
        assert words[1] == "-f"
        assert (ROOT / words[2]).is_file()
    else:
        assert words[0] in ("create", "logs", "wait", "delete")


DOCKER: dict[str, Callable[[list[str]], None]] = {"build": check_build, "run": check_run, "compose": check_compose}


def check(words: list[str]) -> None:
    """AssertionError, or posttrain's own error, where the command cannot be right."""
    while re.fullmatch(r"[A-Z]+=\w+", words[0]):  # GPUS=4 docker ...
        words = words[1:]
    program, *rest = words
    if program == "docker" and rest[0] in DOCKER:
        DOCKER[rest[0]](rest[1:])
    elif program == "docker":
        assert rest[0] in ("stop", "buildx")
    elif program == "sbatch":
        check_sbatch(rest)
    elif program == "kubectl":
        check_kubectl(rest)
    elif program != "--build-arg":  # the other base, which stands alone
        raise AssertionError(f"no rule says how to check {program}")
