"""The preference stages against numbers worked out elsewhere: methods' vectors, a bandit solved exactly, hand sums."""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import long_but

from posttrain.data import embedded
from posttrain.data.batches import collate
from posttrain.data.group import Group
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ConfigError, DataError
from posttrain.stages.base import Asked
from posttrain.stages.dpo import DPO, dpo_loss
from posttrain.stages.gpro import GPRO, dual_loss, normalize, weighted_loss, weights
from posttrain.stages.preferences import extremes, matrix, pair_records, pairs_in
from posttrain.stages.reward import Reward, listwise_loss, pairwise_loss, plackett_luce_loss, spearman
from posttrain.stats import summarise

PI_REF, REWARDS, BETA = [0.5, 0.3, 0.2], [0.0, 0.5, 1.0], 0.5
TILT = [0.1790, 0.2919, 0.5291]


def group(name: str, **judged) -> TokenGroup:
    """K responses of k+1 tokens each, K from what is judged."""
    k = len(next(v for v in judged.values() if isinstance(v, list)))
    responses = [[10 + i] * (i + 1) for i in range(k)]
    return TokenGroup(
        name, name, [1, 2], responses, [[True] * len(r) for r in responses], [1] * k, [1] * k,
        '{"prompt": "p"}', **judged,
    )  # fmt: skip


def batch_of(*groups: TokenGroup):
    return collate(list(groups), [[i] for i in range(len(groups))], "padded")


@pytest.mark.parametrize(
    ("link", "epsilon", "expected"),
    [("logistic", 0, 0.598139), ("hinge", 0, 0.8), ("robust", 0.1, 0.573139), ("conservative", 0.1, 0.618139),
     ("squared", 0, 9.0)],
)  # fmt: skip
def test_dpo_links_at_the_vector(link: str, epsilon: float, expected: float) -> None:
    """log π = -10/-12, log ref = -11/-11, β = .1: h = .2. IPO: (2 - 5)² = 9."""
    pair = [torch.tensor([value]).double() for value in (-10.0, -12.0, -11.0, -11.0)]
    assert dpo_loss(*pair, 0.1, link, epsilon).item() == pytest.approx(expected, abs=1e-6)


def test_dpo_at_the_reference_is_log_two() -> None:
    zero = torch.zeros(3)
    assert dpo_loss(zero, zero, zero, zero).tolist() == pytest.approx([math.log(2)] * 3)


def test_dpo_loss_does_not_overflow() -> None:
    far = dpo_loss(*(torch.tensor([v]) for v in (-9000.0, 0.0, 0.0, 0.0)), 1.0)
    assert far.item() == pytest.approx(9000.0)


def test_simpo_and_orpo_by_hand() -> None:
    """Chosen: 2 tokens of -1 each; rejected: 1 token of -2. SimPO, β 2, γ .5: h = 2(-1 + 2) - .5 = 1.5.
    ORPO: odds of e^-1 are .367879/.632121 = .581977, of e^-2 .135335/.864665 = .156518; log of their ratio 1.313262."""
    batch = batch_of(group("a", rewards=[0.0, 1.0]))  # the second response, of 2 tokens, is the better
    logprobs = torch.tensor([-2.0, -1.0, -1.0])
    pairs = pairs_in(batch)
    simpo = DPO(beta=2.0, reference_free=True, length_normalized=True, target_margin=0.5)
    assert simpo.margins(logprobs, pairs, batch).tolist() == pytest.approx([1.5])
    orpo = DPO(link="odds_ratio", nll_weight=1.0)
    assert orpo.margins(logprobs, pairs, batch).tolist() == pytest.approx([1.313262], abs=1e-6)


def test_soft_labels_weigh_both_directions() -> None:
    """p = .8, h = .2 (β = 1, reference 0): .8·.598139 + .2·.798139 = .638139."""
    batch = batch_of(group("a", rewards=[0.8, 0.2], target_probs=[0.8, 0.2]))
    batch.reference = torch.zeros(3)
    logprobs = torch.tensor([-1.0, -0.6, -0.6]).double()

    class Networks:
        @staticmethod
        def policy(_, router: bool):
            return type("S", (), {"logprobs": logprobs, "router": None})

    loss = DPO(beta=1.0).loss(Networks, batch)
    assert loss.terms["preference"].item() == pytest.approx(0.638139, abs=1e-6)


