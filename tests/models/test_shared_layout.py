"""All layouts give the same numbers: K responses behind one prompt, side by side, in one row or in rows of their own."""

from collections.abc import Iterator

import pytest
import torch
from families import FAMILIES, network

from posttrain.data.batches import collate
from posttrain.data.tokens import TokenGroup
from posttrain.errors import ModelError
from posttrain.models import shared_attention
from posttrain.models.decoder import attention_of
from posttrain.models.policy import Policy
from posttrain.models.probe import check_forward
from posttrain.models.reward import RewardModel
from posttrain.models.shared_attention import shared_mask


@pytest.fixture(autouse=True)
def _calls_in_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """The prompts of these tests are shorter than what is worth a second call."""
    monkeypatch.setattr(shared_attention, "SHORTEST", 1)


def groups(seed: int = 0, counts: tuple[int, ...] = (3, 1, 2)) -> list[TokenGroup]:
    """Prompts of 2 to 5 tokens with responses of 1 to 4, one of them with a turn that is no target."""
    torch.manual_seed(seed)
    made = []
    for i, k in enumerate(counts):
        responses = [torch.randint(5, 90, (int(torch.randint(1, 5, ())),)).tolist() for _ in range(k)]
        masks = [[True] * len(r) for r in responses]
        if len(masks[-1]) > 2:
            masks[-1][1] = False
        prompt = torch.randint(5, 90, (2 + i,)).tolist()
        rewards = [float(j) for j in range(k)]
        made.append(TokenGroup(str(i), str(i), prompt, responses, masks, [1] * k, [1] * k, "{}", rewards))
    return made


def batches(made: list[TokenGroup]):
    """The same Groups in every layout; responses keep their order."""
    yield collate(made, [[i] for i in range(len(made))], "padded")
    yield collate(made, [[i] for i in range(len(made))], "padded", extra_padding=5)
    yield collate(made, [list(range(len(made)))], "packed")
    yield collate(made, [[i] for i in range(len(made))], "shared")
    yield collate(made, [[0, 1], [2]], "shared")


def test_the_mask_is_the_one_drawn_by_hand() -> None:
    """Prompt ab, responses cd and e, then a padding column: who sees whom, row by row."""
    group = TokenGroup("g", "g", [1, 2], [[3, 4], [5]], [[True] * 2, [True]], [1, 1], [1, 1], "{}")
    batch = collate([group], [[0]], "shared", extra_padding=1)
    expected = ["a.....", "ab....", "abc...", "abcd..", "ab..e.", ".....-"]
    drawn = [[character != "." for character in line] for line in expected]
    assert shared_mask(batch, "sdpa")[0, 0].tolist() == drawn
    added = shared_mask(batch, "eager")[0, 0]
    assert (added == 0).tolist() == drawn
    assert added.dtype == torch.float32
    assert batch.position_ids[0, :5].tolist() == [0, 1, 2, 3, 2]  # e stands where c does
    assert batch.predict.tolist() == [1, 2, 1]  # c and e from b, d from c
    assert batch.at.tolist() == [2, 3, 4]
    assert batch.last.tolist() == [3, 4]
    assert batch.tokens == 5


