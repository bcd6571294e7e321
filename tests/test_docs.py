"""What the documents say is so: every command is run, or by a rule of WHY_NOT composed; every key, file and score exists.

A command is first composed exactly as it is written, and then run as `small` makes it: a model from the hub gives way to
the embedded one, two optimizer steps, a few examples. The commands of a document are run in its order, in one folder.
"""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cluster_commands
import pytest

import posttrain
from posttrain import cli
from posttrain.config import SECTIONS, resolve
from posttrain.config.judge import hints
from posttrain.config.layers import GROUPS
from posttrain.data import embedded
from posttrain.data.columns import Survey
from posttrain.data.formats import detect_format
from posttrain.places import package_folder
from posttrain.stages.base import find, names
from posttrain.sweep.plan import plan

pytestmark = pytest.mark.usefixtures("warm_process")
ROOT = Path(__file__).resolve().parent.parent
README, CONTRIBUTING = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "CONTRIBUTING.md"))
RECIPES = sorted(package_folder("recipes").glob("*.yaml"))
CLUSTER = ("docker", "sbatch", "kubectl")
PROGRAMS = ("posttrain", "make", "pip", "torchrun", "accelerate", "cp", *CLUSTER)
SMALL = {
    "train.steps": "2",
    "schedule.warmup_steps": "1",
    "train.eval_every": "100",
    "data.max_length": "64",
    "data.train_limit": "64",
    "data.eval_limit": "8",
    "eval.generate": "4",
    "eval.max_new_tokens": "4",
    "eval.resamples": "100",
    "precision": "fp32",
}

MOST = {"train.steps": 100, "data.max_length": 128}
"""A command that asks for more gets what SMALL has."""


@dataclass(frozen=True)
class Command:
    """One command, split as a shell splits it. mentioned: it stands in a sentence, not in a block."""

    words: tuple[str, ...]
    mentioned: bool = False

    @property
    def settings(self) -> dict[str, str]:
        return dict(word.split("=", 1) for word in self.words if "=" in word and not word.startswith("-"))

    @property
    def verb(self) -> str | None:
        return cli.split_verb(list(self.ours))[0] if self.words[0] == "posttrain" else None

    @property
    def ours(self) -> tuple[str, ...]:
        """The arguments of posttrain itself, behind a launcher too."""
        return self.words[1:] if self.words[0] == "posttrain" else self.words[self.words.index("posttrain") + 1 :]


WHY_NOT: dict[str, Callable[[Command], bool]] = {
    "it starts several processes": lambda c: (
        c.words[0] in ("torchrun", "accelerate") or "run.processes" in c.settings
    ),  # tests/test_ranks.py, test_launch.py
    "it fetches data from the hub": lambda c: any(
        re.fullmatch(r"[\w-]+/[\w.-]+([:@].*)?", value) and not Path(value).exists()
        for key, value in c.settings.items()
        if key in ("data.train", "data.eval")
    ),
    "it fetches tasks' data from the hub": lambda c: (
        "eval.harness" in c.settings
    ),  # tests/test_harness.py has local ones
    "it asks another's server": lambda c: "stage.rollout_server" in c.settings,  # tests/test_rollout_server.py has one
}
"""The only reasons for which a command is composed and not run."""


