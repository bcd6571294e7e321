"""What wandb and TensorBoard hold is read back, by their own formats: values, intervals, config; and a disk that is full."""

import json
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]
OPTIONS = ("run.dir=r", "train.steps=3", "train.eval_every=3", "optim.lr=1e-5")


def expected() -> dict[tuple[int, str], dict[str, float]]:
    """(step, split) → what a tracker must show, by metrics.jsonl: value, and both ends of the interval where there is one."""
    found: dict[tuple[int, str], dict[str, float]] = {}
    for line in map(json.loads, Path("r/metrics.jsonl").read_text().splitlines()):
        row = found.setdefault((line["step"], line["split"]), {})
        for name, value in line["metrics"].items():
            ends = value if isinstance(value, dict) else {"value": value}
            for end, suffix in (("value", ""), ("low", "_low"), ("high", "_high")):
                if ends.get(end) is not None:
                    row[f"{line['split']}/{name}{suffix}"] = ends[end]
    assert {"eval/nll", "eval/nll_low", "eval/nll_high", "eval/ece_low"} <= found[0, "eval"].keys()
    assert {"train/loss", "train/lr", "train/grad_norm"} <= found[3, "train"].keys()
    return found


def wandb_records(path: Path) -> Iterator[Any]:
    """The Records of a .wandb file: LevelDB's log format (blocks of 32 KiB; crc32, length, kind before each piece) after a
    header of seven bytes, each record a protobuf of wandb's own."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if 32_768 - at % 32_768 < 7:
            at += 32_768 - at % 32_768
            continue
        checksum, length, kind = struct.unpack("<IHB", data[at : at + 7])
        piece, at = data[at + 7 : at + 7 + length], at + 7 + length
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        whole = piece if kind in (1, 2) else whole + piece  # 1 whole, 2 first, 3 middle, 4 last
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


@pytest.mark.long
def test_wandb_holds_values_intervals_and_config(posttrain_process: Run) -> None:
    done = posttrain_process(*OPTIONS, "log=wandb", "log.mode=offline", "log.project=mine")
    assert done["status"] == 0, done["output"]
    (path,) = Path("r/wandb").glob("offline-run-*/*.wandb")
    records = list(wandb_records(path))
    rows = [
        {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    rows = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    wanted = [{"step": step, **values} for (step, _), values in expected().items()]
    assert sorted(rows, key=sorted) == sorted(wanted, key=sorted)
    (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert (run.project, run.display_name) == ("mine", "r")
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    for section, key, value in (("optim", "lr", 1e-5), ("train", "steps", 3), ("model", "path", "embedded"),
                                ("stage", "name", "sft")):  # fmt: skip
        assert config[section][key] == value
    assert any(record.WhichOneof("record_type") == "exit" for record in records), "the run was not finished"


def test_tensorboard_holds_values_intervals_and_config(posttrain_process: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = posttrain_process(*OPTIONS, "log=tensorboard")
    assert done["status"] == 0, done["output"]
    events = EventAccumulator("r/tensorboard", size_guidance={"scalars": 0}).Reload()
    shown = {(tag, e.step): e.value for tag in events.Tags()["scalars"] for e in events.Scalars(tag)}
    wanted = {(tag, step): value for (step, _), row in expected().items() for tag, value in row.items()}
    assert shown == pytest.approx(wanted, rel=1e-6)  # it keeps single precision
    (text,) = events.Tensors("config/text_summary")
    told = text.tensor_proto.string_val[0].decode()
    config = json.loads(told.removeprefix("```json\n").removesuffix("\n```"))
    assert (config["optim"]["lr"], config["train"]["steps"], config["model"]["path"]) == (1e-5, 3, "embedded")


SAMPLING = (
    "stage=ppo", "data.train=embedded:prompts:20", "data.eval=embedded:prompts:10:held_out", "stage.rewards=[exact]",
    "stage.samples=2", "batch.size=4", "stage.epochs=1", "eval.generate=10", "stage.max_new_tokens=4", *OPTIONS,
)  # fmt: skip


def rollouts() -> list[dict[str, Any]]:
    rows = map(json.loads, Path("r/samples.jsonl").read_text().splitlines())
    return [{"id": row["id"], **one} for row in rows for one in row.get("rollouts", ())]


def test_wandb_shows_answers_and_rollouts(posttrain_process: Run) -> None:
    done = posttrain_process(*SAMPLING, "log=wandb", "log.mode=offline")
    assert done["status"] == 0, done["output"]
    (path,) = Path("r/wandb").glob("offline-run-*/files/media/table/rollouts*.table.json")
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["answer"] for row in rows] == [one["answer"] for one in rollouts()]
    assert [row["reward"] for row in rows] == [one["reward"] for one in rollouts()]
    assert len(list(path.parent.glob("samples*.table.json"))) == 2  # the start and the end


def test_tensorboard_shows_answers_and_rollouts(posttrain_process: Run) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    done = posttrain_process(*SAMPLING, "log=tensorboard")
    assert done["status"] == 0, done["output"]
    events = EventAccumulator("r/tensorboard").Reload()
    (shown,) = events.Tensors("rollouts/text_summary")
    text = shown.tensor_proto.string_val[0].decode()
    assert len(rollouts()) == 8
    for one in rollouts():
        assert f"    {one['answer']}" in text
        assert one["id"] in text
    assert [e.step for e in events.Tensors("samples/text_summary")] == [0, 3]


def test_wandb_without_an_account_is_told(posttrain_process: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    for name in ("HOME", "NETRC"):
        monkeypatch.setenv(name, str(Path.cwd()))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    done = posttrain_process(*OPTIONS, "log=wandb", "log.mode=online")
    assert done["status"] == 2, done["output"]
    assert "Traceback" not in done["output"]
    assert "posttrain: error: log=wandb: " in done["output"]
    assert "log.mode=offline" in done["output"]


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """1 MB; skips, and says so, where it may not be mounted."""
    place = Path("disk").absolute()
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], capture_output=True, check=False)


@pytest.mark.long
@pytest.mark.parametrize("log", ["log=wandb", "log=tensorboard"])
def test_a_disk_that_fills_up(posttrain_process: Run, small_disk: Path, log: str) -> None:
    """Nothing is saved before the end, for nothing beats the start: it is the log lines that the disk refuses."""
    options = ("train.steps=400", "train.eval_every=1", "train.save_every=400", "optim.lr=0.1", "log.mode=offline", log)
    done = posttrain_process(*options, f"run.dir={small_disk}/r")
    assert done["status"] == 2, done["output"]
    assert "Traceback" not in done["output"]
    (error,) = [line for line in done["output"].splitlines() if "error: " in line]
    assert error.startswith(f"posttrain: error: cannot write {small_disk}/r")
    assert "No space left on device; make room" in error
    for line in (small_disk / "r/metrics.jsonl").read_text().splitlines():
        json.loads(line)


@pytest.mark.parametrize(("target", "call"), [("write", 1), ("write", 30), ("flush", 1), ("flush", 2)])
def test_tensorboards_thread_is_refused(posttrain_process: Run, target: str, call: int) -> None:
    writer = f"tensorboard.summary.writer.record_writer:RecordWriter.{target}"
    done = posttrain_process(*OPTIONS, "log=tensorboard", fail=[writer, call, "No space left on device"])
    assert done["status"] == 2, done["output"]
    assert "Traceback" not in done["output"]
    assert done["output"].count("posttrain: error: cannot write r: No space left on device; make room") == 1
