"""From arguments to a checked Config: Hydra composes conf/, layers go over it, the schema judges every key and value."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from posttrain.config.arguments import read_arguments
from posttrain.config.check import check
from posttrain.config.folders import Folders, folders
from posttrain.config.judge import build, judge, where
from posttrain.config.layers import (
    Layer,
    apply,
    command_layer,
    flatten,
    group_content,
    implied_choices,
    nest,
    recipe_layer,
)  # fmt: skip
from posttrain.config.schema import SECTIONS, Config
from posttrain.config.suggest import nearest
from posttrain.config.values import Typed, is_set
from posttrain.errors import ConfigError

MODEL_OR_DATA = ("model.path", "data.train", "data.eval")
"""Keys that say which model or data: with one of them, or a choice model= or data=, the embedded default stays away."""


def resolve(argv: Iterable[str], verb: str = "train") -> Config:
    """key=value arguments (and --config-dir) → the whole Config, or a ConfigError that says what to type instead.

    verb: what the config is for; `eval` needs no data.train, and with eval.harness no data.
    """
    argv = list(argv)
    flat, defaults, origins, stage_name = _gather(argv)
    stage = _stage_class(stage_name)
    judge({k: v for k, v in flat.items() if k.startswith("stage.")}, origins, {"stage": stage}, stage_name)
    nested, plain = _interpolate(flat, stage_name), _interpolate(defaults, stage_name)
    sections = {
        name: build(name, schema, nested.get(name, {}), plain.get(name, {}), origins)
        for name, schema in {"stage": stage, **SECTIONS}.items()
    }
    config = Config(stage_name=stage_name, **sections, overrides=argv)
    check(config, verb)
    return config


def resolve_section(argv: Iterable[str], name: str) -> Any:
    """One section alone, such as run, for who decides what to start: no stage is imported, and so no torch. What is wrong
    with the values of the others is told where the whole is resolved."""
    flat, defaults, origins, stage_name = _gather(list(argv))
    nested, plain = _interpolate(flat, stage_name), _interpolate(defaults, stage_name)
    return build(name, SECTIONS[name], nested[name], plain[name], origins)


def _gather(argv: list[str]) -> tuple[dict[str, Any], dict[str, Any], dict[str, str], str]:
    """Keys and values of all layers, flat; the defaults among them; where each comes from; the stage's name."""
    arguments = read_arguments(argv)
    found = folders(arguments.config_dirs)
    layers = [recipe_layer(found.recipe(name), found) for name in arguments.recipes]
    layers.append(command_layer(arguments.items))
    layers = _with_embedded(layers, found)
    choices = _choose(layers, found)
    defaults = _compose(choices, found)
    flat = dict(defaults)
    for layer in layers:
        apply(flat, layer)
    origins = {key: layer.source for layer in layers for key in layer.values}
    origins |= {key: source for key, source in _group_sources(choices, found).items() if key not in origins}
    stage_name = str(flat.pop("stage.name"))
    judge(flat, origins, SECTIONS)
    return flat, defaults, origins, stage_name


def _with_embedded(layers: list[Layer], found: Folders) -> list[Layer]:
    """conf/embedded/<stage>.yaml goes beneath, where nothing says which model or data."""
    given = any(is_set(layer.values.get(key)) for layer in layers for key in MODEL_OR_DATA)
    if given or any(group in layer.choices for layer in layers for group in ("model", "data")):
        return layers
    chosen = [layer.choices["stage"] for layer in layers if "stage" in layer.choices]
    stage = chosen[-1] if chosen else "sft"
    _check_choice("stage", stage, found, "command line")
    names = (stage, group_content(found, "stage", stage).get("stage.name"))
    file = next((f for name in names if (f := found.group_file("embedded", str(name)))), None)
    return [recipe_layer(file, found), *layers] if file else layers


def _choose(layers: list[Layer], found: Folders) -> dict[str, str]:
    """The choice of each group. A later choice takes what its file says out of the values of earlier layers."""
    choices: dict[str, str] = {}
    for number, layer in enumerate(layers):
        stage = layer.choices.get("stage")
        wanted = (implied_choices(found, "stage", stage) if stage else {}) | layer.choices
        for group, choice in wanted.items():
            _check_choice(group, choice, found, layer.source)
            if choices.get(group) != choice:
                for earlier in layers[:number]:
                    _forget(earlier, group, choices.get(group), choice, found)
            choices[group] = choice
    return choices


