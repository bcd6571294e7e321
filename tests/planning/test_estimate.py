"""What one layer says of a whole model: against the whole model, run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import small_arguments
from transformers import AutoTokenizer, Gemma3TextConfig

from posttrain.cli import main
from posttrain.config import resolve
from posttrain.layout import packing_of
from posttrain.models.embedded import DIRECTORY
from posttrain.models.load import load_tokenizer
from posttrain.models.networks import build_network
from posttrain.planning.calibrate import Calibration
from posttrain.planning.estimate import Estimate, estimate
from posttrain.planning.memory import cache_bytes, peak
from posttrain.planning.skeleton import Skeleton
from posttrain.planning.writing import write
from posttrain.runtime import Runtime
from posttrain.sampling import Sampling
from posttrain.session import count_steps, open_loader, prepare_data
from posttrain.tools import plan as tool


def planned(*overrides: str) -> tuple[Estimate, Any, Any]:
    """The estimate, the config and the runtime."""
    cfg = resolve(small_arguments(*overrides), "plan")
    runtime = Runtime(cfg.precision.name, cfg.distribution.name)
    prepared = prepare_data(cfg, load_tokenizer(cfg.model), runtime)
    loader = open_loader(cfg, prepared, packing_of(cfg, "cpu", prepared))
    head, critic = cfg.stage.head(set()), cfg.stage.needs_critic
    module, _ = build_network(
        cfg.model, cfg.adapter, runtime.compute_dtype, 0, head=head, critic=critic, shape_only=True
    )
    return estimate(cfg, runtime, prepared, loader, module, count_steps(cfg, loader)[0]), cfg, runtime


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16", "batch.micro_tokens=200"],
        ["train.gradient_checkpointing=true"],
        ["stage=dpo", "adapter=lora", "data.train=embedded:pairs:200", "data.eval=embedded:pairs:20:held_out"],
    ],
    ids=["bf16", "checkpointing", "dpo-lora"],
)
def test_against_a_measured_peak(overrides: list[str], run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured by torch's profiler, of every block its allocator gives and takes back; the plan counts otherwise."""
    pytest.importorskip("torch.profiler")
    given = ["batch.size=64", "train.steps=2", "model.config.num_hidden_layers=4", *overrides]
    found, _, _ = planned(*given)
    measured = run_measured(run, given, monkeypatch)
    assert peak(found.moments)[1] == pytest.approx(measured, rel=0.15)


def run_measured(run: Any, given: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """The most at once in the training loop."""
    import time

    from torch.profiler import ProfilerActivity, profile

    from posttrain.train import Trainer

    began: list[int] = []
    fit = Trainer._fit
    monkeypatch.setattr(Trainer, "_fit", lambda self: began.append(time.time_ns()) or fit(self))  # type: ignore[func-returns-value]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as records:
        run(*given)
    live = most = 0
    for event in sorted(records.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            most = max(most, live) if event.start_ns() > began[0] else most
    return most


def test_the_answers_cache() -> None:
    """2·layers·kv_heads·head_dim·4 bytes a token of the longest batch, and one layer's again while it grows."""
    cfg = resolve(small_arguments("stage=ppo", "data.train=embedded:prompts:50", "stage.rewards=[exact]"), "plan")
    runtime = Runtime("fp32", "single")
    module, _ = build_network(cfg.model, cfg.adapter, torch.float32, 0, critic=True, shape_only=True)
    config: Any = module.network.config
    head_dim = config.hidden_size // config.num_attention_heads
    calibration = Calibration(Skeleton(module, runtime.device), cfg.stage, runtime)
    written = write(calibration, [[5] * 6, [5] * 9], samples=3, room=8, sampling=Sampling(1.0))
    a_layer = 2 * config.num_key_value_heads * head_dim * 4
    assert written.cache == 2 * 3 * (9 + 8) * (config.num_hidden_layers + 1) * a_layer
    assert written.cache == cache_bytes(102, [(config.num_hidden_layers, a_layer)])
    assert written.tokens == 2 * 3 * 8
    assert written.seconds.value > 0


def test_layers_of_two_kinds() -> None:
    """Each kind is run with its own mask, as often as there are such layers; the weights are never read."""
    AutoTokenizer.from_pretrained(DIRECTORY).save_pretrained("two")
    Gemma3TextConfig(
        vocab_size=99, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=8, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ).save_pretrained("two")  # fmt: skip
    found, cfg, runtime = planned("model.path=two")
    assert found.times is not None, found.measured
    assert "2 of 3 layers" in found.measured
    module, _ = build_network(cfg.model, cfg.adapter, torch.float32, 0, shape_only=True)
    assert [kind.count for kind in Skeleton(module, runtime.device).kinds] == [2, 1]


def test_a_skeletons_layer_is_the_models() -> None:
    """With the same numbers and as many layers as the model has, one, it gives the model's own states."""
    cfg = resolve(small_arguments("model.init=config", "model.config.num_hidden_layers=1"), "plan")
    whole, _ = build_network(cfg.model, cfg.adapter, torch.float32, 0)
    shape, _ = build_network(cfg.model, cfg.adapter, torch.float32, 0, shape_only=True)
    skeleton = Skeleton(shape, torch.device("cpu"))
    ids = torch.arange(3, 12)[None]
    with skeleton.real(skeleton.kinds[0]), torch.no_grad():
        shape.load_state_dict(whole.state_dict())
        torch.testing.assert_close(shape.network(ids).logits, whole.network(ids).logits)
        with_layer = shape.network(ids).logits
    with torch.no_grad():
        assert not torch.allclose(shape.network(ids).logits, with_layer)  # now states pass through


@pytest.mark.parametrize("stage", ["gpro", "ppo", "qlora"])
def test_every_stage_is_measured(stage: str, capfd: pytest.CaptureFixture[str]) -> None:
    kind = {"gpro": "groups", "ppo": "prompts", "qlora": "prompt_completion"}[stage]
    data = [f"data.train=embedded:{kind}:60", f"data.eval=embedded:{kind}:20:held_out"]
    data += ["stage.max_new_tokens=8", "stage.rewards=[exact]"] if stage == "ppo" else []
    assert main(["plan", *small_arguments(f"stage={stage}", *data, "eval.generate=2", "eval.max_new_tokens=4")]) == 0
    said = capfd.readouterr().out
    assert "the run" in said
    assert "not known" not in said
    assert ("sampling" in said) == (stage == "ppo")


def test_what_does_not_fit(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """The device is too small, and the message names keys; where not even a layer can be run, that is said."""
    monkeypatch.setattr(tool, "device_bytes", lambda _: 10**6)
    monkeypatch.setattr("posttrain.planning.estimate.free_bytes", lambda _: 10**6)
    assert main(["plan", *small_arguments()]) == 0
    said = " ".join(capfd.readouterr().out.split())
    assert "there are only 0.0 GiB: try" in said
    assert "adapter=lora" in said
    assert "time not known: one layer and the output layer take 0.0 GiB, and 0.0 GiB are free" in said


def test_a_stream_is_planned(capfd: pytest.CaptureFixture[str]) -> None:
    Path("t.jsonl").write_text("".join(json.dumps({"text": f"{n}+1={n + 1}"}) + "\n" for n in range(40)))
    given = small_arguments("stage=pretrain", "data.train=t.jsonl", "data.eval=", "data.streaming=true", "batch.size=4")
    assert main(["plan", *given]) == 0
    assert "the run" in capfd.readouterr().out