def test_pairs_of_groups() -> None:
    batch = batch_of(
        group("three", rewards=[1.0, 0.0, 1.0]),  # 0 > 1, 2 > 1
        group("tie with a label", rewards=[0.5, 0.5], target_probs=[0.5, 0.5]),  # the pair, p = 1/2
        group("plain tie", rewards=[1.0, 1.0]),  # none
        group("ranks", ranks=[2.0, 1.0]),  # 8 > 7
    )
    pairs = pairs_in(batch)
    found = set(zip(pairs.first.tolist(), pairs.second.tolist(), pairs.p.tolist(), strict=True))
    assert found == {(0, 1, 1.0), (2, 1, 1.0), (3, 4, 0.5), (8, 7, 1.0)}
    best, worst = extremes(batch)
    assert best.tolist() == [0, 3, 5, 8]
    assert worst.tolist() == [1, 3, 5, 7]


def test_pair_records_give_the_vector() -> None:
    """Margins [2, .5, -.3, 1.2, 0, -1.5, 3, .8, .1, -.2]: accuracy .65, nll .597543, folded ece .231409 (5 bins)."""
    margins = torch.tensor([2, 0.5, -0.3, 1.2, 0, -1.5, 3, 0.8, 0.1, -0.2]).double()
    batch = batch_of(*(group(str(i), rewards=[1.0, 0.0]) for i in range(10)))
    records = pair_records(margins, pairs_in(batch), batch, Asked(5))
    found = summarise(records, batch.ids, bins=5, resamples=200)
    assert found["pair_accuracy"].value == pytest.approx(0.65)
    assert found["nll"].value == pytest.approx(0.597543, abs=1e-6)
    assert found["ece"].value == pytest.approx(0.231409, abs=1e-6)
    assert found["margin"].value == pytest.approx(float(margins.mean()))
    assert found["brier"].value == pytest.approx(float(((1 - margins.sigmoid()) ** 2).mean()))
    assert "perplexity" not in found
    assert found["temperature"].value > 0


def test_all_tied_pairs_have_no_temperature() -> None:
    batch = batch_of(*(group(str(i), rewards=[1.0, 0.0]) for i in range(4)))
    found = summarise(pair_records(torch.zeros(4), pairs_in(batch), batch, Asked(5)), batch.ids, bins=5, resamples=200)
    assert found["pair_accuracy"].value == 0.5
    assert found["temperature"].value is None


def test_reward_losses_at_their_vectors() -> None:
    zero, h = torch.zeros(1), torch.tensor([0.3]).double()
    assert pairwise_loss(zero, "bradley_terry").item() == pytest.approx(math.log(2))
    assert pairwise_loss(h, "bradley_terry", 0.1).item() == pytest.approx(math.log(1 + math.exp(-0.2)))
    assert pairwise_loss(h, "hinge", 1.0).item() == pytest.approx(0.7)
    assert pairwise_loss(h, "mse", 1.0).item() == pytest.approx(0.49)
    scores = torch.tensor([[2.0, 1.0, 0.0]])
    assert plackett_luce_loss(scores).item() == pytest.approx(0.72087, abs=1e-5)
    for k in (2, 3, 5):
        assert plackett_luce_loss(torch.ones(1, k)).item() == pytest.approx(math.log(math.factorial(k)))
    padded = torch.tensor([[2.0, 1.0, 0.0, -math.inf]])
    assert plackett_luce_loss(padded).item() == pytest.approx(0.72087, abs=1e-5)
    assert listwise_loss(scores, torch.tensor([[1.0, 0, 0]])).item() == pytest.approx(0.407606, abs=1e-6)
    assert listwise_loss(scores, torch.tensor([[0.5, 0.5, 0]])).item() == pytest.approx(0.907606, abs=1e-6)