# --- reading the documents ---


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """What stands between backticks, fenced blocks apart."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE))


def commands(text: str) -> Iterator[Command]:
    """The commands of the blocks, then those in sentences that say more than a name (`posttrain plan` names a verb)."""
    for block in blocks(text, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield Command(tuple(words))
    for span in spans(text):
        words = span.split(" ")
        if words[0] in PROGRAMS and (len(words) > 1 or words[0] == "posttrain"):
            yield Command(tuple(shlex.split(span)), mentioned=True)


def header(recipe: Path) -> str:
    """The comment at its top."""
    lines = recipe.read_text(encoding="utf-8").splitlines()
    return "\n".join(line[1:] for line in lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))])


def header_commands(recipe: Path) -> list[Command]:
    found = re.findall(r"^   (\S.*)$", header(recipe).replace("\\\n", " "), re.MULTILINE)
    return [Command(tuple(shlex.split(line, comments=True))) for line in found]


def tables(text: str, first: str) -> list[list[str]]:
    """The rows of the table whose first column is called `first`."""
    rows = text.split(f"\n| {first} |")[1].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


# --- running a command ---


def small(settings: dict[str, str], number: int, trains: bool, samples: bool = False) -> list[str]:
    """What is put behind a command, so that it is quick and needs no network. samples: its stage writes answers."""
    extra = {key: value for key, value in SMALL.items() if key not in settings}
    extra |= {key: SMALL[key] for key, most in MOST.items() if int(settings.get(key, "0")) > most}
    if "train.epochs" in settings:
        del extra["train.steps"]
    if "data.mix" in settings:
        del extra["data.train_limit"]  # it would be filled from the first source
    if samples:
        extra |= {"stage.max_new_tokens": "6", "stage.samples": "2"}
    model = settings.get("model.path")
    if (("model" in settings or "recipe" in settings) and model is None) or (model and not Path(model).exists()):
        extra["model.path"] = "embedded"
    if trains and "run.dir" not in settings:
        extra["run.dir"] = f"runs/unnamed-{number}"
    return [f"{key}={value}" for key, value in extra.items()]


def run_posttrain(command: Command, number: int) -> None:
    verb = command.verb or "train"
    if command.mentioned and len(command.words) == 2 and command.verb:
        return  # a verb's name; that it is one, `verb` has found
    arguments = list(command.ours)
    if cli.MULTIRUN in arguments:
        assert plan([argument for argument in arguments if argument != cli.MULTIRUN]).jobs
        return  # tests/test_sweep.py runs some
    if "--help" not in arguments and cli.VERBS[verb].takes_config:
        stage = resolve(cli.split_verb(arguments)[1], verb).stage
        if any(applies(command) for applies in WHY_NOT.values()):
            return
        arguments += small(command.settings, number, verb in ("train", "eval"), samples=stage.answer_tokens > 0)
        arguments = [a for a in arguments if not a.startswith("model=")]
    assert cli.main(arguments) == 0, shlex.join(command.words)


def run_command(command: Command, number: int) -> None:
    """Run it, or do with it what its program's rule says."""
    program, *rest = command.words
    if program == "posttrain":
        run_posttrain(command, number)
    elif program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert set(rest) <= set(targets), f"{rest} is not among the Makefile's {targets}"
    elif program == "pip":
        check_pip(rest)
    elif program in ("torchrun", "accelerate"):
        assert (Path(sys.executable).parent / program).exists()
        assert command.words[command.words.index("posttrain") - 1] == "-m"
        resolve(command.ours)
    elif program in CLUSTER:
        cluster_commands.check(list(command.words))
    elif program == "cp":
        assert (ROOT / rest[-1]).exists()
    else:
        raise AssertionError(f"no rule says how to test {program}: {shlex.join(command.words)}")


def check_pip(rest: list[str]) -> None:
    """The constraints file and the extras it names are there; installing is what CI does."""
    what = rest[-1]
    assert rest[:3] == ["install", "-c", "constraints.txt"]
    assert (ROOT / "constraints.txt").is_file()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = what.partition("[")[2].rstrip("]").split(",") if "[" in what else []
    assert what[0] == "."
    assert set(extras) <= set(project["optional-dependencies"])