def test_what_all_rows_begin_with_is_called_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two calls a layer where prompts are long enough, else one; of rows that hold several prompts the first ones count."""
    made, calls = groups(), list[tuple[int, int, bool]]()
    library = shared_attention.sdpa_attention_forward

    def watched(module, query, key, value, mask, **kwargs):
        calls.append((query.shape[2], key.shape[2], mask is None))
        return library(module, query, key, value, mask, **kwargs)

    monkeypatch.setattr(shared_attention, "sdpa_attention_forward", watched)
    policy = Policy(network("llama"))
    for rows, prefix in (([[0], [1], [2]], 2), ([[1, 0], [2]], 3)):
        batch = collate(made, rows, "shared")
        width = batch.input_ids.shape[1]
        calls.clear()
        policy(batch)
        assert calls == [(prefix, prefix, True), (width - prefix, width, False)] * 2
        monkeypatch.setattr(shared_attention, "SHORTEST", prefix + 1)
        calls.clear()
        policy(batch)
        assert calls == [(width, width, False)] * 2
        monkeypatch.setattr(shared_attention, "SHORTEST", 1)


@pytest.mark.parametrize("shortest", [1, 64])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_log_probs_and_gradients_agree(
    family: str, attention: str, shortest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared_attention, "SHORTEST", shortest)
    made = groups()
    policy = Policy(network(family, attention))
    wanted = None
    for batch in batches(made):
        policy.zero_grad()
        logprobs = policy(batch).logprobs
        torch.nn.functional.logsigmoid(batch.by_response(logprobs)).sum().backward()
        found = (logprobs.detach(), {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None})
        wanted = wanted or found
        torch.testing.assert_close(found[0], wanted[0], rtol=0, atol=1e-4)
        for name, grad in found[1].items():
            torch.testing.assert_close(grad, wanted[1][name], rtol=1e-4, atol=1e-5)


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """The library compiles flex attention; its plain form gives the same numbers without a compiler."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def test_the_block_mask_is_the_other_masks() -> None:
    made = groups()
    for batch in (collate(made, [[i] for i in range(len(made))], "shared"), collate(made, [[0, 1], [2]], "shared")):
        expected = shared_mask(batch, "sdpa")[:, 0]
        visible = shared_mask(batch, "flex_attention").mask_mod
        row, query, key = torch.meshgrid(*(torch.arange(n) for n in expected.shape), indexing="ij")
        found = visible(row, torch.tensor(0), query, key)
        assert torch.equal(found & (batch.segments >= 0)[:, :, None], expected & (batch.segments >= 0)[:, :, None])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile", "ignore:_compile flag")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_flex_attention_gives_the_log_probs_of_sdpa(uncompiled: None, family: str) -> None:
    made = groups()
    sdpa, flex = Policy(network(family, "sdpa")), Policy(network(family, "flex_attention"))
    assert attention_of(flex.network) == "flex_attention"
    with torch.no_grad():
        wanted = sdpa(next(batches(made))).logprobs
        for batch in batches(made):
            torch.testing.assert_close(flex(batch).logprobs, wanted, rtol=0, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")
def test_flex_attention_gives_the_log_probs_and_gradients_of_sdpa_on_a_gpu() -> None:
    """Compiled, and with its backward pass, which there is on a GPU alone."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    made, found = groups(), {}
    for attention in ("sdpa", "flex_attention"):
        policy = Policy(network("llama", attention, head_dim=16)).cuda()
        logprobs = policy(collate(made, [[0, 1], [2]], "shared").to("cuda")).logprobs
        logprobs.sum().backward()
        found[attention] = (logprobs.detach(), policy.backbone.layers[0].self_attn.q_proj.weight.grad)
    for ours, expected in zip(found["flex_attention"], found["sdpa"], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean", "special"])
def test_scores_agree(pooling: str) -> None:
    made = groups()
    for group in made:
        for response, mask in zip(group.responses, group.masks, strict=True):
            response.append(7)
            mask.append(True)
    scorer = network("llama", scores=True)
    model = RewardModel(scorer, pooling, {7})
    found = [model(batch).rewards for batch in batches(made)]
    for scores in found[1:]:
        torch.testing.assert_close(scores, found[0], rtol=0, atol=1e-4)
    alone = scorer.model(input_ids=torch.tensor([made[0].prompt + made[0].responses[1]])).last_hidden_state[0]
    if pooling == "mean":
        at = [len(made[0].prompt) + i for i, target in enumerate(made[0].masks[1]) if target]
        expected = scorer.score(alone[at].mean(0))
    else:
        expected = scorer.score(alone[-1])
    torch.testing.assert_close(found[0][1], expected[0], rtol=0, atol=1e-4)


def test_a_response_never_sees_another() -> None:
    """Changing one response's tokens changes no other response's log-probs, to the bit."""
    made = groups()
    policy = Policy(network("llama"))
    before = collate(made, [[i] for i in range(len(made))], "shared")
    made[0].responses[0] = [(token + 1) % 90 for token in made[0].responses[0]]
    after = collate(made, [[i] for i in range(len(made))], "shared")
    kept = before.response != 0
    with torch.no_grad():
        assert torch.equal(policy(before).logprobs[kept], policy(after).logprobs[kept])


@pytest.mark.filterwarnings("ignore:.*mamba.*", "ignore:.*fast path.*")
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_shares_rows_or_is_refused_by_name(family: str) -> None:
    """Whichever it is, what is let through agrees with the responses alone; state-space models and ALiBi cannot."""
    model = Policy(network(family))
    found: dict[str, float] = {}
    refusal = ""
    try:
        found = check_forward(model, groups(), "shared", torch.device("cpu"))
    except ModelError as error:
        refusal = str(error)
    if refusal:
        assert "batch.layout=shared" in refusal
        assert model.network.config.model_type in refusal
        assert family not in CAN
    else:
        assert max(found.values()) < 1e-4
        assert family not in CANNOT


CAN = {"llama", "qwen3", "gpt2", "gpt_neox", "phi", "gemma", "mixtral", "deepseek_v3", "cohere", "granite"}
CANNOT = {
    "bloom",
    "mpt",
    "falcon-alibi",
    "mamba",
    "mamba2",
    "rwkv",
    "xlstm",
    "qwen3_next",
    "jamba",
    "recurrent_gemma",
}


def test_a_window_shorter_than_the_row_is_refused() -> None:
    responses = [[30, 31], [32]]
    long = TokenGroup("l", "l", list(range(5, 25)), responses, [[True] * 2, [True]], [1, 1], [1, 1], "{}")
    cpu = torch.device("cpu")
    scorer = RewardModel(network("mistral", scores=True, sliding_window=8))
    torch.nn.init.zeros_(scorer.head.weight)  # as a run begins: its scores would agree whatever it sees
    with pytest.raises(ModelError, match="mistral"):
        check_forward(scorer, [*groups(), long], "shared", cpu)
    with pytest.raises(ModelError, match="mistral"):
        check_forward(Policy(network("mistral", sliding_window=8)), [*groups(), long], "shared", cpu)
    assert (
        check_forward(Policy(network("mistral", sliding_window=64)), [*groups(), long], "shared", cpu)["shared"] < 1e-4
    )
