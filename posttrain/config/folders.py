"""Where YAML is found: the package's conf/ and recipes/, installed or editable, and the user's --config-dir folders."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from posttrain.config.suggest import nearest
from posttrain.errors import ConfigError
from posttrain.places import package_folder

STAGE_ENTRY_POINTS = "posttrain.stages"
"""The group of posttrain.stages.base, repeated here because that module imports torch."""


@dataclass(frozen=True)
class Folders:
    """The package's own folder of groups, then the user's, in the order in which they are searched."""

    own: Path
    recipes: Path
    users: tuple[Path, ...] = ()

    def choices(self, group: str) -> list[str]:
        """The names of a group's files; stages of other packages need none."""
        found = {file.stem for folder in (self.own, *self.users) for file in (folder / group).glob("*.yaml")}
        if group == "stage":
            found |= {point.name for point in entry_points(group=STAGE_ENTRY_POINTS)}
        return sorted(found)

    def group_file(self, group: str, choice: str) -> Path | None:
        """The file of a choice; the package's own come first, as in Hydra's search path."""
        files = [folder / group / f"{choice}.yaml" for folder in (self.own, *self.users)]
        return next((file for file in files if file.is_file()), None)

    def recipe(self, name: str) -> Path:
        """A recipe's file by path, by the run directory that saved it, or by its name in one of the folders."""
        given = Path(name).expanduser()
        if given.is_file():
            return given
        if (given / "config.yaml").is_file():
            return given / "config.yaml"
        named = {k: v for folder in (*self.users, self.recipes) for k, v in _recipes_in(folder).items()}
        if name.removesuffix(".yaml") in named:
            return named[name.removesuffix(".yaml")]
        if given.is_dir():
            raise ConfigError(f"recipe={name} is a folder without config.yaml; give a YAML file or a run directory")
        near = nearest(Path(name).stem, named)
        tip = f"; did you mean recipe={near}?" if near else ""
        raise ConfigError(f"recipe={name}: no such file, nor a recipe of that name ({_listed(named)}){tip}")


def folders(users: list[str]) -> Folders:
    """Folders with these --config-dir ones, each of which must exist."""
    paths = [Path(user).expanduser() for user in users]
    missing = [str(p) for p in paths if not p.is_dir()]
    if missing:
        raise ConfigError(f"--config-dir {missing[0]}: no such folder")
    found = Folders(package_folder("conf"), package_folder("recipes"), tuple(p.resolve() for p in paths))
    for file in found.own.glob("*/*.yaml"):
        for folder in found.users:
            if (folder / file.relative_to(found.own)).is_file():
                raise ConfigError(
                    f"{folder / file.relative_to(found.own)} has the name of a built-in choice; rename it"
                )
    return found


def read_yaml(file: Path) -> dict[str, Any]:
    """A YAML file's mapping, interpolations untouched."""
    try:
        content = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{file}: broken YAML: {' '.join(str(error).split())}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from None
    plain = OmegaConf.to_container(content, resolve=False)
    if not isinstance(plain, dict):
        raise ConfigError(f"{file} must hold a mapping, such as `optim: {{lr: 1e-4}}`")
    return {str(key): value for key, value in plain.items()}


def is_global(file: Path) -> bool:
    """Whether the file's keys are whole keys, by Hydra's header `# @package _global_`."""
    with file.open(encoding="utf-8") as lines:
        return any(line.split() == ["#", "@package", "_global_"] for line in lines if line.startswith("#"))


def _recipes_in(folder: Path) -> dict[str, Path]:
    """Name → file; a recipe in a sub-folder is called sub/name."""
    found = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    roots = [folder, folder / "recipes"] if folder.name != "recipes" else [folder]
    for root in roots[-1:]:
        found |= {str(file.relative_to(root).with_suffix("")): file for file in sorted(root.rglob("*.yaml"))}
    return found


def _listed(names: dict[str, Path]) -> str:
    return f"there are: {', '.join(sorted(names))}" if names else "there are none"
