"""The sequence-wise load balance against the formula done by hand, and its independence of how the batch is laid out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from families import GROUPS, policy

from posttrain.data.batches import Batch, collate
from posttrain.models.policy import Policy, Scores

EXPERTS, K = 4, 2


def scored(family: str, batch: Batch, ours: Policy | None = None) -> Scores:
    return (ours or policy(family))(batch, weights=torch.ones(len(batch.targets)), router=True)


def balance_by_hand(ours: Policy, gates: list[torch.nn.Module], shares: Callable[..., Any]) -> float:
    """Each example alone: Σ_layers Σ_examples T·E·Σ_e f_e m_e / layers, expert by expert; shares(gate, state) → (m, chosen)."""
    states: dict[torch.nn.Module, torch.Tensor] = {}
    for gate in gates:
        gate.register_forward_pre_hook(lambda m, inputs: states.update({m: inputs[0].detach().reshape(-1, 32)}))
    total = 0.0
    for example in GROUPS:
        length = example.lengths[0]
        ours.network(input_ids=torch.tensor([example.prompt + example.responses[0]]), use_cache=False)
        for gate in gates:
            f, m = [0.0] * EXPERTS, [0.0] * EXPERTS
            for state in states[gate]:
                probability, chosen = shares(gate, state)
                for e in range(EXPERTS):
                    m[e] += float(probability[e]) / length
                    f[e] += (e in chosen) / length
            assert sum(f) == pytest.approx(K)
            total += length * EXPERTS * sum(a * b for a, b in zip(f, m, strict=True))
    return total / len(gates)


def softmax_gate(gate: Any, state: torch.Tensor) -> tuple[list[float], list[int]]:
    p = (gate.weight @ state).softmax(-1).tolist()
    return p, sorted(range(EXPERTS), key=lambda e: -p[e])[:K]


def deepseek_v3_gate(gate: Any, state: torch.Tensor) -> tuple[list[float], list[int]]:
    """Affinities are sigmoids, normalised for m (arXiv:2412.19437, eqs. 15, 18); two groups of two experts, the better one
    by affinity + bias takes the token, so that both its experts are chosen."""
    s = (gate.weight @ state).sigmoid().tolist()
    biased = [a + float(b) for a, b in zip(s, gate.e_score_correction_bias, strict=True)]
    chosen = [0, 1] if biased[0] + biased[1] > biased[2] + biased[3] else [2, 3]
    return [a / sum(s) for a in s], chosen


@pytest.mark.parametrize(
    ("family", "gate", "shares"),
    [
        ("mixtral", "MixtralTopKRouter", softmax_gate),
        ("qwen3_next", "Qwen3NextTopKRouter", softmax_gate),
        ("deepseek_v3", "DeepseekV3TopkRouter", deepseek_v3_gate),
    ],
)
@torch.no_grad()
def test_balance_is_the_formula_done_by_hand(family: str, gate: str, shares: Callable[..., Any]) -> None:
    ours = Policy(families.network(family))
    gates = [m for m in ours.network.modules() if type(m).__name__ == gate]
    for each in gates:
        if hasattr(each, "e_score_correction_bias"):
            each.e_score_correction_bias.copy_(torch.tensor([0.1, -0.2, 0.15, 0.0]))
    router = scored(family, collate(GROUPS, [[0], [1], [2]], "padded"), ours).router
    assert router is not None
    assert float(router.balance) == pytest.approx(balance_by_hand(ours, gates, shares), rel=1e-5)
    assert float(router.load.sum()) == pytest.approx(K * router.tokens)


MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "granitemoe", "jetmoe", "llama4_text", "deepseek_v2", "deepseek_v3", "dbrx",
            "gpt_oss", "afmoe", "jamba", "qwen3_next", "granitemoehybrid", "minimax"]  # fmt: skip


@pytest.mark.parametrize("family", MIXTURES)
@torch.no_grad()
def test_balance_does_not_depend_on_the_layout(family: str) -> None:
    assert policy(family).is_mixture
    whole = scored(family, collate(GROUPS, [[0], [1], [2]], "padded")).router
    layouts = {"padding": [collate(GROUPS, [[0], [1], [2]], "padded", extra_padding=9)]}
    layouts["one by one"] = [collate([group], [[0]], "padded") for group in GROUPS]
    if family in families.PACKS:
        layouts["packed"] = [collate(GROUPS, [[0, 1, 2]], "packed")]
    assert whole is not None
    for name, batches in layouts.items():
        found = [scored(family, batch).router for batch in batches]
        assert sum(float(r.balance) for r in found if r) == pytest.approx(float(whole.balance), rel=1e-5), name
        assert sum(r.tokens for r in found if r) == whole.tokens
        torch.testing.assert_close(sum(r.load for r in found if r), whole.load)


def test_uniform_routing_balances_at_k_and_one_expert_for_all_at_worst() -> None:
    """m = 1/E: E Σ f/E = Σ f = k a token. All mass on expert 0 with k = 1: E a token."""
    from posttrain.models.router import Router, Routing

    batch = collate(GROUPS, [[0], [1], [2]], "padded")
    flat = torch.zeros(batch.input_ids.numel(), EXPERTS)
    config = type("Config", (), {"num_experts_per_tok": 2})
    assert float(Router.of([Routing(flat)], batch, config).balance) == pytest.approx(2 * batch.tokens)
    one = flat.clone()
    one[:, 0] = 50.0
    config.num_experts_per_tok = 1  # type: ignore[attr-defined]
    assert float(Router.of([Routing(one), Routing(one)], batch, config).balance) == pytest.approx(4 * batch.tokens)
    assert float(Router.of([Routing(one)], batch.empty(), config).balance) == 0.0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_its_gradient_reaches_the_routers(checkpointing: bool) -> None:
    ours = Policy(families.network("deepseek_v3")).train()
    if checkpointing:
        ours.network.activation_checkpointing_enable({"use_reentrant": False})
    router = scored("deepseek_v3", collate(GROUPS, [[0], [1], [2]], "padded"), ours).router
    assert router is not None
    router.balance.backward()
    (gate,) = [module for module, _ in ours.routers.modules]
    assert gate.weight.grad is not None
    assert float(gate.weight.grad.abs().sum()) > 0


def test_no_mixture_no_router() -> None:
    for family in ("llama", "gpt2", "mamba"):
        assert not policy(family).is_mixture
        assert scored(family, collate(GROUPS, [[0]], "padded")).router is None


@pytest.mark.parametrize("stage", ["dpo", "gpro", "reward"])
def test_the_preference_stages_have_it_too(run: Callable[..., Any], mixture: None, stage: str) -> None:
    """The weighted loss is the stage's own and the balance, and sharing prompts changes neither."""
    data = ["data.train=embedded:groups:40", "data.eval=embedded:groups:20:held_out", "batch.size=8"]
    lines = {}
    for name, layout, weight in (("none", "padded", 0), ("padded", "padded", 0.1), ("shared", "shared", 0.1)):
        run(f"stage={stage}", "model.path=mixture", "model.init=config", *data, f"stage.aux_weight={weight}",
            f"batch.layout={layout}", "train.steps=2", "optim.lr=1e-3", f"run.dir={name}")  # fmt: skip
        told = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        lines[name] = next(line["metrics"] for line in told if line["split"] == "train")
    aux = lines["padded"]["aux_loss"]
    assert aux > K / EXPERTS
    assert "aux_loss" not in lines["none"]
    assert lines["padded"]["loss"] == pytest.approx(lines["none"]["loss"] + 0.1 * aux, rel=1e-5)
    for key in ("loss", "aux_loss", "grad_norm", "expert_load_max", "expert_load_min"):
        assert lines["shared"][key] == pytest.approx(lines["padded"][key], rel=1e-4), key


