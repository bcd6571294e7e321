"""What pip installs before the source is there: pyproject.toml's dependencies and those of the extras asked for.

The first line is the torch of this environment, if it has one, of exactly its build (2.13.0+cu130): pip then keeps it.

    python docker/dependencies.py wandb,math
"""

import re
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PROJECT = Path(__file__).resolve().parent / "pyproject.toml"
"""Beside this file in the image's build; in the repository one folder up."""


def dependencies(project: dict, extras: list[str]) -> list[str]:
    """With those of the extras, and of the extras that they name in turn (dev: posttrain[wandb,...])."""
    offered = project.get("optional-dependencies", {})
    found, rest = list(project["dependencies"]), list(extras)
    while rest:
        extra = rest.pop(0)
        if extra not in offered:
            raise SystemExit(f"EXTRAS: {extra} is no extra; there are {', '.join(offered)}")
        for line in offered[extra]:
            ours = re.fullmatch(rf"{project['name']}\[(.+)\]", line)
            if ours:
                rest += [name.strip() for name in ours[1].split(",")]
            else:
                found.append(line)
    return list(dict.fromkeys(found))


def torch_here() -> list[str]:
    try:
        return [f"torch=={version('torch')}"]
    except PackageNotFoundError:
        return []


def main(argv: list[str]) -> None:
    file = PROJECT if PROJECT.is_file() else PROJECT.parent.parent / PROJECT.name
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    extras = [name.strip() for name in ",".join(argv).split(",") if name.strip()]
    print("\n".join([*torch_here(), *dependencies(project, extras)]))


if __name__ == "__main__":
    main(sys.argv[1:])
