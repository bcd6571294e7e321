"""precision=fp8: torchao's products against float8 by hand, which modules are converted and said, and runs with it.

Everything here is emulated, but for the last test, which a GPU alone can run.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_resume import log
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config

from posttrain.config import resolve
from posttrain.errors import ConfigError, ModelError
from posttrain.models.embedded import DIRECTORY
from posttrain.models.float8 import Float8, check_float8, convert
from posttrain.models.networks import Head, build_network

pytest.importorskip("torchao", reason="torchao is an extra: pip install 'posttrain[fp8]'")

from posttrain.models.float8_linear import AutocastFloat8Linear, float8_config, to_float8

Run = Callable[..., Any]
FP8 = ("precision=fp8", "precision.emulate=true")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def test_the_formats_are_those_of_the_paper() -> None:
    """arXiv:2209.05433, table 1."""
    assert (torch.finfo(E4M3).max, torch.finfo(E5M2).max) == (448, 57344)
    assert (torch.finfo(E4M3).smallest_normal, torch.finfo(E5M2).smallest_normal) == (2.0**-6, 2.0**-14)


def rounded(t: Tensor, dtype: torch.dtype, dim: int | None) -> Tensor:
    """t in float8 and back. dim: the product's inner dimension, for a scale a row of the operand; None: one scale."""
    amax = t.double().abs().amax() if dim is None else t.double().abs().amax(dim, keepdim=True)
    scale = (torch.finfo(dtype).max / amax).float()
    if dim is not None:  # rounded down to a power of two
        scale = 2.0 ** torch.floor(torch.log2(scale.double())).float()
    return (t.float() * scale).to(dtype).float() / scale