def test_a_run_logs_the_load_and_does_not_depend_on_the_split(run: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    from posttrain.models import embedded

    families.network("deepseek_v3").save_pretrained("m")
    AutoTokenizer.from_pretrained(embedded.DIRECTORY).save_pretrained("m")
    lines = {}
    for name, split in {"8x1": ["batch.micro_size=1"], "1x8": [], "packed": ["batch.layout=packed"]}.items():
        run("model.path=m", "stage.aux_weight=0.1", "train.steps=3", "optim.lr=1e-3", f"run.dir={name}", *split)
        told = [json.loads(line) for line in (Path(name) / "metrics.jsonl").read_text().splitlines()]
        lines[name] = [line["metrics"] for line in told if line["split"] == "train"]
    for name in ("8x1", "packed"):
        for ours, other in zip(lines["1x8"], lines[name], strict=True):
            loads = [key for key in ours if key.startswith("expert_load")]
            assert loads
            for key in ("loss", "nll", "aux_loss", "grad_norm", *loads):
                assert other[key] == pytest.approx(ours[key], rel=1e-4), (name, key)
    first = lines["1x8"][0]
    assert first["loss"] == pytest.approx(first["nll"] + 0.1 * first["aux_loss"], rel=1e-5)
    loads = [value for key, value in first.items() if key.startswith("expert_load")]
    assert min(loads) < K / EXPERTS < max(loads) <= 1
