"""Live bytes, counted by hand: a linear layer [100 → 200] of fp32 weights on 50 rows, under bf16 autocast."""

import torch
from torch import nn

from posttrain.planning.allocations import Allocations


def test_autocast_and_backward() -> None:
    layer, rows = nn.Linear(100, 200, bias=False), torch.randn(50, 100, requires_grad=True)
    with Allocations(layer.parameters()) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            states = layer(rows)
        assert seen.live == 2 * (
            5_000 + 20_000 + 10_000
        )  # rows and weights in bf16 are kept for backward, and the output
        assert seen.copies == 2 * 20_000
        assert seen.restart() == seen.live
        states.backward(torch.ones_like(states))
        # the output's gradient; of the weights in bf16, then in fp32 beside it; nothing of the graph is left but the output
        assert seen.live == 4 * (20_000 + 5_000) + 2 * 10_000
        assert seen.copies == 0
        assert seen.peak > seen.live
        del states
        assert seen.live == 4 * (20_000 + 5_000)


def test_views_and_what_was_there() -> None:
    there = torch.zeros(1_000)
    with Allocations([]) as seen:
        view = there[:500].view(20, 25)
        view += 1
        assert seen.live == 0
        made = view.clone()
        transposed = made.T
        assert seen.live == 4 * 500
        del made
        assert seen.live == 4 * 500  # its view holds it
        del transposed
        assert seen.live == 0
        assert seen.peak == 4 * 500