def test_reward_averages_pairs_within_a_prompt_and_then_prompts() -> None:
    """R = [1, 0, 0] judged 2 > 1 > 0: losses of 1-0, 1-0, 0-0: (.313262·2 + .693147)/3; and a pair of R = [0, 0]."""
    batch = batch_of(group("three", rewards=[2.0, 1.0, 0.0]), group("two", rewards=[1.0, 0.0]))
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0]).double()
    found = Reward().objective_of(rewards, pairs_in(batch), batch)
    assert found.tolist() == pytest.approx([0.439890, 0.693147], abs=1e-6)
    assert Reward().units(batch) == {"bradley_terry": 2.0}


def test_the_margin_column_wins_over_the_setting() -> None:
    batch = batch_of(group("a", rewards=[1.0, 0.0], margin=0.2), group("b", rewards=[1.0, 0.0]))
    found = Reward(objective="mse", margin=1.0).objective_of(torch.zeros(4).double(), pairs_in(batch), batch)
    assert found.tolist() == pytest.approx([0.04, 1.0])


def test_spearman_against_scipy() -> None:
    from scipy.stats import spearmanr

    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.integers(0, 4, 6).astype(float), rng.integers(0, 3, 6).astype(float)
        if a.std() and b.std():
            assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)


def solve(loss_of, steps: int = 4000, lr: float = 0.05) -> list[float]:
    """Minimise a function of the logits of a three-action policy exactly (no sampling)."""
    logits = torch.tensor(PI_REF).double().log().requires_grad_(True)
    optimizer = torch.optim.Adam([logits], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(logits.log_softmax(0)).backward()
        optimizer.step()
    return logits.softmax(0).tolist()


@pytest.mark.long
def test_the_bandit_reaches_the_tilt_under_dual() -> None:
    ref, r = torch.tensor(PI_REF).double(), torch.tensor(REWARDS).double()
    u = (r / BETA).exp() / (ref * (r / BETA).exp()).sum()

    def loss(logp):
        """Actions enumerated: (1/K) Σ_i becomes Σ_a π_ref(a), ω_a becomes π_ref(a)·u_a."""
        one = torch.full((1, 1), 0.0).double()
        conjugate = torch.stack(
            [
                dual_loss((logp - ref.log())[a].view(1, 1), one, BETA, "tilt", 5.0, None, u[a].view(1, 1))[0]
                for a in range(3)
            ]
        )
        return (ref * conjugate).sum()

    assert solve(loss) == pytest.approx(TILT, abs=1e-3)


@pytest.mark.parametrize(
    ("k", "expected"),
    [(2, [0.3545, 0.3416, 0.3039]), (4, [0.2616, 0.3379, 0.4006]), (8, [0.2160, 0.3194, 0.4646])],
)
def test_weighted_in_expectation(k: int, expected: list[float]) -> None:
    """The expectation over every draw of k actions from π_ref of -β Σ ω_i log π."""
    draws = list(itertools.combinations_with_replacement(range(3), k))
    counts = [[draw.count(a) for a in range(3)] for draw in draws]
    ways = [math.factorial(k) / math.prod(map(math.factorial, count)) for count in counts]
    odds = [math.prod(p**c for p, c in zip(PI_REF, count, strict=True)) for count in counts]
    chance = torch.tensor([way * odd for way, odd in zip(ways, odds, strict=True)])
    index = torch.tensor(draws)
    rewards = torch.tensor(REWARDS).double()[index]

    def loss(logp):
        return (chance * weighted_loss(logp[index], rewards, BETA)).sum()

    assert solve(loss) == pytest.approx(expected, abs=1e-3)


def test_dual_with_rewards_is_stationary_at_e_to_the_z_equal_r() -> None:
    rewards = torch.tensor([[0.5, 2.0]]).double()
    z = rewards.log().requires_grad_(True)
    dual_loss(z, rewards, 0.3, "reward").sum().backward()
    assert z.grad.abs().max().item() < 1e-12


def test_beyond_z_max_the_exponential_goes_on_linearly() -> None:
    """e^5(1 + 2) at z = 7, and its slope stays e^5: finite, and never 0."""
    z = torch.tensor([[7.0]]).double().requires_grad_(True)
    loss = dual_loss(z, torch.zeros(1, 1).double(), 1.0, "reward", 5.0)
    assert loss.item() == pytest.approx(math.exp(5) * 3 - 1)
    (slope,) = torch.autograd.grad(loss.sum(), z)
    assert slope.item() == pytest.approx(math.exp(5))
    assert torch.isfinite(dual_loss(torch.tensor([[900.0]]), torch.zeros(1, 1), 1.0, "reward")).all()


def test_importance_weights_enter_omega() -> None:
    """ρ = [2, 1], equal rewards: ω = [2/3, 1/3]."""
    omega = weights(torch.zeros(1, 2), 0.5, torch.tensor([[math.log(2), 0.0]]))
    assert omega[0].tolist() == pytest.approx([2 / 3, 1 / 3])
    masked = weights(torch.tensor([[0.0, -math.inf]]), 0.5)
    assert masked[0].tolist() == [1.0, 0.0]


def test_normalised_rewards() -> None:
    """[0, 2] and a third place that is empty: mean 1, unbiased deviation √2."""
    given = torch.tensor([[0.0, 2.0, -math.inf], [3.0, 3.0, 3.0]]).double()
    assert normalize(given, "center")[0].tolist() == [-1.0, 1.0, -math.inf]
    assert normalize(given, "standardize")[0].tolist() == pytest.approx([-(0.5**0.5), 0.5**0.5, -math.inf])
    assert normalize(given, "standardize")[1].tolist() == [0.0, 0.0, 0.0]


def test_pairwise_gpro_is_dpo() -> None:
    batch = batch_of(group("a", rewards=[1.0, 0.0]), group("b", rewards=[0.0, 1.0]))
    z, pairs = torch.randn(4).double(), pairs_in(batch)
    ours = GPRO(form="pairwise", beta=0.3).pair_losses(z, pairs)
    zero = torch.zeros(2).double()
    theirs = dpo_loss(z[pairs.first], z[pairs.second], zero, zero, 0.3)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_expected_reward_starts_at_the_mean() -> None:
    batch = batch_of(group("a", rewards=[1.0, 0.0, 0.5, 0.5]), group("b", rewards=[1.0, 3.0]))
    assert GPRO().expected_reward(torch.zeros(6).double(), batch).tolist() == pytest.approx([0.5, 2.0])
    assert matrix(batch.rewards, batch, -1.0).tolist() == [[1.0, 0.0, 0.5, 0.5], [1.0, 3.0, -1.0, -1.0]]


def groups_of(*rewards: tuple[float, ...]) -> list[Group]:
    return [
        Group(f"p{i}", tuple("abcd"[: len(r)]), rewards=r, file="f.jsonl", row=i + 1) for i, r in enumerate(rewards)
    ]


def test_groups_without_a_signal_are_skipped_and_counted() -> None:
    notes: Counter[str] = Counter()
    kept = list(GPRO().groups(groups_of((1.0, 0.0), (1.0, 1.0), (0.0,)), notes))
    assert [g.prompt for g in kept] == ["p0"]
    assert any("skipped" in note and count == 2 for note, count in notes.items())
    assert any("one response" in note for note in notes)


@pytest.mark.parametrize("stage", ["gpro", "dpo", "reward"])
def test_nothing_to_learn_is_an_error_that_says_so(run, stage: str) -> None:
    rows = [{"prompt": f"{i}+1=", "responses": ["1", "2"], "rewards": [1, 1]} for i in range(9)]
    Path("ties.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"data.train \(ties.jsonl\): nothing to learn") as error:
        run(f"stage={stage}", "data.train=ties.jsonl", "data.eval=embedded:groups:20:held_out")
    if stage == "gpro":
        assert "target=reward" in str(error.value)
        assert "dpo" in str(error.value)
    run(
        f"stage={stage}",
        "data.train=[ties.jsonl,embedded:groups:40]",
        "data.eval=embedded:groups:20:held_out",
        "run.dir=r",
    )


def test_settings_that_decide_the_groups_decide_the_cache(run) -> None:
    groups = ["stage=dpo", "data.train=embedded:groups:60", "data.eval=embedded:groups:20:held_out", "data.cache=c"]
    every = run(*groups, "run.dir=a")
    fewer = run(*groups, "stage.pairs=best_worst", "run.dir=b")
    assert fewer.trained_tokens < 0.7 * every.trained_tokens


@pytest.mark.parametrize("form", ["weighted", "dual", "dual stage.target=reward", "pairwise"])
def test_gpro_is_judged_by_the_loss_it_trains(run, form: str) -> None:
    """On the very rows of a step that moves nothing, evaluation reads what the step's loss is."""
    rows = embedded.rows("groups", 8)
    rows[0]["responses"], rows[0]["rewards"] = rows[0]["responses"][:3], [0.0, 1.0, 0.5]
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    moved = ["stage=gpro", *f"stage.form={form}".split(), "stage.beta=0.5", "data.train=g.jsonl", "data.eval=g.jsonl"]
    run("optim.lr=1e-3", "run.dir=other")  # a reference that is not the start: z is not 0
    summary = run(*moved, "model.reference=other", "optim.lr=1e-12", "train.steps=1", "run.dir=r")
    told = [json.loads(line) for line in Path("r", "metrics.jsonl").read_text().splitlines()]
    logged = next(line["metrics"] for line in told if line["split"] == "train")
    assert logged["loss"] == pytest.approx(summary.start["objective"]["value"], rel=1e-4)


def test_responses_judged_one_by_one_are_learnt_from_without_pairs(run) -> None:
    """KTO's rows: no prompt has two responses, so there is no accuracy of pairs, and no calibration of one."""
    rows = [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(embedded.rows("pairs", 40))
    ]
    Path("kto.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.train=kto.jsonl", "data.eval=kto.jsonl"]
    found = run("stage=gpro", "stage.form=dual", "stage.target=reward", *data, "run.dir=r")
    assert "pair_accuracy" not in found.metrics
    assert "ece" not in found.metrics
    assert found.metrics["objective"]["value"] < found.start["objective"]["value"]


def test_what_the_sampler_is_known_for_is_all_or_none(run) -> None:
    rows = [{"prompt": f"{i}+1=", "responses": ["1", "2"], "rewards": [1, 0]} for i in range(9)]
    rows[3]["sampler_logprobs"] = [-1.0, -2.0]
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="in every row or in none"):
        run("stage=gpro", "data.train=g.jsonl", "data.eval=embedded:groups:20:held_out")


def test_rewards_read_one_by_one_need_no_negatives_whatever_was_cached(run) -> None:
    rows = [{"prompt": f"{i}+1=", "responses": ["1", "2"], "rewards": [1, -1]} for i in range(9)]
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["stage=gpro", "data.train=g.jsonl", "data.eval=embedded:groups:20:held_out", "data.cache=c"]
    run(*data, "run.dir=a")
    with pytest.raises(DataError, match="needs rewards >= 0"):
        run(*data, "stage.form=dual", "stage.target=reward", "run.dir=b")


def test_reward_of_groups_of_unlike_sizes(run) -> None:
    """Scores that only prompts with more than two responses have are of those, in whichever batch they are."""
    rows = embedded.rows("groups", 40, held_out=True)
    for row in rows[::2]:
        right = row["rewards"].index(1.0)
        row["responses"], row["rewards"] = [row["responses"][right], row["responses"][right - 1]], [1.0, 0.0]
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for layout in ("padded", "shared"):
        summary = run("stage=reward", "data.train=embedded:groups:40", "data.eval=g.jsonl", "batch.micro_tokens=64",
                      f"batch.layout={layout}", f"run.dir={layout}")  # fmt: skip
        assert summary.metrics["best_accuracy"]["n"] == 20
        assert summary.metrics["pair_accuracy"]["n"] == 20 * 3 + 20


@pytest.mark.parametrize("objective", ["bradley_terry", "hinge", "mse", "listwise", "plackett_luce"])
@pytest.mark.parametrize("adapter", long_but(("none", "lora", "qlora"), "none"))
def test_every_reward_loss_trains_with_its_defaults_in_bf16(run, objective: str, adapter: str) -> None:
    summary = run("stage=reward", f"stage.objective={objective}", f"adapter={adapter}", "precision=bf16", "optim.lr=1e-2",
                  "data.train=embedded:groups:64", "data.eval=embedded:groups:20:held_out", "train.steps=2")  # fmt: skip
    assert summary.metrics["reward_chosen"]["value"] != 0


def test_tied_responses_have_no_order_under_plackett_luce() -> None:
    """R = [2, 1, 0], the last two tied below the first: only the first is placed, against both. .407606."""
    rewards, standings = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    assert plackett_luce_loss(rewards, standings).item() == pytest.approx(0.407606, abs=1e-6)
    assert plackett_luce_loss(rewards.flip(1), standings.flip(1)).item() == pytest.approx(0.407606, abs=1e-6)


def test_single_responses_to_one_prompt_are_joined() -> None:
    rows = [
        Group("p", ("good",), rewards=(1.0,)),
        Group("q", ("x",), rewards=(1.0,)),
        Group("p", ("bad",), rewards=(0.0,)),
    ]
    kept = list(DPO().groups(rows, Counter()))
    assert [(g.prompt, g.responses) for g in kept] == [("p", ("good", "bad"))]


def test_gpro_refuses_what_it_cannot_read() -> None:
    with pytest.raises(DataError, match="needs rewards >= 0"):
        list(GPRO(form="dual", target="reward").groups(groups_of((-1.0, 0.0)), Counter()))
    ranked = [Group("p", ("a", "b"), ranks=(1, 2), file="f", row=3)]
    with pytest.raises(DataError, match=r"row 3.*rewards"):
        list(GPRO().groups(ranked, Counter()))
    for bad in (DPO(flip_probability=0.1), DPO(link="odds_ratio"), GPRO(target="reward")):
        with pytest.raises(ConfigError):
            bad.check()


def test_conversions_of_groups_to_pairs() -> None:
    given = groups_of((0.0, 1.0, 0.5))
    best_worst = next(iter(DPO(pairs="best_worst").groups(given, Counter())))
    assert best_worst.responses == ("b", "a")
    assert next(iter(DPO().groups(given, Counter()))) is given[0]
    sampled = next(iter(DPO(pairs="sample").groups(given, Counter())))
    assert len(sampled.responses) == 2


def test_pairs_are_sampled_by_the_runs_seed(run) -> None:
    def sampled(seed: int) -> list[tuple[str, ...]]:
        rows = groups_of(*[(0.0, 1.0, 0.5)] * 20)
        return [group.responses for group in DPO(pairs="sample").groups(rows, Counter(), seed)]

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)
    tokens = {
        seed: run("stage=dpo", "stage.pairs=sample", "data.train=embedded:groups:200", "train.steps=1", "batch.size=200",
                  "data.eval=embedded:groups:20:held_out", f"train.seed={seed}", f"run.dir={seed}").trained_tokens
        for seed in (1, 2)
    }  # fmt: skip
    assert tokens[1] != tokens[2]  # every prompt is in the one step; other pairs have other lengths


