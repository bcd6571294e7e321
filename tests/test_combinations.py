"""Stage, adapter and distribution together, as a user has them: run, save, reload, and write the same answers again."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.tools.chat import chat

pytestmark = pytest.mark.long
Run = Callable[..., Any]
PAIRS = ("data.train=embedded:pairs:200", "data.eval=embedded:pairs:20:held_out")
PROMPTS = ("data.train=embedded:prompts:200", "data.eval=embedded:prompts:20:held_out", "stage.rewards=[exact]",
           "stage.samples=2", "stage.max_new_tokens=4")  # fmt: skip
TOGETHER = {
    "qlora, fsdp": (2, ["stage=qlora", "distribution=fsdp", "optim.lr=1e-2"]),
    "lora, fsdp, packed": (2, ["stage=lora", "distribution=fsdp", "batch.layout=packed", "optim.lr=1e-2"]),
    "dora, dpo, fsdp, shared": (2, ["stage=dpo", *PAIRS, "adapter=lora", "adapter.dora=true", "distribution=fsdp",
                                    "batch.layout=shared", "optim.lr=1e-2"]),
    "lora, dpo, ddp": (2, ["stage=dpo", *PAIRS, "adapter=lora", "distribution=ddp", "optim.lr=1e-2"]),
    "qlora, gpro, ddp": (2, ["stage=gpro", "data.train=embedded:groups:200", "data.eval=embedded:groups:20:held_out",
                             "adapter=qlora", "distribution=ddp", "optim.lr=1e-2"]),
    "bottleneck, ppo": (1, ["stage=ppo", *PROMPTS, "adapter=bottleneck", "adapter.width=8", "optim.lr=1e-2"]),
    "bottleneck, ppo, fsdp": (2, ["stage=ppo", *PROMPTS, "adapter=bottleneck", "adapter.width=8", "distribution=fsdp",
                                  "optim.lr=1e-2"]),
    "dora over 4 bits": (1, ["stage=qlora", "adapter.dora=true", "optim.lr=1e-2"]),
}  # fmt: skip
"""What: ranks and options."""


@pytest.mark.parametrize("what", TOGETHER)
def test_it_is_run_saved_reloaded_and_writes_the_same(
    posttrain_process: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    """The greedy answers of its last evaluation, once more from the saved model, some of them changed by the training. An
    adapter that was trained over 4 bits is loaded over the whole weights, which may write another answer here and there."""
    ranks, options = TOGETHER[what]
    writes = ("train.steps=8", "eval.generate=12", "eval.max_new_tokens=6")
    done = posttrain_process(*options, *writes, "run.dir=r", ranks=ranks)
    assert set(done["statuses"]) == {0}, done["output"]
    rows = [json.loads(line) for line in Path("r/samples.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "after" in row]  # beside them stand what ppo has trained on
    assert len(rows) == 12
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(row["prompt"] + "\n" for row in rows)))
    chat(["r", "--temperature", "0", "--max-new-tokens", "6"])
    written = capsys.readouterr().out.splitlines()
    assert len(written) == len(rows)
    other = sum(one != row["after"]["answer"] for one, row in zip(written, rows, strict=True))
    assert other <= (6 if "qlora" in " ".join(options) else 0)
    assert sum(row["after"]["answer"] != row["before"]["answer"] for row in rows) > len(rows) / 4
