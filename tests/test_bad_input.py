"""Bad input is told in a few lines, with exit status 2 and nothing half-written; a disk that refuses leaves what was there."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import long_but, small_arguments

from posttrain.cli import main
from posttrain.models.embedded import DIRECTORY

pytestmark = pytest.mark.usefixtures("warm_process")
Run = Callable[..., Any]
FEW_LINES = 6

ROW = {"prompt": "1+1=", "completion": "2"}
CHAT = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]


def tell(capfd: pytest.CaptureFixture[str], *overrides: str, verb: str = "train", status: int = 2) -> str:
    """Run in this process with a run directory `r`; returns what was said to standard error."""
    before = sorted(path for path in Path().rglob("*") if path.is_file())
    capfd.readouterr()
    assert main([verb, *small_arguments("run.dir=r", *overrides)]) == status
    said = capfd.readouterr().err
    assert "Traceback" not in said
    assert said.startswith("posttrain: error: ")
    assert len(said.strip().splitlines()) <= FEW_LINES
    assert sorted(path for path in Path().rglob("*") if path.is_file()) == before, "something was half-written"
    assert not Path("r").exists()
    return said


def write(name: str, *rows: Any) -> None:
    """Rows as JSON lines; bytes and text as they are."""
    texts = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    lines = [text.encode() if isinstance(text, str) else text for text in texts]
    Path(name).write_bytes(b"".join(line + b"\n" for line in lines))


SETTINGS = [
    (["optim.learning_rate=1"], ["optim.learning_rate is not a key", "optim.lr"]),
    (["optimizer.lr=1"], ["optimizer.lr is not a key", "optim.lr"]),
    (["stage.beta=1"], ["stage.beta is not a key of stage=sft"]),
    (["optim=adam"], ["optim=adam does not exist", "did you mean optim=adamw?"]),
    (["stage=gpr"], ["stage=gpr does not exist", "gpro, grpo"]),
    (["stage=drpo"], ["stage=drpo does not exist", "did you mean stage=dpo?"]),
    (["recipe=nothing"], ["nothing"]),
    (["train.steps=many"], ["train.steps must be a whole number or null, got many"]),
    (["batch.layout=jagged"], ["batch.layout must be one of auto, padded, packed, shared", "got jagged"]),
    (["data.shuffle=perhaps"], ["data.shuffle must be true or false, got perhaps"]),
    (["stage=dpo", "stage.beta=0"], ["stage.beta must be > 0, got 0"]),
    (["stage=gpro", "stage.beta=-1"], ["stage.beta must be > 0, got -1"]),
    (["stage=dpo", "stage.flip_probability=0.5"], ["stage.flip_probability must be >= 0 and < 0.5, got 0.5"]),
    (["stage=reward", "stage.pooling=first"], ["stage.pooling must be one of last, mean, special", "got first"]),
    (["optim.lr=0"], ["optim.lr must be > 0, got 0"]),
    (["optim.lr=-1e-4"], ["optim.lr must be > 0, got -0.0001"]),
    (["optim.lr=nan"], ["optim.lr must be a number"]),
    (["batch.size=0"], ["batch.size must be >= 1, got 0"]),
    (["batch.size=-8"], ["batch.size must be >= 1, got -8"]),
    (["batch.size=2.5"], ["batch.size must be a whole number"]),
    (["batch.tokens=100"], ["batch.size=8 and batch.tokens=100 are both given"]),
    (["batch.micro_size=2", "batch.micro_tokens=64"], ["batch.micro_tokens=64 and batch.micro_size=2 are both given"]),
    (["train.epochs=1"], ["train.steps=4 and train.epochs=1 are both given"]),
    (
        ["train.steps=", "train.epochs=0.001"],
        ["train.epochs=0.001 of 200 training examples is less than one", "train.steps=1"],
    ),
    (["train.steps=", "train.epochs=1", "schedule.warmup_steps=25"], ["leaves nothing of the 25 steps", "try 2"]),
    (["train.steps=1", "schedule.warmup_steps=1"], ["leaves nothing of train.steps=1; try 0"]),
    (["data.max_length=128"], ["data.max_length=128, but the model's positions end at 64"]),
    (["model.rope_scaling={type: dynamic, factor: 4}", "data.max_length=300"], ["the model's positions end at 256"]),
    (["data.train="], ["model.path=embedded is given without data"]),
    (["model.path="], ["set model.path"]),
]


@pytest.mark.parametrize(("overrides", "words"), SETTINGS, ids=[" ".join(s[0]) for s in SETTINGS])
def test_a_setting(capfd: pytest.CaptureFixture[str], overrides: list[str], words: list[str]) -> None:
    said = tell(capfd, *overrides)
    assert all(word in said for word in words), said


def test_a_precision_that_the_environment_contradicts(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert "precision=fp32, but the launcher or environment says ACCELERATE_MIXED_PRECISION=fp16" in tell(capfd)
    for verb in ("inspect", "prepare"):  # these compute nothing
        assert main([verb, *small_arguments()]) == 0
    assert capfd.readouterr().err == ""


ROWS = [
    ("empty", [], ["d.jsonl: the file is empty"]),
    ("broken JSON", [ROW, '{"prompt": "1+1='], ["d.jsonl, line 2", "broken JSON"]),
    ("no column", [ROW, ROW, {"prompt": "1+1="}], ["d.jsonl, row 3, column 'completion'", "missing (this row has: prompt)"]),
    ("no column in half the rows", [ROW, {"prompt": "1+1="}], ["d.jsonl, row 2, column 'completion'", "missing (this"]),
    ("no text", [ROW, {**ROW, "completion": 2}], ["d.jsonl, row 2, column 'completion'", "found int (2)"]),
    ("null", [ROW, ROW, {**ROW, "completion": None}], ["row 3, column 'completion'", "found null"]),
    ("empty completion", [ROW, {**ROW, "completion": ""}], ["row 2, column 'completion'", "found empty text"]),
    ("encoding", [ROW, '{"prompt": "é", "completion": "2"}'.encode("latin-1")], ["d.jsonl: not UTF-8", "line 2", "iconv"]),
    ("UTF-16", [json.dumps(ROW).encode("utf-16")], ["d.jsonl: not UTF-8", "iconv -f UTF-16"]),
    ("columns", [{"ask": "1+1=", "reply": "2"}], ["ask", "reply", "data.columns"]),
    ("no template", [{"messages": CHAT}], ["no chat template", "model.chat_template"]),
    ("a list", [[1, 2]], ["d.jsonl, line 1: found list"]),
    ("plain text", [{"text": "1+1=2"}], ["found the format text, but stage=sft trains on", "stage=pretrain"]),
    ("all too long", [{**ROW, "completion": "2" * 99}] * 3, ["all examples are longer than data.max_length=64"]),
    ("many too long", [ROW, {**ROW, "completion": "2" * 99}], ["1 of 2 examples (50%)", "data.max_lost_fraction=0.2"]),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "words"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
@pytest.mark.parametrize("side", ["train", "eval"])
def test_a_data_file(capfd: pytest.CaptureFixture[str], rows: list[Any], words: list[str], side: str) -> None:
    write("d.jsonl", *rows)
    said = tell(capfd, f"data.{side}=d.jsonl")
    assert all(word in said for word in words), said


def test_a_missing_file_names_its_neighbour(capfd: pytest.CaptureFixture[str]) -> None:
    write("train.jsonl", ROW)
    said = tell(capfd, "data.train=poems.jsonl")
    assert "poems.jsonl: no such file; . has none like it" in said
    assert "did you mean" not in said
    assert "trian.jsonl: no such file; did you mean train.jsonl?" in tell(capfd, "data.train=trian.jsonl")
    assert "the folder nowhere does not exist" in tell(capfd, "data.eval=nowhere/d.jsonl")


def test_nothing_left_to_train_on(capfd: pytest.CaptureFixture[str]) -> None:
    write("d.jsonl", ROW)
    said = tell(capfd, "data.train=d.jsonl", "data.eval=", "data.eval_fraction=0.999999")
    assert "data.train: no example is left after holding out data.eval_fraction" in said
    Path("t.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    write("d.jsonl", {"messages": [*CHAT[:1], {**CHAT[1], "train": False}]})
    said = tell(capfd, "data.train=d.jsonl", "model.chat_template=t.jinja")
    assert "data.train: no example has a token to train on (1 were read)" in said


def test_bad_rows_can_be_skipped_and_are_listed(capfd: pytest.CaptureFixture[str]) -> None:
    write("d.jsonl", *[ROW] * 9, {**ROW, "completion": ""})
    assert main(small_arguments("data.train=d.jsonl", "data.on_bad_row=skip", "run.dir=r", "train.steps=1")) == 0
    said = capfd.readouterr().out
    assert "1 of 10 rows skipped (data.on_bad_row=skip)" in said
    assert "d.jsonl, row 10, column 'completion'" in said
    assert "9 training" in said


class TestModel:
    @pytest.fixture(autouse=True)
    def copy(self, _own_folders: None) -> None:
        shutil.copytree(DIRECTORY, "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))

    def test_no_such_path(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "model.path=./modle does not exist; did you mean model?" in tell(capfd, "model.path=./modle")
        assert "no/such" in tell(capfd, "model.path=no/such")

    def test_a_config_without_weights(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("model/model.safetensors").unlink()
        said = tell(capfd, "model.path=model")
        assert "cannot read the weights of model.path=model (it holds: config.json" in said

    def test_an_empty_folder(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("empty").mkdir()
        assert "model.path=empty (it holds: nothing)" in tell(capfd, "model.path=empty")

    @pytest.mark.parametrize("kept", [0, 7, 3_000, 1_000_000])
    def test_weights_cut_short(self, capfd: pytest.CaptureFixture[str], kept: int) -> None:
        path = Path("model/model.safetensors")
        path.write_bytes(path.read_bytes()[:kept])
        assert "cannot read the weights of model" in tell(capfd, "model.path=model").replace("model.path=", "")

    def test_weights_that_are_something_else(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("model/model.safetensors").write_bytes(b"<html>404</html>" * 999)
        assert "cannot read the weights of model" in tell(capfd, "model.path=model").replace("model.path=", "")

    def test_weights_of_another_shape(self, capfd: pytest.CaptureFixture[str]) -> None:
        config = json.loads(Path("model/config.json").read_text())
        Path("model/config.json").write_text(json.dumps({**config, "intermediate_size": 64}))
        assert "cannot read the weights of model.path=model" in tell(capfd, "model.path=model")
        Path("model/config.json").write_text(json.dumps({**config, "num_hidden_layers": 9}))
        assert "of the weights its config asks for" in tell(capfd, "model.path=model")

    def test_a_broken_config(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("model/config.json").write_text("{")
        assert "'model/config.json' is not a valid JSON file" in tell(capfd, "model.path=model")

    def test_no_tokenizer(self, capfd: pytest.CaptureFixture[str]) -> None:
        for path in Path("model").glob("tokenizer*"):
            path.unlink()
        assert "cannot read the tokenizer of model.path=model" in tell(capfd, "model.path=model")

    def test_a_tokenizer_with_more_tokens_than_embeddings(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("model/config.json").write_text(
            json.dumps({**json.loads(Path("model/config.json").read_text()), "vocab_size": 50})
        )
        assert "the tokenizer has 99 tokens but" in tell(capfd, "model.path=model", "model.init=config")


class TestAFailedStart:
    """Nothing was logged of a training step and nothing saved: another config may take its place, and clears it."""

    def fail(self, *options: str) -> dict[str, Any]:
        """A start that fails in its first step; what it left."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("posttrain.finite.not_finite", lambda *_: "the loss is not finite")
            status = main(small_arguments("run.dir=r", "eval.generate=2", "eval.max_new_tokens=2", *options))
        assert status == 1
        assert {"config.json", "metrics.jsonl", "samples.jsonl", "eval"} <= {p.name for p in Path("r").iterdir()}
        return json.loads(Path("r/config.json").read_text())

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_a_corrected_config_takes_its_place(self, capfd: pytest.CaptureFixture[str], resume: str) -> None:
        assert self.fail("log=tensorboard")["optim"]["lr"] == 1e-4
        options = ("optim.lr=1e-5", "train.steps=1", f"train.resume={resume}")
        assert main(small_arguments("run.dir=r", *options)) == 0
        assert main(small_arguments("run.dir=fresh", *options)) == 0
        files = [sorted(p.relative_to(run) for p in Path(run).rglob("*") if p.is_file()) for run in ("r", "fresh")]
        assert files[0] == files[1], "something of the failed start remains"
        assert json.loads(Path("r/config.json").read_text())["optim"]["lr"] == 1e-5
        steps = [json.loads(line)["step"] for line in Path("r/metrics.jsonl").read_text().splitlines()]
        assert steps == [0, 1, 1]

    def test_but_not_of_what_has_trained(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.fail()
        with Path("r/metrics.jsonl").open("a") as file:
            file.write('{"step": 1, "split": "train", "time_s": 1.0, "metrics": {}}\n')
        before = {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()}
        assert main(small_arguments("run.dir=r", "optim.lr=1e-5")) == 2
        assert "r holds a run with another config: eval.generate (2 there, 0 now)" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in Path("r").rglob("*") if path.is_file()} == before

    def test_nor_of_another_programs_folder(self, capfd: pytest.CaptureFixture[str]) -> None:
        """A model's directory has a config.json too."""
        shutil.copytree(DIRECTORY, "model", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        before = {path: path.read_bytes() for path in Path("model").rglob("*") if path.is_file()}
        assert main(small_arguments("run.dir=model")) == 2
        assert "run.dir=model holds a config.json that is no run's of posttrain" in capfd.readouterr().err
        assert {path: path.read_bytes() for path in Path("model").rglob("*") if path.is_file()} == before


def test_chat_with_nothing_says_so_alone() -> None:
    """Asked for in earnest, the hub is not there: its retries are not told, what came of them is."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}
    code = (
        "import time, sys; time.sleep = lambda s: None\n"
        "from posttrain.cli import main\nsys.exit(main(['chat', 'nothere']))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("posttrain: error: cannot load nothere: no such path here, and the hub gave: ")


class TestRunDirectory:
    def test_that_holds_another_run(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert main(small_arguments("run.dir=a", "train.steps=1")) == 0
        before = {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()}
        assert "a holds a run with another config: train.seed (42 there, 7 now)" in tell(
            capfd, "run.dir=a", "train.steps=1", "train.seed=7"
        )
        said = tell(capfd, "run.dir=a", "train.steps=1", verb="eval")
        assert "verb (train there, eval now)" in said
        assert {path: path.read_bytes() for path in Path("a").rglob("*") if path.is_file()} == before

    def test_that_holds_something_else(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("thesis").mkdir()
        write("thesis/chapter1.tex", "x")
        assert "run.dir=thesis is not empty and holds no run of posttrain" in tell(capfd, "run.dir=thesis")

    def test_whose_record_is_broken(self, capfd: pytest.CaptureFixture[str]) -> None:
        Path("a").mkdir()
        write("a/config.json", "{")
        assert "a/config.json cannot be read" in tell(capfd, "run.dir=a")

    def test_that_is_a_file_or_below_one(self, capfd: pytest.CaptureFixture[str]) -> None:
        write("file", "x")
        for path in ("file", "file/r", "file/deep/r"):
            said = tell(capfd, f"run.dir={path}")
            assert f"cannot write {path}: " in said
            assert "file is a file, no directory; give another run.dir" in said

    def test_a_cache_that_cannot_be_written(self, capfd: pytest.CaptureFixture[str]) -> None:
        write("file", "x")
        said = tell(capfd, "data.cache=file/cache")
        assert "cannot write file/cache" in said
        assert "data.cache" in said

    def test_on_a_read_only_disk(self, capfd: pytest.CaptureFixture[str], disk: Callable[[int], Path]) -> None:
        place = disk(1)
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        said = tell(capfd, f"run.dir={place}/r")
        assert f"cannot write {place}/r: {place} is on a read-only file system" in said

    def test_with_no_checkpoint_to_resume(self, capfd: pytest.CaptureFixture[str]) -> None:
        assert "train.resume=nowhere holds no complete checkpoint" in tell(capfd, "train.resume=nowhere")


@pytest.fixture
def disk() -> Iterator[Callable[[int], Path]]:
    """disk(megabytes): a small file system of its own; skips, and says so, where it may not be mounted."""
    place = Path("disk").absolute()

    def mount(megabytes: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small file system needs root; the limited writes below are tested everywhere")
        return place

    yield mount
    subprocess.run(["umount", str(place)], capture_output=True, check=False)


def assert_told_and_intact(done: dict[str, Any], place: Path, full: str) -> int:
    """Told in a few lines with status 2; the checkpoints that are there load, and no scratch is left. Their number."""
    assert done["status"] == 2, done["output"]
    assert "Traceback" not in done["output"]
    errors = [line for line in done["output"].splitlines() if "posttrain: error: " in line]
    assert len(errors) == 1, done["output"]
    assert errors[0].startswith("posttrain: error: cannot write ")
    assert full in errors[0]
    assert not list(place.rglob(".*")), "scratch was left behind"
    for line in (place / "metrics.jsonl").read_text().splitlines() if (place / "metrics.jsonl").exists() else []:
        json.loads(line)
    saved = sorted(place.glob("checkpoints/step-*"))
    for path in saved:
        torch.load(path / "optimizer.pt", weights_only=True)
        json.loads((path / "state.json").read_text())
    return len(saved)


OFTEN = ("train.steps=6", "train.save_every=1", "train.eval_every=3", "train.keep_checkpoints=9")


@pytest.mark.parametrize("megabytes", long_but((1, 4, 8, 12, 16, 22, 28), 4, 12, 22))
def test_a_full_disk(posttrain_process: Run, disk: Callable[[int], Path], megabytes: int) -> None:
    """A checkpoint of this model has 10.4 MB: the disk is full at the first one's weights, at its optimizer, at later ones."""
    place = disk(megabytes) / "r"
    done = posttrain_process(*OFTEN, f"run.dir={place}")
    assert assert_told_and_intact(done, place, "") == megabytes * 2**20 // 10_440_000
    if megabytes == 22:  # with room, it goes on
        subprocess.run(["mount", "-o", "remount,size=90m", str(place.parent)], check=True)
        again = posttrain_process(*OFTEN, f"run.dir={place}")
        assert again["status"] == 0, again["output"]
        assert "continues at step 2" in again["output"]


@pytest.mark.parametrize(
    "max_file_bytes", long_but((0, 100, 1_000, 5_000, 20_000, 1_000_000, 4_000_000), 0, 1_000, 1_000_000)
)
def test_writes_that_are_refused(posttrain_process: Run, max_file_bytes: int) -> None:
    """By size of file, from the first write of all to the optimizer's; no root needed."""
    assert posttrain_process("run.dir=warm", "train.steps=1")["status"] == 0  # the token cache is there
    done = posttrain_process(*OFTEN, "run.dir=r", max_file_bytes=max_file_bytes)
    assert assert_told_and_intact(done, Path("r"), "") == 0


def test_a_checkpoint_outlives_refused_writes(posttrain_process: Run) -> None:
    assert posttrain_process("run.dir=r", "train.steps=4", "train.save_every=2", die=None)["status"] == 0
    Path("r/summary.json").unlink()
    shutil.rmtree("r/checkpoints/step-000004")
    left = len(list(Path("r").glob("checkpoints/step-*")))
    assert left > 0
    done = posttrain_process("run.dir=r", "train.steps=4", "train.save_every=2", max_file_bytes=4_000_000)
    assert assert_told_and_intact(done, Path("r"), "step-000004") == left


@pytest.mark.parametrize("max_file_bytes", [0, 500, 5_000])
def test_a_cache_on_a_full_disk(posttrain_process: Run, max_file_bytes: int) -> None:
    done = posttrain_process("data.cache=c", "run.dir=r", max_file_bytes=max_file_bytes)
    assert done["status"] == 2, done["output"]
    assert "cannot write c/" in done["output"]
    assert "data.cache" in done["output"]
    assert not list(Path("c").iterdir())
    assert not Path("r").exists()


@pytest.mark.parametrize(
    ("target", "what"),
    [
        ("posttrain.models.policy:weighted_nll", "the loss is not finite"),
        ("posttrain.runtime:Runtime.clip", "the gradient is not finite"),
    ],
)
def test_what_is_not_finite_stops_the_run_by_name(posttrain_process: Run, target: str, what: str) -> None:
    options = ("run.dir=r", "train.steps=4", "train.save_every=1", "batch.micro_size=4")
    done = posttrain_process(*options, poison=[target, 5 if "loss" in what else 3])
    assert done["status"] == 1, done["output"]
    (error,) = [line for line in done["output"].splitlines() if "posttrain: error: " in line]
    assert f"{what}" in error
    assert "at step 3; this rank's examples: " in error
    ids = error.partition("examples: ")[2].partition(". ")[0].split(", ")
    assert len(ids) == (8 if "gradient" in what else 4)  # the micro-batch at fault, where it is known
    assert "the last good checkpoint is r/checkpoints/step-000002" in error
    assert "Traceback" not in done["output"]
    assert json.loads(Path("r/checkpoints/step-000002/state.json").read_text())["step"] == 2
    again = posttrain_process(*options)
    assert again["status"] == 0
    assert "continues at step 2" in again["output"]


class TestEvaluationData:
    def test_eval_needs_no_training_data(self, capfd: pytest.CaptureFixture[str]) -> None:
        write("d.jsonl", *[{"prompt": f"{n}+1=", "completion": str(n + 1)} for n in range(40)])
        assert main(["eval", *small_arguments("data.train=", "data.eval=d.jsonl", "run.dir=r")]) == 0
        assert "on 40 examples" in capfd.readouterr().out
        assert json.loads(Path("r/summary.json").read_text())["metrics"]["nll"]["clusters"] == 40

    def test_the_same_scores_with_training_data_beside_it(self) -> None:
        for name, train in (("a", ""), ("b", "embedded:prompt_completion:50")):
            assert main(["eval", *small_arguments(f"data.train={train}", f"run.dir={name}")]) == 0
        a, b = (json.loads(Path(f"{name}/summary.json").read_text())["metrics"] for name in "ab")
        assert a == b

    def test_none_of_it_fits(self, capfd: pytest.CaptureFixture[str]) -> None:
        write("d.jsonl", {**ROW, "completion": "2" * 99})
        for verb, train in (("train", "embedded:prompt_completion:200"), ("eval", "")):
            said = tell(capfd, f"data.train={train}", "data.eval=d.jsonl", verb=verb)
            assert "data.eval: all examples are longer than data.max_length=64" in said

    def test_none_was_held_out(self, capfd: pytest.CaptureFixture[str]) -> None:
        options = ("data.eval=", "data.eval_fraction=0", "train.steps=1")
        assert main(small_arguments(*options, "run.dir=a")) == 0
        assert "warning: no evaluation examples" in capfd.readouterr().out
        assert "data.eval_fraction=0 held none out; give data.eval" in tell(capfd, *options, verb="eval")


def test_two_processes_build_the_same_cache() -> None:
    """The quicker wins; the other finds its work done. What a killed builder left is swept away."""
    import socket

    from posttrain.data import cache

    directory = Path("c/abc")
    gone = get_context("fork").Process(target=os._exit, args=(0,))
    gone.start()
    gone.join()
    stale = Path(f"c/abc.{socket.gethostname()}.{gone.pid}.tmp")
    alive = Path(f"c/abc.{socket.gethostname()}.1.tmp")
    elsewhere = Path(f"c/abc.otherhost.{gone.pid}.tmp")
    for path in (stale, alive, elsewhere):
        path.mkdir(parents=True)

    def fill(scratch: Path) -> dict[str, Any]:
        (scratch / "data").write_text("mine")
        if not cache.is_built(directory):  # meanwhile the other process
            directory.mkdir()
            (directory / "data").write_text("theirs")
            (directory / cache.FACTS).write_text('{"who": "they"}')
        return {"who": "I"}

    cache.build(directory, fill)
    assert cache.read_facts(directory) == {"who": "they"}
    assert sorted(path.name for path in Path("c").iterdir()) == sorted(["abc", alive.name, elsewhere.name])
    (directory / cache.FACTS).unlink()  # half deleted by somebody
    cache.build(directory, lambda scratch: {"who": "I"})
    assert cache.read_facts(directory) == {"who": "I"}


def test_weights_without_masters_are_refused(capsys):
    from posttrain.cli import main

    model = ["model.path=embedded", "data.train=embedded:prompt_completion:20", "data.max_length=64", "run.dir=r"]
    assert main([*model, "model.dtype=bfloat16", "train.steps=1"]) == 2
    assert "without fp32 masters" in capsys.readouterr().err


def test_an_adapter_whose_base_is_not_to_be_had_is_named(capsys, tmp_path):
    from posttrain.cli import main

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "some/base"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        from posttrain.models.embedded import DIRECTORY

        (tmp_path / "a" / name).write_text((DIRECTORY / name).read_text())
    assert main(["model.path=a", "data.train=embedded:prompt_completion:20", "data.max_length=64"]) == 2
    told = capsys.readouterr().err
    assert "its base some/base" in told
    assert "model.path=BASE adapter=lora adapter.path=a" in told
