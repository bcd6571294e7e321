"""Arguments as they are typed: key=value, with or without Hydra's +, recipe=, and --config-dir."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from posttrain.errors import ConfigError


@dataclass
class Arguments:
    """items: key and value text, in order. recipes, config_dirs: in order."""

    items: list[tuple[str, str]] = field(default_factory=list)
    recipes: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)


def read_arguments(argv: Iterable[str]) -> Arguments:
    """Split each argument at its first `=`; nothing else in a value means anything here."""
    arguments, rest = Arguments(), list(argv)
    while rest:
        argument = rest.pop(0)
        option, equals, value = argument.partition("=")
        if option == "--config-dir":
            if not equals and not rest:
                raise ConfigError("--config-dir needs a folder: --config-dir FOLDER")
            arguments.config_dirs.append(value if equals else rest.pop(0))
            continue
        key = option.lstrip("+")  # + and ++ add a key in Hydra's own grammar; here the schema judges every key alike
        if not equals or not key or key.startswith("-") or any(c.isspace() for c in key):
            raise ConfigError(f"{argument!r} is not key=value, such as optim.lr=1e-4{_tip(argument)}")
        if key.startswith("~"):
            raise ConfigError(f"{argument}: keys cannot be deleted; set {key[1:]}=null instead")
        if key == "recipe":
            arguments.recipes.append(value)
        else:
            arguments.items.append((key, value))
    return arguments


def _tip(argument: str) -> str:
    if argument.startswith("--") and "=" in argument:
        return f"; did you mean {argument.lstrip('-')}?"
    return "; quote it if its value holds spaces" if not argument.startswith("-") else ""
