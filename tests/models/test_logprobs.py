"""The chunked output layer against the whole logits and plain autograd."""

import pytest
import torch
from torch import nn

from posttrain.models import logprobs
from posttrain.models import token_logprobs as token_logprobs_module
from posttrain.models.logprobs import LogitTransform, weighted_nll
from posttrain.models.token_logprobs import token_logprobs
from posttrain.models.token_statistics import token_statistics

N, H, V = 37, 8, 50
TRANSFORMS = [LogitTransform(), LogitTransform(scale=0.0625), LogitTransform(softcap=3.0), LogitTransform(2.0, 5.0)]


@pytest.fixture(autouse=True)
def _many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """16 tokens a chunk, so that 37 tokens take three, the last one partial."""
    monkeypatch.setattr(logprobs, "CHUNK_BYTES", {"cpu": 16 * 4 * V})


def given(bias: bool = True) -> tuple[torch.Tensor, nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    head = nn.Linear(H, V, bias=bias)
    return torch.randn(N, H, requires_grad=True), head, torch.randint(V, (N,)), torch.rand(N)


def whole_logits(hidden: torch.Tensor, head: nn.Linear, transform: LogitTransform) -> torch.Tensor:
    z = head(hidden) * transform.scale
    return z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)


def grads(objective: torch.Tensor, hidden: torch.Tensor, head: nn.Linear) -> list[torch.Tensor]:
    return list(torch.autograd.grad(objective, [hidden, *head.parameters()]))


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_weighted_nll_and_its_gradients_equal_cross_entropy(
    transform: LogitTransform, smoothing: float, bias: bool
) -> None:
    hidden, head, targets, weights = given(bias)
    ours, logprob = weighted_nll(hidden, head, targets, weights, transform, smoothing)
    logits = whole_logits(hidden, head, transform)
    per_token = nn.functional.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    expected = (weights * per_token).sum()
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(logprob, -nn.functional.cross_entropy(logits, targets, reduction="none"))
    for a, b in zip(grads(3 * ours, hidden, head), grads(3 * expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_head_that_is_no_plain_linear_goes_through_autograd(transform: LogitTransform) -> None:
    class Wrapped(nn.Linear):
        pass

    hidden, head, targets, weights = given()
    wrapped = Wrapped(H, V)
    wrapped.load_state_dict(head.state_dict())
    ours, _ = weighted_nll(hidden, wrapped, targets, weights, transform, 0.1)
    expected, _ = weighted_nll(hidden, head, targets, weights, transform, 0.1)
    torch.testing.assert_close(ours, expected)
    for a, b in zip(grads(ours, hidden, wrapped), grads(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logprobs_are_differentiable_in_any_function_of_them(transform: LogitTransform) -> None:
    hidden, head, targets, _ = given()
    ours = torch.nn.functional.logsigmoid(token_logprobs(hidden, head, targets, transform)).sum()
    logits = whole_logits(hidden, head, transform)
    expected = nn.functional.logsigmoid(logits.log_softmax(-1).gather(-1, targets[:, None])).sum()
    torch.testing.assert_close(ours, expected)
    for a, b in zip(grads(ours, hidden, head), grads(expected, hidden, head), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("keeps", [10**9, 0])
def test_token_logprobs_among_the_tokens_that_could_be_drawn(
    transform: LogitTransform, plain: bool, keeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if the others' logits were -inf; whether probabilities wait for backward or are formed anew there."""
    monkeypatch.setattr(token_logprobs_module, "KEEP_BYTES", keeps)
    hidden, head, targets, weights = given()
    if not plain:
        head = type("Wrapped", (nn.Linear,), {})(H, V)
    allowed = torch.rand(N, V) < 0.2
    allowed[torch.arange(N), targets] = True
    ours = token_logprobs(hidden, head, targets, transform, allowed.nonzero().T)
    logits = whole_logits(hidden, head, transform).masked_fill(~allowed, -torch.inf)
    expected = logits.log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    torch.testing.assert_close(ours, expected)
    both = [grads((weights * found.sin()).sum(), hidden, head) for found in (ours, expected)]
    for a, b in zip(*both, strict=True):
        torch.testing.assert_close(a, b)


def test_statistics_equal_those_of_the_whole_distribution() -> None:
    hidden, head, targets, _ = given()
    targets[0] = head(hidden)[0].argmax()
    found = token_statistics(hidden, head, targets, entropy=True)
    distribution = torch.distributions.Categorical(logits=head(hidden).detach())
    torch.testing.assert_close(found.logprob, distribution.log_prob(targets))
    torch.testing.assert_close(found.entropy, distribution.entropy())
    torch.testing.assert_close(found.confidence, distribution.probs.max(-1).values)
    assert found.top1_hit is not None
    assert found.top1_hit.tolist() == (distribution.probs.argmax(-1) == targets).tolist()
    assert bool(found.top1_hit[0])


def test_no_tensor_holds_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made, in forward and backward, is a chunk or the head's own gradient."""
    hidden, head, targets, weights = given()
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, tuple | list) else [result]:
                if isinstance(tensor, torch.Tensor):
                    sizes.append(tuple(tensor.shape))
            return result

    with Watch():
        objective, _ = weighted_nll(hidden, head, targets, weights)
        objective.backward()
        token_statistics(hidden.detach(), head, targets)
    assert (16, V) in sizes
    assert (N, V) not in sizes


def test_bf16_autocast_stays_near_fp32_and_reports_fp32() -> None:
    hidden, head, targets, weights = given()
    exact, _ = weighted_nll(hidden, head, targets, weights)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, logprob = weighted_nll(hidden, head, targets, weights)
    assert rounded.dtype == logprob.dtype == torch.float32
    assert rounded.item() != exact.item()
    torch.testing.assert_close(rounded, exact, rtol=0.01, atol=0.01)
    (grad,) = torch.autograd.grad(rounded, hidden)
    assert grad.dtype == torch.float32
