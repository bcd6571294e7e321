"""A damaged checkpoint is told in a few lines, with the way out; loading one never runs what it holds."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.checkpoint import load_rng, name_of
from posttrain.errors import CheckpointError
from posttrain.seeds import rng_state, seed_everything, set_rng_state

Run = Callable[..., Any]
OFTEN = ("run.dir=r", "train.save_every=1", "train.keep_checkpoints=9")


class Evil:
    """Runs a command as it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with four checkpoints each, of a whole model and of an adapter, made when first asked for."""
    return tmp_path_factory.mktemp("made")


def a_run(made: Path, run: Run, *options: str) -> None:
    """A copy of such a run as r, as a kill before its summary leaves it."""
    name = "-".join(options) or "plain"
    if not (made / name).exists():
        run(*OFTEN, *options)
        Path("r/summary.json").unlink()
        shutil.copytree("r", made / name)
    else:
        shutil.copytree(made / name, "r")


def spoil(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "code":
        torch.save([Evil()], path)
    elif how == "other":
        torch.save({"nothing": torch.zeros(3)}, path)
    else:
        path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "text": b"<html>404</html>" * 99}[how])


DAMAGE = [
    ("optimizer.pt", "cut"), ("optimizer.pt", "code"), ("optimizer.pt", "other"), ("rng.pt", "empty"), ("rng.pt", "code"),
    ("rng.pt", "other"), ("state.json", "text"), ("model/model.safetensors", "cut"),
]  # fmt: skip


@pytest.mark.parametrize(("part", "how"), DAMAGE)
def test_a_damaged_file_is_named_with_the_way_out(made: Path, run: Run, part: str, how: str) -> None:
    a_run(made, run)
    spoil(Path("r/checkpoints/step-000004", part), how)
    with pytest.raises(CheckpointError) as caught:
        run(*OFTEN)
    said = str(caught.value)
    assert "r/checkpoints/step-000004" in said
    assert "cannot read" in said or f"{part} cannot be read: " in said
    assert (
        "delete r/checkpoints/step-000004, and the same command goes on from step-000003 (there are step-000001, "
        "step-000002, step-000003)"
    ) in said
    assert "weights_only" not in said, "torch's words, which say how to run what it holds"
    assert len(said) < 700
    assert not Path("ran").exists()


def test_the_only_one_says_so(made: Path, run: Run) -> None:
    a_run(made, run)
    for step in (1, 2, 3):
        shutil.rmtree(f"r/checkpoints/{name_of(step)}")
    spoil(Path("r/checkpoints/step-000004/state.json"), "cut")
    with pytest.raises(CheckpointError, match="it is the only checkpoint there, so the run then starts over"):
        run(*OFTEN)


@pytest.mark.parametrize("part", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_damaged_adapter(made: Path, run: Run, part: str) -> None:
    a_run(made, run, "stage=lora")
    spoil(Path("r/checkpoints/step-000004/model", part), "cut")
    with pytest.raises(CheckpointError, match="goes on from step-000003"):
        run(*OFTEN, "stage=lora")


def test_a_damaged_record_of_the_data(made: Path, run: Run) -> None:
    a_run(made, run)
    spoil(Path("r/environment.json"), "cut")
    with pytest.raises(CheckpointError, match=r"r/environment\.json cannot be read: .* delete it"):
        run(*OFTEN)
    Path("r/environment.json").unlink()
    assert run(*OFTEN).steps == 4


def test_random_states_come_back_from_plain_values() -> None:
    import random

    import numpy as np

    def drawn() -> list[float]:
        return [random.random(), float(np.random.rand()), float(np.random.randn()), float(torch.rand(()))]

    seed_everything(3, 0)
    drawn()
    checkpoint = Path("c")
    checkpoint.mkdir()
    torch.save([rng_state()], checkpoint / "rng.pt")
    expected = drawn()
    state = load_rng(checkpoint, 0)
    assert state is not None
    set_rng_state(state)
    assert drawn() == expected
    assert load_rng(checkpoint, 1) is None
