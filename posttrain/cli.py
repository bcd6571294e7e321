"""The command line: verbs, help, exit statuses. Nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from posttrain import __version__
from posttrain.errors import ConfigError, Stopped, TrainingError, UserError, is_told_here
from posttrain.places import described, package_folder


@dataclass(frozen=True)
class Verb:
    """function: module:name, called with the Config, or with the arguments where the verb has options instead.

    options: how they are typed; the tool parses them, but importing it for its help would import torch.
    """

    function: str
    usage: str
    says: str
    takes_config: bool = True
    options: str = ""


SETTINGS = "[key=value ...]"
VERBS = {
    "train": Verb("posttrain.train:train", SETTINGS, "train (what happens without a verb)"),
    "plan": Verb(
        "posttrain.tools.plan:plan", SETTINGS, "what would happen: data, steps, memory, time; loads no weights"
    ),
    "inspect": Verb(
        "posttrain.tools.inspect:inspect", SETTINGS, "examples as the model sees them, trained tokens marked"
    ),
    "eval": Verb("posttrain.tools.evaluate:evaluate", SETTINGS, "score a model on data.eval, with intervals"),
    "prepare": Verb("posttrain.tools.prepare:prepare", SETTINGS, "tokenise the data to a cache, once"),
    "compare": Verb(
        "posttrain.tools.compare:compare",
        "RUN RUN [RUN ...]",
        "is one better? differences with paired intervals; loads no model",
        takes_config=False,
        options="[--out FILE] [--json FILE] [--resamples N] [--seed N]",
    ),
    "chat": Verb(
        "posttrain.tools.chat:chat",
        "RUN|MODEL",
        "talk to a trained model",
        takes_config=False,
        options="[--system TEXT] [--temperature T|fitted, 0 is greedy] [--max-new-tokens N] [--seed N]",
    ),
    "merge": Verb(
        "posttrain.tools.merge:merge",
        "RUN OUT",
        "a run's adapter merged into its model",
        takes_config=False,
        options="[--dtype auto|float32|bfloat16|float16]",
    ),
    "report": Verb(
        "posttrain.tools.report:report",
        "RUN",
        "write a run's page, RUN/report.html, to open in a browser",
        takes_config=False,
    ),
    "doctor": Verb("posttrain.tools.doctor:doctor", "", "what this machine has and lacks", takes_config=False),
}

EXAMPLES = """\
  posttrain                                                 the embedded demo: a tiny model, offline, about a minute
  posttrain model=smollm2_135m data.train=my.jsonl          fine-tune a real model on your own file
  posttrain stage=lora model.path=ORG/MODEL data.train=my.jsonl optim.lr=1e-4
  posttrain stage=pretrain model=smollm2_135m data.train=book.txt train.steps=200
  posttrain inspect model=smollm2_135m data.train=my.jsonl  look at the data first"""


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 the user's mistake, 130 or 143 stopped, 1 anything else."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments or os.environ.get("POSTTRAIN_DEBUG", "0") not in ("", "0")
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        return _run(arguments)
    except UserError as error:
        _tell_error(error, debug)
        return 2
    except TrainingError as error:
        _tell_error(error, debug)
        return 1
    except Stopped as stopped:
        if is_told_here(stopped):
            print(stopped, file=sys.stderr)
        return 128 + stopped.signal_number
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug or is_told_here(error):
            traceback.print_exc()
        return 1


def _run(arguments: list[str]) -> int:
    if "--version" in arguments:
        print(f"posttrain {__version__}")
        return 0
    name, rest = split_verb(arguments)
    if "--help" in rest or "-h" in rest:
        print(help_screen() if name is None else verb_screen(name))
        return 0
    verb = VERBS[name or "train"]
    if not verb.takes_config:
        _load(verb)(rest)
        return 0
    from posttrain.config import check_processes, resolve

    config = resolve(rest, name or "train")
    if name in (None, "train"):
        check_processes(config)
    _load(verb)(config)
    return 0


def split_verb(arguments: list[str]) -> tuple[str | None, list[str]]:
    """The verb, if the first argument is one, and the other arguments. A first word that is no verb is an error."""
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        return None, arguments
    if arguments[0] == "help":
        return None, ["--help"]
    if arguments[0] in VERBS:
        return arguments[0], arguments[1:]
    near = get_close_matches(arguments[0], VERBS, n=1)
    tip = f"did you mean posttrain {near[0]}?" if near else "settings are written key=value, such as stage=sft"
    raise ConfigError(f"{arguments[0]} is not a verb; the verbs are {', '.join(VERBS)}; {tip}")


def help_screen() -> str:
    """The first screen: what it does, verbs, stages, examples."""
    stages = described(package_folder("conf") / "stage")
    return "\n".join(
        [
            "posttrain: post-train language models; every score comes with its interval.",
            "",
            "usage: posttrain [verb] [key=value ...]",
            "",
            "verbs",
            *(f"  {name:<9}{verb.usage:<17}{verb.says}" for name, verb in VERBS.items()),
            "",
            "stages (stage=NAME)",
            *(f"  {name:<9}{says}" for name, says in stages.items()),
            "",
            "examples",
            EXAMPLES,
            "",
            "recipe=NAME|PATH applies a whole experiment, for example an earlier run: recipe=runs/NAME/config.yaml",
            "--config-dir FOLDER adds your own recipes and groups; --debug shows tracebacks; --version",
            "posttrain train --help lists every key with its default and meaning",
        ]
    )


def verb_screen(name: str) -> str:
    """A verb's usage; for verbs on a config also every key: conf/config.yaml and the stages' own keys."""
    verb = VERBS[name]
    head = " ".join(word for word in ("usage: posttrain", name, verb.usage, verb.options) if word) + f"\n{verb.says}"
    if not verb.takes_config:
        return head
    conf = package_folder("conf")
    files = [conf / "config.yaml", *sorted((conf / "stage").glob("*.yaml"))]
    return "\n\n".join([head, *(f"# {file}\n{file.read_text(encoding='utf-8').rstrip()}" for file in files)])


def _load(verb: Verb) -> Callable[[Any], Any]:
    module, _, function = verb.function.partition(":")
    loaded: Callable[[Any], Any] = getattr(importlib.import_module(module), function)
    return loaded


def _tell_error(error: Exception, debug: bool) -> None:
    """A few lines, on one rank of a launch."""
    if debug:
        traceback.print_exc()
    if is_told_here(error):
        print(f"posttrain: error: {error}", file=sys.stderr)
