"""Weights in parts on the ranks: checkpoints that any number of ranks can read, precision, and what can be together with it.

That stages give the losses of one process is in tests/test_ranks.py.
"""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_train import LOSSES, STEADY, WEIGHTS, assert_same_weights, losses

from posttrain.cli import main
from posttrain.config import resolve
from posttrain.errors import CheckpointError, ConfigError, ModelError
from posttrain.models.reload import load_saved

Run = Callable[..., Any]
FSDP = "distribution=fsdp"
SPLIT = [
    *STEADY,
    "train.steps=6",
    "train.save_every=2",
    "train.keep_checkpoints=9",
    "batch.size=7",
    "batch.micro_tokens=128",
]


def test_two_ranks_one_and_two_again(posttrain_process: Run) -> None:
    """Killed in turn and gone on with another number of ranks, and without sharding in between."""
    assert posttrain_process(*SPLIT, "run.dir=whole")["status"] == 0
    dies = lambda call: {"die": ("posttrain.train:check_finite", call, "before")}  # noqa: E731
    first = posttrain_process(*SPLIT, FSDP, "run.dir=r", ranks=2, **dies(4))
    assert set(first["statuses"]) == {-signal.SIGKILL}, first["output"]
    assert sorted(p.name for p in Path("r/checkpoints/step-000002").iterdir()) == [
        "model",
        "rng.pt",
        "shards",
        "state.json",
    ]
    assert len(list(Path("r/checkpoints/step-000002/shards").iterdir())) == 2
    shutil.copytree("r", "r1")
    second = posttrain_process(*SPLIT, "run.dir=r", **dies(3))  # one process, nothing in parts
    assert "continues at step 2" in second["output"], second["output"]
    third = posttrain_process(*SPLIT, FSDP, "run.dir=r", ranks=2)
    assert third["statuses"] == [0, 0], third["output"]
    assert "continues at step 4" in third["output"]
    alone = posttrain_process(*SPLIT, FSDP, "run.dir=r1")  # in parts, of which there is one
    assert alone["status"] == 0, alone["output"]
    for run in ("r", "r1"):
        assert losses(run) == pytest.approx(losses("whole"), rel=LOSSES)
        assert_same_weights(run, "whole", WEIGHTS)


@pytest.mark.long
def test_four_ranks(posttrain_process: Run) -> None:
    """7 examples on 4 ranks: shares differ, and in evaluation some have none."""
    common = [*SPLIT, "data.eval=embedded:prompt_completion:5:held_out", "train.steps=3"]
    assert posttrain_process(*common, "run.dir=one")["status"] == 0
    for how in ("ddp", "fsdp"):
        done = posttrain_process(*common, f"distribution={how}", f"run.dir={how}", ranks=4)
        assert done["statuses"] == [0] * 4, done["output"]
        assert losses(how) == pytest.approx(losses("one"), rel=LOSSES)
        assert_same_weights(how, "one", WEIGHTS)