def test_the_log_tells_of_the_best_and_the_worst_response_as_evaluation_does(run) -> None:
    """Three responses a prompt: with lr so small that nothing moves, what a step logs is what its prompts score."""
    rows = embedded.rows("groups", 8)
    for i, row in enumerate(rows):
        row["rewards"] = [0.0, 0.3, 1.0, 0.6][: len(row["responses"])] if i % 2 else row["rewards"]
    Path("g.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.train=g.jsonl", "data.eval=g.jsonl", "optim.lr=1e-12", "train.steps=1", "batch.size=8"]
    names = {"dpo": ("logprob_chosen", "logprob_rejected"), "reward": ("reward_chosen", "reward_rejected")}
    run("stage=reward", *data, "optim.lr=1e-2", "train.steps=4", "run.dir=scorer")
    for stage, model in (("dpo", "embedded"), ("reward", "scorer")):
        summary = run(f"stage={stage}", *data, f"model.path={model}", f"run.dir={stage}")
        told = [json.loads(line) for line in Path(stage, "metrics.jsonl").read_text().splitlines()]
        logged = next(line["metrics"] for line in told if line["split"] == "train")
        for name in names[stage]:
            assert logged[name] == pytest.approx(summary.start[name]["value"], rel=1e-5), (stage, name)
        assert logged[names[stage][0]] != pytest.approx(logged[names[stage][1]])
