"""Composition, precedence, quoting, and the words in which each mistake is told."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

import posttrain
from posttrain.config import SECTIONS, Config, check_processes, compose, resolve
from posttrain.config.folders import read_yaml
from posttrain.config.layers import CHOSEN_BY_NAME, flatten
from posttrain.errors import ConfigError
from posttrain.places import package_folder
from posttrain.stages.base import GROUP, Stage, find, names

REAL = ["model.path=m", "data.train=d.jsonl"]
CONF = package_folder("conf")
PACKAGE = Path(posttrain.__file__)


def get(config: Config, key: str):
    """A value by its flat key."""
    return flatten(config.as_dict())[key]


def message(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        resolve(argv)
    return str(caught.value)


@pytest.fixture(autouse=True)
def _composes_anew(monkeypatch):
    """Other tests of this process remember what Hydra composes (tests/warm.py)."""
    monkeypatch.setattr(compose, "_compose", getattr(compose._compose, "__wrapped__", compose._compose))


@pytest.fixture
def write(tmp_path):
    def write(name: str, text: str) -> Path:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    return write


# --- the YAML and the schema ---


def test_yaml_and_schema_have_the_same_keys():
    composed = flatten({k: v for k, v in read_yaml(CONF / "config.yaml").items() if k != "defaults"})
    in_schema = {f"{s}.{f.name}" for s, schema in SECTIONS.items() for f in dataclasses.fields(schema)}
    by_choice = {f"{group}.name" for group in CHOSEN_BY_NAME if group != "stage"}
    assert set(composed) == in_schema - by_choice
    assert list(SECTIONS["model"].__dataclass_fields__) == [k[6:] for k in composed if k.startswith("model.")]


@pytest.mark.parametrize("name", names())
def test_a_stage_has_a_yaml_with_its_own_keys_and_defaults(name):
    assert read_yaml(CONF / "stage" / f"{name}.yaml")["stage"] == {"name": name, **dataclasses.asdict(find(name)())}


NEEDS = {"adamw_bf16": ["model.dtype=bfloat16"]}
"""What a choice asks for besides itself."""


@pytest.mark.parametrize("file", sorted(CONF.rglob("*.yaml")), ids=lambda f: str(f.relative_to(CONF)))
def test_every_yaml_composes_and_every_key_has_a_comment(file):
    group, choice = file.parent.name, file.stem
    if group == "embedded":
        assert resolve([f"stage={choice}"]).model.path == "embedded"
    elif group != CONF.name:
        config = resolve([*REAL, f"{group}={choice}", *NEEDS.get(choice, [])])
        if group in CHOSEN_BY_NAME and group != "stage":
            assert getattr(config, group).name == choice
    lines = file.read_text(encoding="utf-8").splitlines()
    assert any(line.startswith("# ") and "@package" not in line for line in lines), "says nothing about itself"
    if group in ("stage", CONF.name):
        keys = [line for line in lines if line.startswith("  ") and ":" in line and not line.lstrip().startswith("- ")]
        assert not [line for line in keys if " # " not in line and "name:" not in line]


def test_defaults_are_the_documented_ones():
    config = resolve(REAL)
    assert config.stage_name == "sft"
    assert (config.optim.lr, config.optim.betas, config.optim.eps) == (2e-5, [0.9, 0.999], 1e-8)
    assert (config.optim.weight_decay, config.optim.max_grad_norm) == (0, 1)
    assert (config.data.eval_fraction, config.data.max_length, config.batch.size) == (0.05, 1024, 32)
    assert (config.precision.name, config.distribution.name, config.schedule.name) == ("bf16", "ddp", "cosine")
    assert config.train.steps is None
    assert config.train.epochs == 1


@pytest.mark.parametrize(
    ("argv", "lr"),
    [
        (["stage=sft"], 2e-5),
        (["stage=lora"], 2e-4),
        (["stage=sft", "adapter=qlora"], 2e-4),
        (["stage=pretrain"], 3e-4),
        (["stage=pretrain", "adapter=lora"], 3e-3),
        (["stage=lora", "adapter=none"], 2e-5),
        (["stage=lora", "optim.lr=1e-3"], 1e-3),
    ],
)
def test_learning_rate_follows_stage_and_adapter(argv, lr):
    assert resolve([*REAL, *argv]).optim.lr == pytest.approx(lr)


# --- mistakes ---

KEYS = [
    ("optim.lrr=1", "optim.lrr", "optim.lr"),
    ("+optim.lrr=1", "optim.lrr", "optim.lr"),
    ("++optim.lrr=1", "optim.lrr", "optim.lr"),
    ("batch.siz=3", "batch.siz", "batch.size"),
    ("lr=1", "lr", "optim.lr"),
    ("max_length=3", "max_length", "data.max_length"),
    ("optimizer.lr=1", "optimizer.lr", "optim.lr"),
    ("learning_rate=1", "learning_rate", "optim.lr"),
    ("per_device_train_batch_size=1", "per_device_train_batch_size", "batch.micro_size"),
    ("stge=sft", "stge", "stage"),
    ("normalize=token", "normalize", "stage.normalize"),
    ("stage.trainon=last", "stage.trainon", "stage.train_on"),
    ("+stage.trainon=last", "stage.trainon", "stage.train_on"),
]


@pytest.mark.parametrize(("argument", "given", "meant"), KEYS)
def test_unknown_key_on_the_command_line(argument, given, meant):
    said = message(*REAL, argument)
    assert said.startswith(f"{given} is not a key")
    assert said.endswith(f"did you mean {meant}?")


@pytest.mark.parametrize("body", ["optim: {lrr: 1}", "optim.lrr: 1"])
def test_unknown_key_in_a_recipe_names_the_file(write, body):
    file = write("mine.yaml", f"model: smollm2_135m\ndata: {{train: d.jsonl}}\n{body}\n")
    said = message(f"recipe={file}")
    assert "optim.lrr is not a key" in said
    assert str(file) in said
    assert "did you mean optim.lr?" in said


def test_unknown_key_in_a_users_group_names_the_file(write, tmp_path):
    file = write("conf/optim/mine.yaml", "name: adamw\nlrr: 1\n")
    said = message(*REAL, f"--config-dir={tmp_path / 'conf'}", "optim=mine")
    assert "optim.lrr is not a key" in said
    assert str(file) in said


def test_key_below_a_value():
    assert message(*REAL, "optim.lr.x=1") == "optim.lr.x is not a key: optim.lr holds one value"


def test_key_of_another_stage():
    said = message(*REAL, "stage=pretrain", "stage.train_on=last")
    assert "stage.train_on is not a key of stage=pretrain" in said
    assert "stage.label_smoothing" in said


@pytest.mark.parametrize(
    ("argument", "listed", "near"),
    [
        (
            "stage=stf",
            "dpo, gpro, grpo, lora, ppo, ppo_kl, pretrain, qlora, reward, rloo, sft",
            "did you mean stage=sft?",
        ),
        ("stage=nothing_like_it", "pretrain", ""),
        ("adapter=lorra", "lora, none, qlora", "did you mean adapter=lora?"),
        ("precision=bf61", "bf16, fp16, fp32, fp8, tf32", "did you mean precision=bf16?"),
        ("precision.name=bf61", "bf16, fp16, fp32, fp8, tf32", "did you mean precision=bf16?"),
        ("optim=adam", "adamw", "did you mean optim=adamw?"),
        ("model=smollm2_135", "smollm2_135m", "did you mean model=smollm2_135m?"),
    ],
)
def test_unknown_choice_lists_the_choices(argument, listed, near):
    said = message(*REAL, argument)
    assert listed in said
    assert said.endswith(near)


VALUES = [
    ("optim.lr=abc", "optim.lr must be a number, got abc; try 2e-05"),
    ("optim.lr=", "optim.lr must be a number, got ''; try 2e-05"),
    ("optim.lr=true", "optim.lr must be a number, got true; try 2e-05"),
    ("optim.lr=nan", "optim.lr must be a number, got nan; try 2e-05"),
    ("optim.lr=1e-4,2e-4", "optim.lr must be a number, got 1e-4,2e-4; try 2e-05"),
    ("optim.lr=-1", "optim.lr must be > 0, got -1; try 2e-05"),
    ("optim.lr=0", "optim.lr must be > 0, got 0; try 2e-05"),
    ("optim.lr=null", "optim.lr must be a number, got null; try 2e-05"),
    ("batch.size=0", "batch.size must be >= 1, got 0; try 32"),
    ("batch.size=1.5", "batch.size must be a whole number or null, got 1.5; try 32"),
    ("optim.betas=[1,2]", "every item of optim.betas must be >= 0 and < 1, got 1; try [0.9, 0.999]"),
    ("optim.betas=[.9]", "optim.betas must have 2 items, got [0.9]; try [0.9, 0.999]"),
    ("data.shuffle=maybe", "data.shuffle must be true or false, got maybe; try true"),
    ("data.on_too_long=drp", "data.on_too_long must be one of drop, truncate, split, error or null, got drp; did you mean drop?"),
    ("data.eval_fraction=1", "data.eval_fraction must be >= 0 and < 1, got 1; try 0.05"),
    ("data.columns=prompt", "data.columns must be a mapping, such as {key: value}, got prompt; try {}"),
    ("stage.label_smoothing=1", "stage.label_smoothing must be >= 0 and < 1, got 1; try 0"),
    ("stage.train_on=lst", "stage.train_on must be one of all, last or a list, such as [a, b], got lst; did you mean last?"),
    ("train=3", "train is a section, not a value (command line); set its keys, such as train.steps"),
]  # fmt: skip


@pytest.mark.parametrize(("argument", "said"), VALUES)
def test_bad_value_names_key_value_and_what_is_allowed(argument, said):
    assert message(*REAL, argument) == said


def test_bad_value_in_a_recipe_names_the_file(write):
    file = write("mine.yaml", "optim: {lr: fast}\n")
    assert message(f"recipe={file}") == f"optim.lr must be a number, got fast; try 2e-05 (in {file})"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train.steps=10", "train.epochs=2"], ["train.steps=10 and train.epochs=2"]),
        (["batch.size=10", "batch.tokens=2"], ["batch.size=10 and batch.tokens=2"]),
        (["batch.micro_size=1", "batch.micro_tokens=2"], ["batch.micro_tokens=2 and batch.micro_size=1"]),
        (["run.dir=a", "run.name=b"], ["run.dir=a and run.name=b"]),
        (["train.epochs=null"], ["neither train.steps nor train.epochs"]),
        (["adapter.path=a"], ["adapter.path=a", "adapter=none"]),
        (["eval.verifier=exact", "eval.generate=0"], ["eval.verifier=exact", "eval.generate"]),
        (["train.steps=10", "schedule.warmup_steps=10"], ["schedule.warmup_steps=10", "train.steps=10"]),
        (["run.name=${nope.x}"], ["run.name", "nope.x"]),
        (["~data.columns=x"], ["cannot be deleted"]),
        (["--optim.lr=1"], ["did you mean optim.lr=1?"]),
        (["nonsense"], ["'nonsense' is not key=value"]),
        (["--config-dir"], ["--config-dir needs a folder"]),
        (["--config-dir=/nowhere"], ["/nowhere: no such folder"]),
        (["recipe=nowhere"], ["recipe=nowhere: no such file"]),
    ],
)
def test_what_cannot_be_together(argv, words):
    said = message(*REAL, *argv)
    assert all(word in said for word in words), said


def test_broken_yaml_names_file_and_line(write):
    said = message(f"recipe={write('bad.yaml', 'optim: {lr: 1')}")
    assert "bad.yaml: broken YAML" in said
    assert "line 1" in said
    assert "must hold a mapping" in message(f"recipe={write('list.yaml', '- 1')}")


def test_model_or_data_alone():
    assert "model.path" in message("data.train=x.jsonl")
    assert "SmolLM2-135M-Instruct" in message("data.train=x.jsonl")
    assert "data.train" in message("model.path=m")
    assert "set data.train" in message("model.path=m", "data.eval=x.jsonl")
    assert resolve(["model.path=m", "data.eval=x.jsonl"], verb="eval").data.train is None


def test_processes_must_be_what_the_launcher_started():
    config = resolve([*REAL, "run.processes=2"])
    check_processes(config, {"WORLD_SIZE": "2"})
    with pytest.raises(ConfigError, match=r"run.processes=2, but 1 is running; try torchrun --nproc_per_node 2"):
        check_processes(config, {})


# --- values as they are typed ---


@pytest.mark.parametrize(
    "path",
    [
        "a b.jsonl",
        "data (1).jsonl",
        "#1 ü&co=x,y~.jsonl",
        "a:b;c|d*?.jsonl",
        "{x}.jsonl",
        "it's.jsonl",
        "[1].jsonl",
        'say "x".jsonl',
        "a\\b.jsonl",
        "007",
        "1e3",
        "true",
        "org/name:config@train[:10]",
    ],
)
def test_text_is_taken_as_it_is_typed(path):
    assert resolve(["model.path=m", f"data.train={path}"]).data.train == path
    assert resolve([*REAL, f"data.columns.prompt={path}"]).data.columns == {"prompt": path}


@pytest.mark.parametrize(
    ("argument", "key", "value"),
    [
        ("data.train=[a.jsonl,b.jsonl]", "data.train", ["a.jsonl", "b.jsonl"]),
        ("data.train=['a b.jsonl', \"c,d.jsonl\"]", "data.train", ["a b.jsonl", "c,d.jsonl"]),
        ("data.train=[a (1).jsonl, b#2.jsonl]", "data.train", ["a (1).jsonl", "b#2.jsonl"]),
        ("data.train='a b.jsonl'", "data.train", "a b.jsonl"),
        ("data.mix=[1,.5]", "data.mix", [1.0, 0.5]),
        ("adapter.targets=[q_proj,v_proj]", "adapter.targets", ["q_proj", "v_proj"]),
        ("adapter.targets=all-linear", "adapter.targets", "all-linear"),
        ("model.revision=null", "model.revision", None),
        ("model.revision='null'", "model.revision", "null"),
        ("model.config.num_hidden_layers=2", "model.config.num_hidden_layers", 2),
        ("+model.config.hidden_act=gelu", "model.config.hidden_act", "gelu"),
        ("model.config.tie_word_embeddings=true", "model.config.tie_word_embeddings", True),
        ("model.rope_scaling={type: linear, factor: 4}", "model.rope_scaling.factor", 4),
        ("model.rope_scaling.factor=4.5", "model.rope_scaling.factor", 4.5),
        ("batch.size=1e2", "batch.size", 100),
        ("optim={lr: 1e-3}", "optim.lr", 1e-3),
        ("run.name=${stage.name}-${train.seed}", "run.name", "sft-42"),
    ],
)
def test_values_of_every_type(argument, key, value):
    found = get(resolve([*REAL, argument]), key)
    assert found == value
    assert type(found) is type(value)


def test_home_is_expanded_in_paths_only(monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    config = resolve(["model.path=~/m", "data.train=[~/a (1).jsonl,b]", "run.root=~/runs", "log.project=~/p"])
    assert (config.model.path, config.run.root) == ("/home/u/m", "/home/u/runs")
    assert (config.data.train, config.log.project) == (["/home/u/a (1).jsonl", "b"], "~/p")


# --- what wins over what ---


def test_partial_columns_merge(write):
    file = write("r.yaml", "model: smollm2_135m\ndata: {train: d, columns: {prompt: question, completion: answer}}\n")
    assert resolve([f"recipe={file}", "data.columns.completion=reply"]).data.columns == {
        "prompt": "question",
        "completion": "reply",
    }
    merged = resolve([f"recipe={file}", "data.columns={system: s}"]).data.columns
    assert merged == {"prompt": "question", "completion": "answer", "system": "s"}


RECIPE = """
stage: lora
model: smollm2_135m
data: {train: my.jsonl}
optim: {lr: 5.0e-5}
train: {steps: 100}
schedule: {warmup_fraction: 0.1}
adapter: {rank: 8}
"""


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], {"adapter.name": "lora", "adapter.rank": 8, "optim.lr": 5e-5, "train.epochs": None}),
        (["optim.lr=1"], {"optim.lr": 1.0}),
        (["adapter=qlora"], {"adapter.name": "qlora", "adapter.rank": 8, "optim.lr": 5e-5}),
        (["adapter.name=qlora"], {"adapter.name": "qlora"}),
        (["stage=qlora"], {"adapter.name": "qlora", "stage.name": "sft", "adapter.rank": 8}),
        (["stage=pretrain"], {"stage.name": "pretrain", "optim.lr": 5e-5}),
        (["train.epochs=3"], {"train.steps": None, "train.epochs": 3.0}),
        (["model=smollm2_360m"], {"model.path": "HuggingFaceTB/SmolLM2-360M-Instruct"}),
        (["schedule=constant"], {"schedule.name": "constant", "schedule.warmup_fraction": None}),
        (["schedule=linear"], {"schedule.name": "linear", "schedule.warmup_fraction": 0.1}),
    ],
)
def test_command_line_wins_over_recipe(write, argv, expected):
    config = resolve([f"recipe={write('r.yaml', RECIPE)}", *argv])
    assert {key: get(config, key) for key in expected} == expected


def test_order_of_recipe_and_settings_does_not_matter(write):
    file = write("r.yaml", RECIPE)
    assert resolve(["optim.lr=1", f"recipe={file}"]).as_dict() == resolve([f"recipe={file}", "optim.lr=1"]).as_dict()


def test_recipe_in_hydras_own_style(write):
    body = (
        "# @package _global_\ndefaults:\n  - override /adapter: lora\n  - _self_\nmodel: {path: m}\ndata: {train: d}\n"
    )
    assert resolve([f"recipe={write('r.yaml', body)}"]).adapter.name == "lora"
    wrong = write("w.yaml", "defaults:\n  - override /nope: lora\n")
    assert "names the group nope" in message(f"recipe={wrong}")


def test_preset_and_explicit_adapter():
    assert resolve(["stage=lora"]).adapter.name == "lora"
    assert resolve(["stage=qlora"]).adapter.name == "qlora"
    assert resolve(["stage=lora", "adapter=qlora"]).adapter.name == "qlora"
    assert resolve(["adapter=qlora", "stage=lora"]).adapter.name == "qlora"


@pytest.mark.parametrize(
    "argv",
    [
        ["stage=lora"],
        ["stage=pretrain", "schedule=wsd", "log=wandb", "log.mode=offline"],
        [*REAL, "optim=adamw8bit", "schedule=constant", "batch.tokens=100", "train.steps=7", "model.revision='1e3'"],
        [*REAL, "data.columns.prompt='null'", "run.name=a\\${b}", "model.config.rope={a: [1, x]}", "data.cache=~/ü #1"],
        ["model.path=m", "data.train=[a b,'1']", "adapter=lora", "adapter.targets=[q]", "stage.normalize=sequence"],
    ],
)
def test_saved_config_reproduces_the_run(tmp_path, argv):
    config = resolve(argv)
    (tmp_path / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    assert resolve([f"recipe={tmp_path / 'config.yaml'}"]).as_dict() == config.as_dict()
    assert resolve([f"recipe={tmp_path}"]).as_dict() == config.as_dict()
    assert config.overrides == argv


def test_saved_config_under_another_stage(tmp_path):
    (tmp_path / "config.yaml").write_text(resolve(["stage=lora", *REAL, "stage.normalize=sequence"]).to_yaml())
    assert resolve([f"recipe={tmp_path}", "stage=pretrain"]).stage_name == "pretrain"
    kept = resolve([f"recipe={tmp_path}", "stage=qlora"])
    assert (kept.adapter.name, get(kept, "stage.normalize")) == ("qlora", "sequence")


def test_embedded_default_only_without_model_and_data(write):
    assert resolve([]).data.train.startswith("embedded:prompt_completion")
    pretrain = resolve(["stage=pretrain", "train.steps=3"])
    assert (pretrain.model.init, pretrain.precision.name, pretrain.train.steps) == ("config", "fp32", 3)
    assert resolve(["precision=bf16"]).precision.name == "bf16"
    assert resolve(["data.max_length=32"]).data.max_length == 32
    for argv in (REAL, ["model=smollm2_135m", "data.train=d"], ["model.path=m", "data=alpaca"]):
        config = resolve(argv)
        assert (config.precision.name, config.batch.size, config.train.steps) == ("bf16", 32, None)
    assert resolve([f"recipe={write('r.yaml', RECIPE)}"]).precision.name == "bf16"
    assert resolve([f"recipe={write('s.yaml', 'train: {steps: 9}')}"]).model.path == "embedded"


# --- where it is looked for, and what it leaves behind ---


def test_from_another_directory_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve(["stage=lora"]).adapter.name == "lora"
    assert os.listdir(tmp_path) == []


def test_installed_without_a_checkout(tmp_path):
    package = PACKAGE.parent
    shutil.copytree(package, tmp_path / "posttrain", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    for name in ("conf", "recipes"):
        shutil.copytree(package_folder(name), tmp_path / "posttrain" / name, dirs_exist_ok=True)
    command = [sys.executable, "-m", "posttrain", "stage=lora", "optim.lrr=1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""})
    assert done.returncode == 2
    assert "did you mean optim.lr?" in done.stderr


def test_users_folder_of_groups_and_recipes(write, tmp_path):
    folder = tmp_path / "my conf (1) #ü, it's"
    write(f"{folder.name}/schedule/mine.yaml", "name: linear\nmin_lr_fraction: 0.5\n")
    preset = "# @package _global_\ndefaults:\n  - sft\n  - override /adapter: lora\ntrain:\n  seed: 7\n"
    write(f"{folder.name}/stage/both.yaml", preset)
    write(f"{folder.name}/fast.yaml", "schedule: mine\n")
    write(f"{folder.name}/recipes/deep/slow.yaml", "train: {steps: 1000}\n")
    given = ["--config-dir", str(folder)]
    config = resolve([*REAL, *given, "stage=both", "schedule=mine"])
    assert (config.schedule.name, config.schedule.min_lr_fraction) == ("linear", 0.5)
    assert (config.adapter.name, config.train.seed, config.stage_name) == ("lora", 7, "sft")
    assert resolve([*REAL, *given, "recipe=fast"]).schedule.min_lr_fraction == 0.5
    assert resolve([*REAL, *given, "recipe=deep/slow"]).train.steps == 1000
    assert "did you mean recipe=fast?" in message(*REAL, *given, "recipe=fats")
    write(f"{folder.name}/adapter/lora.yaml", "name: lora\n")
    assert "rename it" in message(*REAL, *given)


def test_hydra_of_the_caller_is_left_alone(tmp_path):
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        before = GlobalHydra.instance().hydra
        resolve([])
        assert GlobalHydra.instance().hydra is before
    resolve([])
    assert not GlobalHydra.instance().is_initialized()


@dataclasses.dataclass
class Another(Stage):
    """A stage of another package."""

    beta: float = dataclasses.field(default=0.1, metadata={"above": 0})
    link: str = "logistic"


def test_stage_of_another_package_needs_no_yaml(monkeypatch):
    class Point:
        name = "another"

        def load(self):
            return Another

    def points(group):
        assert group == GROUP
        return [Point()]

    monkeypatch.setattr("posttrain.config.folders.entry_points", points)
    monkeypatch.setattr("posttrain.stages.base.entry_points", points)
    config = resolve([*REAL, "stage=another", "stage.link=hinge"])
    assert config.as_dict()["stage"] == {"name": "another", "beta": 0.1, "link": "hinge"}
    assert message(*REAL, "stage=another", "stage.beta=-1") == "stage.beta must be > 0, got -1; try 0.1"
    assert "did you mean stage.beta?" in message(*REAL, "stage=another", "stage.bta=1")
    assert "another" in message(*REAL, "stage=sftt")


def test_what_refers_to_a_typed_value_is_typed_too() -> None:
    config = resolve([*REAL, "stage=ppo", "stage.max_new_tokens=12", "data.max_length=64"])
    assert (config.stage.max_new_tokens, config.eval.max_new_tokens) == (12, 12)
    assert resolve([*REAL, "stage=ppo", "eval.max_new_tokens=5"]).eval.max_new_tokens == 5
