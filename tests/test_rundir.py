"""A run's directory: what of a config may change while it goes on, and that it is one process's alone while that is alive."""

import errno
import fcntl
import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from posttrain.claim import LOCK, Claim
from posttrain.errors import CheckpointError, DataError, ModelError

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


class TestOneProcessAlone:
    def test_a_second_one_is_refused(self, run: Run, posttrain_process: Run) -> None:
        """Whether the first has begun to write, or not even that."""
        for begun in (False, True):
            if begun:
                run("run.dir=r", "train.steps=1")
                Path("r/summary.json").unlink()
            before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
            claim = Claim()
            claim.take(Path("r"))
            done = posttrain_process("run.dir=r", "train.steps=1")
            assert done["status"] == 2, done["output"]
            (said,) = [line for line in done["output"].splitlines() if "error: " in line]
            assert f"run.dir=r is in use by process {os.getpid()} on " in said
            assert "which is still running; wait for it or stop it" in said
            claim.release()
            assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before
            assert Path("r").exists() is begun, "what was made for nothing stays"
        assert posttrain_process("run.dir=r", "train.steps=1")["status"] == 0
        assert not Path("r", LOCK).exists()

    def test_a_killed_one_holds_nothing(self, posttrain_process: Run) -> None:
        """Its file is there and says so, but the system has let go of it."""
        killed = posttrain_process("run.dir=r", die=("posttrain.runfiles:create", 1, "before"))
        assert killed["status"] == -signal.SIGKILL
        assert [path.name for path in Path("r").iterdir()] == [LOCK]
        again = posttrain_process("run.dir=r", "train.steps=1")
        assert again["status"] == 0, again["output"]
        assert not Path("r", LOCK).exists()

    def test_of_ranks_the_first_claims_for_all(self, posttrain_process: Run) -> None:
        claim = Claim()
        claim.take(Path("r"))
        done = posttrain_process("run.dir=r", "train.steps=1", ranks=2)
        claim.release()
        assert done["statuses"] == [2, 2], done["output"]
        assert done["output"].count("run.dir=r is in use by ") == 1

    def test_where_there_are_no_locks_a_run_goes_without(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        def flock(*_: Any) -> None:
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr("fcntl.flock", flock)
        assert run("run.dir=r", "train.steps=1").steps == 1
        assert not Path("r", LOCK).exists()

    def test_a_file_that_is_taken_away_while_it_is_waited_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Between the opening and the locking its holder ends: the lock that then comes is of a file that is no more."""
        first, second, third = Claim(), Claim(), Claim()
        first.take(Path("r"))
        real, calls = fcntl.flock, []

        def flock(file: Any, how: int) -> None:
            calls.append(how)
            if len(calls) == 1:
                first.release()
            real(file, how)

        Path("r/mine").write_text("")
        monkeypatch.setattr("fcntl.flock", flock)
        second.take(Path("r"))
        assert len(calls) == 2
        with pytest.raises(CheckpointError, match="is in use by process"):
            third.take(Path("r"))
        second.release()

    def test_two_without_a_name_get_a_directory_each(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("posttrain.rundir.default_name", lambda stage: f"{stage}-20261121-101500")
        found = [run("train.steps=1").run_dir for _ in range(3)]
        assert found == [f"runs/sft-20261121-101500{end}" for end in ("", "-2", "-3")]
        with pytest.raises(ModelError):
            run("model.path=./nowhere")
        assert len(list(Path("runs").iterdir())) == 3, "a start that failed leaves an empty directory"