def _forget(layer: Layer, group: str, before: str | None, choice: str, found: Folders) -> None:
    content = group_content(found, group, choice)
    if group == "stage":
        same = before is None or group_content(found, group, before).get("stage.name") == content.get("stage.name")
        gone = [] if same else [key for key in layer.values if key.startswith("stage.")]
    else:
        gone = [key for key in layer.values if key.startswith(f"{group}.") and key in content]
    for key in gone:
        del layer.values[key]


def _check_choice(group: str, choice: str, found: Folders, source: str) -> None:
    choices = found.choices(group)
    if choice not in choices:
        near = nearest(choice, choices, 0.5)
        tip = f"; did you mean {group}={near}?" if near else ""
        raise ConfigError(
            f"{group}={choice} does not exist{where(source)}; {group} is one of {', '.join(choices)}{tip}"
        )


def _compose(choices: Mapping[str, str], found: Folders) -> dict[str, Any]:
    """conf/config.yaml with these choices, flat; interpolations unresolved."""
    OmegaConf.register_new_resolver("full_or_adapter", _full_or_adapter, replace=True)
    if "stage" in choices and found.group_file("stage", choices["stage"]) is None:
        _store_stage(choices["stage"])
    overrides = [f"{group}='{choice}'" for group, choice in choices.items()]
    if found.users:
        paths = ",".join(_quote(f"file://{folder}") for folder in found.users)
        overrides.append(f"hydra.searchpath=[{paths}]")
    callers = GlobalHydra.instance().hydra  # a notebook may have initialised Hydra for itself
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(found.own), version_base="1.3", job_name="posttrain"):
            composed = compose("config", overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"the configuration does not compose: {' '.join(str(error).split())}") from None
    finally:
        GlobalHydra.instance().hydra = callers
    plain = OmegaConf.to_container(composed, resolve=False)
    assert isinstance(plain, dict)
    return flatten({str(key): value for key, value in plain.items()})


def _quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def _store_stage(name: str) -> None:
    """A stage of another package needs no YAML: its dataclass's own defaults do."""
    default = dataclasses.asdict(_stage_class(name)())
    ConfigStore.instance().store(
        group="stage", name=name, node={"stage": {"name": name, **default}}, package="_global_", provider="posttrain"
    )


def _full_or_adapter(full: float, adapter: float, *, _root_: Any) -> float:
    """${full_or_adapter:A,B} is A when the whole model trains and B when an adapter does."""
    return full if _root_.adapter.name == "none" else adapter


def _group_sources(choices: Mapping[str, str], found: Folders) -> dict[str, str]:
    """Key → the user's group file that sets it."""
    sources: dict[str, str] = {}
    for group, choice in choices.items():
        file = found.group_file(group, choice)
        if file is not None and found.own not in file.parents:
            sources |= dict.fromkeys(group_content(found, group, choice), str(file))
    return sources


def _stage_class(name: str) -> type:
    """Imports torch, so it waits until everything else is judged."""
    from posttrain.stages.base import find

    return find(name)


def _referring(flat: Mapping[str, Any], typed: set[str]) -> set[str]:
    """Keys whose value is that of a typed key, ${key} and no more, however many steps away."""
    names = {key: re.fullmatch(r"\$\{([\w.]+)\}", value) for key, value in flat.items() if isinstance(value, str)}
    found: set[str] = set()
    while more := {key for key, name in names.items() if name and name[1] in typed | found} - found:
        found |= more
    return found


def _interpolate(flat: Mapping[str, Any], stage_name: str) -> dict[str, Any]:
    """Nested plain values with every ${...} replaced; what was typed stays marked as such."""
    typed = {key for key, value in flat.items() if isinstance(value, Typed)}
    whole = {key: str(value) if key in typed else value for key, value in flat.items()}
    try:
        config = OmegaConf.create(nest({"stage.name": stage_name, **whole}))
        plain = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        at = getattr(error, "full_key", None)
        raise ConfigError(
            f"{at or 'a value'} cannot be interpolated: {reason}; for a plain `${{`, write `\\${{`"
        ) from None
    resolved = flatten(plain)  # type: ignore[arg-type]
    for key in {*typed, *_referring(flat, typed)} & resolved.keys():
        if isinstance(resolved[key], str):
            resolved[key] = Typed(resolved[key])
    del resolved["stage.name"]
    return nest(resolved)