def write_files() -> None:
    """The files that the documents' commands read, each with rows of its kind."""
    rows = embedded.rows("prompt_completion", 120)
    qa = [{"question": row["prompt"], "answer": row["completion"]} for row in rows]
    alpaca = [{"instruction": row["prompt"], "input": "", "output": row["completion"]} for row in rows]
    pairs, groups = embedded.rows("pairs", 120), embedded.rows("groups", 60)
    files = {"my": rows, "test": rows[:20], "qa": qa, "gsm8k_train": qa, "gsm8k_test": qa[:20], "pairs": pairs,
             "groups": groups, "prompts": embedded.rows("prompts", 60), "gsm8k_pairs": pairs, "gsm8k_groups": groups}  # fmt: skip
    for name, content in files.items():
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    Path("alpaca.json").write_text(json.dumps(alpaca), encoding="utf-8")
    Path("book.txt").write_text("\n".join(row["prompt"] + row["completion"] for row in rows) * 4, encoding="utf-8")
    with open("more.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["prompt", "completion"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    (recipe,) = blocks(README, "yaml")
    Path("mine/recipes").mkdir(parents=True)
    Path("mine/recipes/short.yaml").write_text(recipe, encoding="utf-8")


@pytest.fixture(autouse=True)
def _files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test starts in a folder with the files, and whoever reads standard input finds one question there."""
    write_files()
    monkeypatch.setattr(sys, "stdin", io.StringIO("12+30=\n"))


# --- README ---


@pytest.mark.long
def test_the_commands_of_the_readme() -> None:
    found = list(commands(README))
    assert {c.words[0] for c in found} == set(PROGRAMS) - {"cp"}
    for number, command in enumerate(found):
        run_command(command, number)
    left = {path.name for path in Path("runs/first").iterdir()}
    listing = README.split("## What a run leaves")[1].split("##")[0]
    told = {
        name.rstrip("/") for name in re.findall(r"(?:^    |(?<=  ))([\w.]+(?:/|\.\w+))(?=\s)", listing, re.MULTILINE)
    }
    assert told == left


def test_the_readme_names_everything_there_is() -> None:
    words = set(re.findall(r"\w+", README))
    stages = {file.stem for file in (package_folder("conf") / "stage").glob("*.yaml")}
    assert not {*cli.VERBS, *stages, *GROUPS, *(recipe.stem for recipe in RECIPES)} - words - {"train"}


def test_the_errors_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    shown = [block.partition("\n") for block in blocks(README, "console")]
    assert shown
    for command, _, said in shown:
        assert cli.main(shlex.split(command.removeprefix("$ posttrain"))) == 2
        assert capsys.readouterr().err == said


@pytest.mark.long
def test_the_table_of_scores_has_every_stages_scores() -> None:
    kinds = {"sft": "prompt_completion", "dpo": "pairs", "gpro": "groups", "reward": "groups", "ppo": "prompts"}
    given = set()
    for stage, kind in kinds.items():
        data = [
            "data.max_length=64",
            f"data.train=embedded:{kind}:64",
            f"data.eval=embedded:{kind}:40:held_out",
            "model.path=embedded",
        ]
        few = [
            *data,
            "train.steps=1",
            "eval.generate=4",
            "eval.verifier=exact",
            "eval.max_new_tokens=4",
            "precision=fp32",
        ]
        few += ["stage.max_new_tokens=4", "stage.rewards=[exact]"] if stage == "ppo" else []
        given |= posttrain.run([f"stage={stage}", f"run.dir={stage}", *few]).metrics.keys()
    cells = [cell.replace(" (of pairs)", "") for cell, _ in tables(README, "score")]
    assert {name for cell in cells for name in cell.split(", ")} == given


@pytest.mark.long
def test_the_demo_of_the_readme() -> None:
    """Its table is what the demo gives (another machine's rounding apart), and the table of scores has all its scores."""
    summary = posttrain.run(["run.dir=demo", "train.eval_every=1000", "eval.resamples=1000"])  # neither changes a value
    shown = README.split("<!-- demo -->")[1].split("```")[1]
    number = r"([+-]?[\d.]+) \[([+-]?[\d.]+), ([+-]?[\d.]+)\]"
    rows = re.findall(rf"^  (\w+) +{number} +{number} +{number} +(\w.*?) *$", shown, re.MULTILINE)
    assert [row[0] for row in rows][:3] == ["accuracy", "nll", "perplexity"]
    for name, start, _, _, end, low, high, *_, verdict in rows:
        assert float(start) == pytest.approx(summary.start[name]["value"], abs=0.005), name
        assert float(low) - 0.02 <= summary.metrics[name]["value"] <= float(high) + 0.02, name
        assert verdict == "no detectable change" or summary.changes[name]["better"] == (verdict == "better"), (
            name,
            end,
        )
    assert f"steps      {summary.steps} of" in shown


def test_the_rows_of_the_readme() -> None:
    found = tables(README, "format")
    assert len(found) > 5
    for format, row, stages in found:
        detected = detect_format(Survey().add([json.loads(row.strip("`"))]))
        assert detected.format == format
        able = {stage for stage in names() if format in find(stage).data_formats}
        assert set(stages.partition(":")[0].split(", ")) == able, row


def test_the_python_of_the_readme(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run = posttrain.run

    def small_run(overrides: list[str]) -> Any:
        settings = Command(tuple(overrides)).settings
        kept = [o for o in overrides if not o.startswith(("model=", "train.steps="))]
        return run([*kept, *small(settings, 0, True), "train.steps=2"])

    monkeypatch.setattr(posttrain, "run", small_run)
    (code,) = blocks(README, "python")
    exec(compile(code, "README.md", "exec"), {})
    said = capsys.readouterr().out
    for shown in re.findall(r"\) +# ([\d. ]+)$", code, re.MULTILINE):
        assert [f"{float(n):.6g}" for n in shown.split()] == [f"{float(n):.6g}" for n in said.splitlines()[-3].split()]


# --- CONTRIBUTING ---


def test_the_commands_of_contributing() -> None:
    found = list(commands(CONTRIBUTING))
    assert ("make", "checks") in {c.words for c in found}
    for number, command in enumerate(found):
        run_command(command, number)


def test_the_paths_of_contributing_exist() -> None:
    tops = {path.name for path in ROOT.iterdir()}
    paths = {
        span.rstrip("/") for span in spans(CONTRIBUTING) if re.fullmatch(r"[\w.]+/[\w./-]*|\w+\.(md|txt|toml)", span)
    }
    ours = {path for path in paths if path.split("/")[0] in tops}
    assert len(ours) > 10
    assert not [path for path in sorted(ours) if not (ROOT / path).exists()]


def test_contributing_shows_every_room() -> None:
    rooms = {path.stem for path in (ROOT / "posttrain").iterdir() if path.name[0] not in "_."}
    picture = CONTRIBUTING.split("## Rooms")[1].split("\n## ")[0]
    assert not sorted(rooms - set(re.findall(r"\w+", picture)))


def test_the_stage_of_contributing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stage that CONTRIBUTING writes, in a package of its own with the entry point that it shows."""
    (code,) = blocks(CONTRIBUTING, "python")
    (toml,) = blocks(CONTRIBUTING, "toml")
    ((name, target),) = tomllib.loads(toml)["project"]["entry-points"]["posttrain.stages"].items()
    module, _, cls = target.partition(":")
    package = Path("site").resolve()
    info = package / f"{module}-0.1.dist-info"
    info.mkdir(parents=True)
    (package / f"{module}.py").write_text(code, encoding="utf-8")
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0.1\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[posttrain.stages]\n{name} = {target}\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(package))
    arguments = [f"stage={name}", "model.path=embedded", "data.train=my.jsonl"]
    summary = posttrain.run([*arguments, *small({}, 0, True)])
    assert summary.stage == name
    assert summary.metrics["nll"]["value"] > 0
    assert cls in vars(sys.modules[module])


# --- recipes ---


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_recipe(recipe: Path) -> None:
    """Its header says what the recipe needs, and its commands work."""
    said = header(recipe)
    assert all(word in said for word in ("Hardware: ", "Time: ", "Expected")), "command, hardware, time, expected"
    found = header_commands(recipe)
    assert any(f"recipe={recipe.stem}" in command.words for command in found)
    for number, command in enumerate(found):
        run_command(command, number)


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda r: r.stem)
def test_a_recipe_can_be_planned(recipe: Path) -> None:
    own = next(command for command in header_commands(recipe) if f"recipe={recipe.stem}" in command.words)
    arguments = [word for word in own.ours if not word.startswith("run.")]
    settings = ["model.path=embedded", "data.max_length=64", "data.train_limit=64", "precision=fp32"]
    settings += ["stage.max_new_tokens=8"] if resolve(arguments).stage.answer_tokens else []
    if resolve(arguments).model.reward:  # a run that is not there yet, as model.path would be
        settings += ["model.reward=null", "stage.rewards=[number]"]
    assert cli.main(["plan", *arguments, *settings]) == 0


# --- all of them ---


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", *(r.name for r in RECIPES)])
def test_every_key_in_the_documents_exists(name: str) -> None:
    file = next(path for path in (ROOT / name, package_folder("recipes") / name) if path.exists())
    unknown = [key for key in keys_in(file.read_text(encoding="utf-8")) if not is_key(key)]
    assert not unknown


def keys_in(text: str) -> list[str]:
    """What is written like a key: section.name, but neither a file's name nor part of a longer dotted name or path."""
    text = re.sub(r"^```(python|console)\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)  # code, and wrong keys
    sections = "|".join([*SECTIONS, "stage"])
    return re.findall(rf"(?<![\w./])((?:{sections})\.(?!(?:py|ya?ml|jsonl?|csv|txt|parquet)\b)[a-z]\w*)", text)


def is_key(key: str) -> bool:
    section, _, name = key.partition(".")
    schemas = [SECTIONS[section]] if section in SECTIONS else [find(stage) for stage in names()]
    return any(name in hints(schema) for schema in schemas)


def test_the_reader_of_keys_sees_what_it_should() -> None:
    text = "`optim.lr` data.columns.prompt=x runs/train.jsonl data.csv posttrain.data.formats eval.nope stage/sft.yaml"
    assert keys_in(text) == ["optim.lr", "data.columns", "eval.nope"]
    assert [is_key(key) for key in ("optim.lr", "eval.nope", "stage.train_on", "stage.nope")] == [
        True,
        False,
        True,
        False,
    ]


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)", (ROOT / name).read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / link).exists()]