def by_hand(x: Tensor, w: Tensor, dy: Tensor, rows: bool, gradient: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Y, ∂X, ∂W of x [n, in], w [out, in], dy [n, out], the operands rounded before each product."""
    inner = (lambda dim: dim) if rows else (lambda dim: None)
    y = rounded(x, E4M3, inner(1)) @ rounded(w, E4M3, inner(1)).T
    dx = rounded(dy, gradient, inner(1)) @ rounded(w, E4M3, inner(0))
    dw = rounded(dy, gradient, inner(0)).T @ rounded(x, E4M3, inner(0))
    return tuple(product.bfloat16().float() for product in (y, dx, dw))


def products(recipe: str, x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    plain = nn.Linear(w.shape[1], w.shape[0], bias=False)
    plain.weight.data.copy_(w)
    layer = to_float8(plain, float8_config(recipe, emulate=True))
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(dy)
    assert y.dtype == torch.bfloat16
    assert x.grad is not None
    assert plain.weight.grad is not None, "the parameter is the very same"
    assert plain.weight.grad.dtype == torch.float32
    return y.detach().float(), x.grad.float(), plain.weight.grad


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """Rows and columns of very different sizes, so that where the scale is taken shows. x and dy are bf16 numbers already."""
    made = torch.Generator().manual_seed(0)
    x, w, dy = (torch.randn(shape, generator=made) for shape in ((24, 32), (48, 32), (24, 48)))
    x, dy = (t * torch.logspace(-2, 1, 24)[:, None] for t in (x, dy))
    return x.bfloat16().float(), w * torch.logspace(0, -2, 48)[:, None], dy.bfloat16()


@pytest.mark.parametrize(("recipe", "rows", "gradient"), [("tensorwise", False, E5M2), ("rowwise", True, E4M3)])
def test_the_three_products_are_those_worked_out_by_hand(recipe: str, rows: bool, gradient: torch.dtype) -> None:
    x, w, dy = operands()
    found = products(recipe, x, w, dy)
    for ours, wanted in zip(found, by_hand(x, w, dy.float(), rows, gradient), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=2**-7, atol=1e-6 * float(wanted.abs().max()))
    other = by_hand(x, w, dy.float(), rows, E4M3 if gradient is E5M2 else E5M2)
    exact = (x @ w.T, dy.float() @ w, dy.float().T @ x)
    for i in (1, 2):
        assert (found[i] - other[i]).norm() > 1e-2 * other[i].norm(), "the gradient's format shows"
    for ours, true in zip(found, exact, strict=True):
        assert 1e-3 < (ours - true).norm() / true.norm() < 0.1, "rounded, and not by much"


def test_without_autocast_it_is_the_plain_layer() -> None:
    plain = nn.Linear(32, 16)
    layer = to_float8(plain, float8_config("tensorwise", emulate=True))
    x = torch.randn(3, 32)
    assert torch.equal(layer(x), plain(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(layer(x), plain(x))
        assert layer(x[:0]).shape == (0, 16)


def network(*arguments: str, head: Head | None = None, float8: Float8 | None = None) -> Any:
    cfg = resolve([*arguments, *FP8])
    return build_network(cfg.model, cfg.adapter, torch.bfloat16, 0, head=head, float8=float8)[0]


def converted(decoder: Any) -> list[str]:
    return [name for name, m in decoder.network.named_modules() if isinstance(m, AutocastFloat8Linear)]


EMULATED = Float8("tensorwise", emulate=True)


def test_all_between_the_first_and_the_last_layer_are_converted() -> None:
    """4 layers of 7 linear modules, and the output layer."""
    plain = network("stage=sft")
    before = {name: p.data_ptr() for name, p in plain.named_parameters()}
    said = convert(plain, EMULATED, adapted=False)
    assert said == (
        "14 of 29 linear modules (tensorwise, emulated); in bf16 stay 14 in the first and the last layer, the output layer"
    )
    names = converted(plain)
    assert {name.split(".")[2] for name in names} == {"1", "2"}
    assert len(names) == 14
    assert type(plain.head) is nn.Linear
    assert {name: p.data_ptr() for name, p in plain.named_parameters()} == before


def test_what_is_no_multiple_of_16_wide_stays_and_is_counted() -> None:
    odd = network("stage=sft", "model.init=config", "model.config.intermediate_size=100")
    assert convert(odd, EMULATED, adapted=False) == (
        "8 of 29 linear modules (tensorwise, emulated); in bf16 stay 14 in the first and the last layer, "
        "6 not a multiple of 16 wide, the output layer"
    )


def test_under_an_adapter_the_frozen_weights_are_converted_and_its_own_stay() -> None:
    adapted = network("stage=lora", float8=EMULATED)
    assert adapted.float8 == (
        "14 of 45 linear modules (tensorwise, emulated); in bf16 stay 14 in the first and the last layer, "
        "16 of the adapter, the output layer"
    )
    assert all(not adapted.network.get_submodule(name).weight.requires_grad for name in converted(adapted))
    assert "model.layers.2.self_attn.q_proj.base_layer" in converted(adapted)


def test_a_score_layer_and_a_mixtures_routers_stay(mixture: None) -> None:
    scored = network("stage=reward", head=Head("last", frozenset()), float8=EMULATED)
    assert type(scored.head) is nn.Linear
    assert scored.float8.endswith("14 in the first and the last layer, the output layer")
    mixed = network(
        "model.path=mixture", "model.init=config", "model.config.num_hidden_layers=3", "data.train=x", float8=EMULATED
    )
    assert len(converted(mixed)) == 4
    assert not [name for name in converted(mixed) if "gate" in name or "expert" in name]


def test_a_model_without_a_module_to_convert_is_refused() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DIRECTORY)
    GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2).save_pretrained("gpt2")
    with pytest.raises(
        ModelError, match=r"gpt2 model: of its 1 none can be converted \(the output layer\); use precision=bf16"
    ):
        network("model.path=gpt2", "model.init=config", "data.train=x", float8=EMULATED)


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
def test_where_the_hardware_lacks_it_emulation_must_be_asked_for(run: Run) -> None:
    with pytest.raises(ConfigError, match=r"no GPU.*use precision=bf16, or precision.emulate=true"):
        run("precision=fp8")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["precision=fp8", "adapter=qlora"],
            "4 bits, which have no float8 products; use adapter=lora, or precision=bf16",
        ),
        (["precision=bf16", "precision.recipe=rowwise"], "precision.recipe=rowwise is of precision=fp8"),
        (["precision=fp32", "precision.emulate=true"], "precision.emulate=true is of precision=fp8"),
        (["precision=fp8", "precision.recipe=blockwise"], "tensorwise"),
    ],
)
def test_refused(arguments: list[str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        resolve(arguments)


STEPS = ("stage=pretrain", "model.init=config", "data.train=embedded:text:200", "data.eval=embedded:text:10:held_out",
         "batch.size=8", "train.steps=12", "train.log_every=3", "optim.lr=1e-3")  # fmt: skip


def test_the_loss_stays_within_5_percent_of_bf16s(run: Run, capfd: pytest.CaptureFixture[str]) -> None:
    """From random weights. (Forty steps of 16 examples: within 0.2 percent.)"""
    found = {}
    for name, options in {
        "bf16": ["precision=bf16"],
        "tensorwise": FP8,
        "rowwise": [*FP8, "precision.recipe=rowwise"],
    }.items():
        run(*STEPS, *options, f"run.dir={name}")
        found[name] = [line["metrics"]["loss"] for line in log(name) if line["split"] == "train"]
        assert ("14 of 29 linear modules" in capfd.readouterr().out) == (name != "bf16")
    for recipe in ("tensorwise", "rowwise"):
        assert found[recipe] == pytest.approx(found["bf16"], rel=0.05)
        assert found[recipe][-1] < 0.8 * found[recipe][0]
        assert found[recipe] != found["bf16"]
    assert found["tensorwise"] != found["rowwise"]
    plain, ours = (load_file(Path(name) / "model" / "model.safetensors") for name in ("bf16", "tensorwise"))
    assert {k: (t.shape, t.dtype) for k, t in ours.items()} == {k: (t.shape, t.dtype) for k, t in plain.items()}
    assert (Path("tensorwise/model/config.json")).read_text() == (Path("bf16/model/config.json")).read_text()
    reloaded = AutoModelForCausalLM.from_pretrained("tensorwise/model")
    assert type(reloaded.model.layers[1].mlp.up_proj) is nn.Linear


def test_reference_and_evaluation_run_through_the_same_modules(run: Run) -> None:
    """Before the first step dpo's policy is its reference: h is 0, to the last bit. Activations are recomputed besides."""
    run("stage=dpo", "data.train=embedded:pairs:40", "data.eval=embedded:pairs:12:held_out", *FP8, "train.steps=2",
        "batch.size=2", "train.gradient_checkpointing=true", "run.dir=r")  # fmt: skip
    first = next(line["metrics"] for line in log("r") if line["split"] == "eval")
    assert first["reward_chosen"]["value"] == first["reward_rejected"]["value"] == first["margin"]["value"] == 0


def test_an_adapter_and_what_samples_train_in_float8_and_reload(run: Run) -> None:
    run("stage=ppo", "adapter=lora", "data.train=embedded:prompts:40", "data.eval=embedded:prompts:4:held_out",
        "stage.rewards=[exact]", "stage.max_new_tokens=3", "stage.samples=2", "stage.epochs=1", "eval.generate=2",
        "eval.max_new_tokens=2", *FP8, "train.steps=2", "batch.size=2", "run.dir=r")  # fmt: skip
    names = load_file(Path("r/model/adapter_model.safetensors"))
    assert len(names) == 16
    assert all(tensor.dtype == torch.float32 for tensor in names.values())
    again = network("stage=lora", "adapter.path=r/model", float8=EMULATED)
    assert len(converted(again)) == 14


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_on_a_gpu_the_hardwares_products_are_those_of_the_emulation(recipe: str) -> None:
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no GPU with float8")
    device = torch.device("cuda")
    check_float8(Float8(recipe, emulate=False), device)
    x, w, dy = (t.to(device) for t in operands())
    outputs = []
    for emulate in (True, False):
        layer = nn.Linear(32, 48, bias=False, device=device)
        layer.weight.data.copy_(w)
        fast = to_float8(layer, float8_config(recipe, emulate))
        given = x[:23].clone().requires_grad_()  # 23 tokens: no multiple of 16
        with torch.autocast("cuda", torch.bfloat16):
            y = fast(given)
        y.backward(dy[:23])
        outputs.append((y.detach().float(), given.grad.float(), layer.weight.grad))
    for ours, wanted in zip(*outputs, strict=True):
        assert (ours - wanted).norm() < 1e-2 * wanted.norm()
