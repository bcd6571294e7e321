"""What tests share: one thread a process (pytest-xdist runs two), a cache of their own, and how to run a stage."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
from warm import warm

ROOT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("POSTTRAIN_SHARED_DATA", ROOT.parent / "shared" / "data"))
FETCH = SHARED_DATA.parent / "tools" / "fetch_smollm2.py"


@pytest.fixture(autouse=True)
def _own_folders(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test runs in an empty folder; the token cache is shared by a worker's tests, never the user's.

    Nothing waits for the disk: no test cuts the power. Processes of their own (tests/process_server.py) do wait.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="session")
def warm_process() -> None:
    """This process is made ready for many runs."""
    warm()


@pytest.fixture
def no_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs of the real model, whose checkpoints are 1.6 GB each and of which nothing is read again."""
    monkeypatch.setattr("posttrain.train.checkpoint.save", lambda *_: None)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data; tests that need it skip, and say so, where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA} (set POSTTRAIN_SHARED_DATA)")
    return SHARED_DATA


@pytest.fixture(scope="session")
def smollm2() -> str:
    """SmolLM2-135M-Instruct as a transformers directory: POSTTRAIN_SMOLLM2, or fetched once into the temporary folder."""
    directory = Path(os.environ.get("POSTTRAIN_SMOLLM2", Path(tempfile.gettempdir()) / "posttrain-smollm2"))
    if not (directory / "config.json").is_file():
        if not FETCH.is_file():
            pytest.skip(f"no model at {directory} (set POSTTRAIN_SMOLLM2)")
        scratch = directory.with_name(f"{directory.name}.{os.getpid()}")
        done = subprocess.run([sys.executable, str(FETCH), str(scratch)], capture_output=True, text=True, timeout=600)
        if done.returncode:
            pytest.skip(f"the real model cannot be fetched here: {done.stderr.strip().splitlines()[-1:]}")
        if not directory.exists():
            scratch.rename(directory)
    return str(directory)


@pytest.fixture(scope="session")
def shallow_smollm2(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Its first layers, with its vocabulary, its template and its special tokens: a tenth of the time."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, layers = AutoModelForCausalLM.from_pretrained(smollm2, dtype="auto"), 3
    del model.model.layers[layers:]
    model.config.num_hidden_layers = layers
    directory = tmp_path_factory.mktemp("shallow")
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(smollm2).save_pretrained(directory)
    return str(directory)


@pytest.fixture
def mixture() -> None:
    """`mixture`: a tiny mixture of experts, its config and tokenizer without weights (model.init=config)."""
    from transformers import AutoTokenizer, MixtralConfig

    from posttrain.models.embedded import DIRECTORY

    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, num_local_experts=4, num_experts_per_tok=2,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    config.save_pretrained("mixture")
    tokenizer.save_pretrained("mixture")


@pytest.fixture
def run(warm_process: None) -> Callable[..., Any]:
    """Run a stage in this process: run("stage=sft", "train.steps=3") → Summary. Small unless told otherwise."""
    from posttrain import run as posttrain_run

    def small(*overrides: str) -> Any:
        return posttrain_run(small_arguments(*overrides))

    return small


SMALL = {
    "train.steps": "4", "train.log_every": "1", "train.eval_every": "1000", "batch.size": "8", "eval.generate": "0",
    "eval.resamples": "200", "data.train": "embedded:prompt_completion:200",
    "data.eval": "embedded:prompt_completion:40:held_out", "model.path": "embedded", "precision": "fp32",
    "data.max_length": "64", "optim.lr": "1e-4", "log.report": "false",
}  # fmt: skip
"""The settings of `run`, for those who need them as arguments. It evaluates and saves at its end."""


def long_but(names: Iterable[Any], *quick: Any) -> list[Any]:
    """Parameters of a test that is one of the long ones but for these."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in names]


def small_arguments(*overrides: str) -> list[str]:
    """A small run's arguments; an override `key=` takes the key out."""
    values = SMALL | dict(override.split("=", 1) for override in overrides)
    return [f"{key}={value}" for key, value in values.items() if value]


@pytest.fixture(scope="session")
def server() -> Iterator[subprocess.Popen[str]]:
    """tests/process_server.py, started once a worker."""
    command = [sys.executable, str(ROOT / "tests" / "process_server.py")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        assert process.stdin is not None
        process.stdin.close()


@pytest.fixture
def posttrain_process(server: subprocess.Popen[str]) -> Callable[..., Any]:
    """Run posttrain in a process of its own: (*overrides, **what befalls it) → {"status", "output", "seconds"}."""

    def run_task(*overrides: str, verb: str = "train", **task: Any) -> Any:
        assert server.stdin is not None
        assert server.stdout is not None
        environment = {name: os.environ[name] for name in ("XDG_CACHE_HOME", "WANDB_MODE") if name in os.environ}
        task |= {"arguments": [verb, *small_arguments(*overrides)], "folder": os.getcwd(), "environment": environment}
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        return json.loads(server.stdout.readline())

    return run_task