def test_a_checkpoint_that_lacks_a_rank_s_file_is_named(posttrain_process: Run) -> None:
    done = posttrain_process(*SPLIT, FSDP, "train.steps=2", "schedule=constant", "run.dir=a", ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    (Path("a/checkpoints/step-000002/shards/00002-of-00002.safetensors")).unlink()
    again = posttrain_process(
        *SPLIT, "train.steps=2", "schedule=constant", "run.dir=b", "train.resume=a/checkpoints/step-000002"
    )
    assert again["status"] == 2
    assert "holds 1 of 2 files" in again["output"]


def test_rows_of_any_rank_are_found(tmp_path: Path) -> None:
    """Two files of one tensor, 3 and 2 rows, read whole; then a part missing, and another shape."""
    from safetensors.torch import save_file

    from posttrain.shards import FIRST_ROWS, _Saved

    rows = torch.arange(10.0).view(5, 2)
    for number, (start, stop) in enumerate([(0, 3), (3, 5)], 1):
        first = {FIRST_ROWS: json.dumps({"w": start})}
        save_file({"w": rows[start:stop].contiguous()}, tmp_path / f"0000{number}-of-00002.safetensors", metadata=first)
    into = torch.zeros(5, 2)
    _Saved(tmp_path).read("w", into)
    assert torch.equal(into, rows)
    with pytest.raises(CheckpointError, match="5 of 6 rows"):
        _Saved(tmp_path).read("w", torch.zeros(6, 2))
    with pytest.raises(CheckpointError, match="another shape"):
        _Saved(tmp_path).read("w", torch.zeros(5, 3))
    with pytest.raises(CheckpointError, match="no other"):
        _Saved(tmp_path).read("other", into)


@pytest.mark.long
@pytest.mark.parametrize(
    "options",
    [
        ["stage=sft"],
        ["stage=lora", "train.gradient_checkpointing=true"],
        ["stage=lora", "adapter.dora=true", "optim.lr=1e-2"],
        ["stage=qlora"],
    ],
    ids=" ".join,
)
def test_half_precision_and_adapters(posttrain_process: Run, options: list[str]) -> None:
    """In bf16 the losses stay within its rounding of those of DDP, and under adapters, which stay in fp32, far closer; what is
    saved scores as it did at the end."""
    common = [*SPLIT, *options, "precision=bf16", "train.steps=4", "eval.generate=4", "eval.max_new_tokens=4"]
    sharded = posttrain_process(*common, FSDP, "run.dir=fsdp", ranks=2)
    assert sharded["statuses"] == [0, 0], sharded["output"]
    ddp = posttrain_process(*common, "run.dir=ddp", ranks=2)
    assert ddp["statuses"] == [0, 0], ddp["output"]
    assert losses("fsdp") == pytest.approx(losses("ddp"), rel=0.05 if options == ["stage=sft"] else 1e-4)
    how = (
        ["adapter=qlora", "adapter.path=fsdp/model"] if "stage=qlora" in options else ["model.path=fsdp"]
    )  # over 4 bits
    same = [*how, "precision=bf16", "data.eval=embedded:prompt_completion:20:held_out", "run.dir=again"]
    scored = posttrain_process(*same, "train.steps=", "optim.lr=", verb="eval")
    assert scored["status"] == 0, scored["output"]
    end, again = (
        json.loads(Path(f"{run}/summary.json").read_text())["metrics"]["nll"]["value"] for run in ("fsdp", "again")
    )
    assert again == pytest.approx(end, rel=0.02)
    assert len(Path("fsdp/samples.jsonl").read_text().splitlines()) == 4


ADAPTED = {
    "reward lora": ["stage=reward", "adapter=lora", "data.train=embedded:pairs:60", "data.eval=embedded:pairs:20:held_out"],
    "bottleneck": ["adapter=bottleneck", "adapter.width=8"],
    "its own critic": ["stage=ppo", "model.critic=embedded", "stage.samples=2", "stage.max_new_tokens=4", "stage.epochs=1",
                       "data.train=embedded:prompts:60", "data.eval=embedded:prompts:10:held_out"],
}  # fmt: skip
"""What is built in another way on a rank that reads no weights, and again in another way when a run goes on."""


@pytest.mark.long
@pytest.mark.parametrize("what", ADAPTED)
def test_what_is_beside_the_policy_goes_on(posttrain_process: Run, what: str) -> None:
    options = [*SPLIT, *ADAPTED[what], "train.steps=4", "schedule=constant", FSDP]
    first = posttrain_process(*options, "run.dir=whole", ranks=2)
    assert first["statuses"] == [0, 0], first["output"]
    shutil.copytree("whole", "r")
    for late in ("model", "checkpoints/step-000004"):
        shutil.rmtree(Path("r") / late)
    Path("r/summary.json").unlink()
    again = posttrain_process(*options, "run.dir=r", ranks=2)
    assert again["statuses"] == [0, 0], again["output"]
    assert "continues at step 2" in again["output"]
    assert losses("r") == pytest.approx(losses("whole"), rel=LOSSES, abs=LOSSES)


SAMPLED = ["stage=ppo", *ADAPTED["its own critic"][2:]]


@pytest.mark.parametrize(
    "options",
    [
        ["precision=fp16", *ADAPTED["reward lora"][:1], *ADAPTED["reward lora"][2:]],
        ["precision=bf16", *SAMPLED, "model.critic=embedded"],
        ["precision=bf16", *SAMPLED, "optim=adamw_bf16", "model.dtype=bfloat16"],
    ],
    ids=["fp16 scores", "a critic in bf16", "a value head beside bf16 weights"],
)
def test_precisions_meet(posttrain_process: Run, options: list[str]) -> None:
    done = posttrain_process(*options, FSDP, "train.steps=1", "schedule=constant", "run.dir=r")
    assert done["status"] == 0, done["output"]


@pytest.mark.long
def test_a_checkpoint_in_parts_is_put_together(posttrain_process: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The last checkpoint has the final weights; given as a model it says what to do."""
    for stage, data in (
        ("sft", []),
        ("reward", ADAPTED["reward lora"][2:]),
        ("ppo", ADAPTED["its own critic"][2:]),
    ):
        done = posttrain_process(*SPLIT, FSDP, f"stage={stage}", *data, "train.steps=2", f"run.dir={stage}", ranks=2)
        assert done["statuses"] == [0, 0], done["output"]
        assert main(["merge", f"{stage}/checkpoints/step-000002", f"{stage}-whole"]) == 0
        assert "put the 2 parts of" in capsys.readouterr().out
        whole, last = (load_file(f"{folder}/model.safetensors") for folder in (f"{stage}-whole", f"{stage}/model"))
        assert whole.keys() == last.keys()
        assert all(torch.equal(whole[name], last[name]) for name in last)
    heads = [load_file(f"{folder}/critic/value_head.safetensors") for folder in ("ppo-whole", "ppo/model")]
    assert all(torch.equal(heads[0][name], heads[1][name]) for name in ("weight", "bias"))
    with pytest.raises(ModelError, match="posttrain merge sft/checkpoints/step-000002 OUT"):
        load_saved("sft/checkpoints/step-000002/model")


@pytest.mark.long
def test_an_adapters_checkpoint_is_merged(posttrain_process: Run, capsys: pytest.CaptureFixture[str]) -> None:
    done = posttrain_process(*SPLIT, FSDP, "stage=lora", "optim.lr=1e-2", "train.steps=2", "run.dir=r", ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    for given, out in (("r/checkpoints/step-000002", "of-checkpoint"), ("r", "of-run")):
        assert main(["merge", given, out]) == 0
        assert "merged 1 adapter(s) into" in capsys.readouterr().out
    one, other = (load_file(f"{folder}/model.safetensors") for folder in ("of-checkpoint", "of-run"))
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_saved_weights_are_whole(posttrain_process: Run) -> None:
    """Every tensor of the model, with its own shape, the tied one once."""
    from posttrain.models.embedded import DIRECTORY

    done = posttrain_process(*SPLIT, FSDP, "train.steps=1", "schedule=constant", "run.dir=r", ranks=2)
    assert done["statuses"] == [0, 0], done["output"]
    known, found = load_file(DIRECTORY / "model.safetensors"), load_file("r/model/model.safetensors")
    assert {n: t.shape for n, t in found.items()} == {n: t.shape for n, t in known.items()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["optim=adamw8bit", FSDP], "optim=adamw8bit with distribution=fsdp"),
        (["distribution.cpu_offload=true"], "distribution.cpu_offload=true is of distribution=fsdp"),
    ],
)
def test_what_cannot_be_together_is_refused(options: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(options)
