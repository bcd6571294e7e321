"""A run's directory: what of a config may change while it goes on, and that it is one process's alone while that is alive."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import CheckpointError, DataError

Run = Callable[..., Any]


class TestABadRowIsNoDeadEnd:
    """What to do with bad rows, and how many of them to bear, may be said anew when a run goes on."""

    def test_of_a_stream(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [json.dumps({"text": f"{n}+{n}={2 * n}"}) for n in range(200)]
        Path("a.jsonl").write_text("\n".join([*rows[:150], '{"text": 5}', *rows[150:]]) + "\n")
        options = ["stage=pretrain", "data.train=a.jsonl", "data.eval=", "data.eval_fraction=0.1", "data.streaming=true",
                   "data.shuffle_buffer=20", "data.eval_limit=5", "train.steps=24", "train.save_every=4",
                   "train.eval_every=24", "run.dir=r"]  # fmt: skip
        with pytest.raises(DataError, match=r"a\.jsonl, row 151, .* set data\.on_bad_row=skip"):
            run(*options)
        assert list(Path("r/checkpoints").iterdir())
        assert run(*options, "data.on_bad_row=skip", "data.max_lost_fraction=0.5").steps == 24
        said = capsys.readouterr().out
        assert "continues at step " in said
        assert "1 of 201 rows skipped" in said
        with pytest.raises(CheckpointError, match=r"data\.shuffle_buffer"):
            run(*options, "data.shuffle_buffer=21")

    def test_of_data_on_a_disk(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        """Data that was read without a bad row is the same data, however bad rows are met."""
        run("run.dir=r", "train.save_every=2", "train.keep_checkpoints=9")
        Path("r/summary.json").unlink()
        capsys.readouterr()
        run("run.dir=r", "train.save_every=2", "data.on_bad_row=skip", "data.max_lost_fraction=0.5")
        assert "continues at step 4" in capsys.readouterr().out
        assert json.loads(Path("r/config.json").read_text())["data"]["on_bad_row"] == "skip"
