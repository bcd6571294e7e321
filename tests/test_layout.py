"""Examples too long for one forward are told, those too long for a sliding window refused; of a stream any may come."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import small_arguments

from posttrain import layout
from posttrain.cli import main
from posttrain.errors import ModelError


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """said(*overrides): the plan of 17 rows of 7 tokens (1+1=, an answer, end-of-text) and 3 of 30."""
    rows = [{"prompt": f"{n % 9}+1=", "completion": "12"} for n in range(17)]
    rows += [{"prompt": f"{n}+2=", "completion": "3" * 25} for n in range(3)]
    Path("d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def plan(*overrides: str) -> str:
        given = small_arguments("data.train=d.jsonl", "data.eval=", "data.eval_fraction=0.2", *overrides)
        assert main(["plan", *given]) == 0
        return " ".join(capfd.readouterr().out.split())

    return plan


def test_longer_than_one_forward_should_be(said: Callable[..., str]) -> None:
    beyond = "3 examples have more tokens than batch.micro_tokens=20 (the longest 30): "
    assert f"{beyond}each has a forward of its own" in said("batch.micro_tokens=20", "batch.layout=padded")
    assert f"{beyond}a forward is then one row as long as that" in said("batch.micro_tokens=20", "batch.layout=packed")
    for enough in ("batch.micro_tokens=30", "batch.micro_size=1", "batch.size=4"):
        assert "have more tokens than" not in said(enough)
    Path("t.jsonl").write_text('{"text": "1+1=2"}\n' * 9)
    streamed = ["stage=pretrain", "data.train=t.jsonl", "data.streaming=true"]
    may_come = "examples of more tokens than batch.micro_tokens=63 may come, for data.max_length=64: each has a forward"
    assert may_come in said(*streamed, "batch.micro_tokens=63")
    assert "may come" not in said(*streamed, "batch.micro_tokens=64")


def test_past_a_sliding_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first examples of a stream, all that are known, are short; data.max_length says what may come."""
    monkeypatch.setattr(layout, "sliding_window", lambda network: 32)
    policy: Any = SimpleNamespace(network=SimpleNamespace(config=SimpleNamespace(model_type="mistral")))
    short: Any = SimpleNamespace(train=Lengths([8, 30]), eval=Lengths([9]), stream=None)
    layout._check_window(policy, short, "shared", max_length=64)
    short.stream = object()
    layout._check_window(policy, short, "shared", max_length=32)
    layout._check_window(policy, short, "padded", max_length=64)
    with pytest.raises(ModelError, match="attends to 32 positions, and the longest example may have 64"):
        layout._check_window(policy, short, "shared", max_length=64)


class Lengths:
    def __init__(self, longest: list[int]) -> None:
        self.longest = np.array(longest)

    def __len__(self) -> int:
        return len(self.longest)
