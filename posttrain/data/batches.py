"""TokenGroups → tensors. A Batch alone knows its layout; a stage sees only trained tokens and the responses they belong to.

padded: one response a row. packed: several share a row; attention and positions restart at each. shared: a prompt stands
once in its row, its K responses side by side behind it, each attending to the prompt and itself, positions going on from
the prompt. Layouts never change what a step holds: its Groups are chosen first, and packing happens within the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.data.packing import Rows
from posttrain.data.tokens import TokenGroup


@dataclass
class Batch:
    """One forward pass.

    input_ids, position_ids: [R, L]. Rows are padded on the right; causal attention never looks there.
    segments: [R, L] the response each position belongs to (a shared prompt's is its first response), -1 at padding.
    is_prompt: [R, L] prompts that several responses read, in the shared layout only.
    predict: [N] flat positions (row·L + column) whose hidden state predicts a target; targets: [N] the ids predicted;
        at: [N] the targets' own flat positions; last: [responses] that of each response's last token.
    response: [N] which response a target belongs to; group: [responses] which Group a response belongs to.
    ids, clusters: the Groups' ids and resampling clusters; bytes, chars: [responses] of the targets' text.
    rewards, standings, target_probs, sampler_logprobs: [responses], margin: [groups]; NaN where the data has none.
        standings: by which a Group's responses order, higher is better.
    reference: [N] the reference's log-probs of the targets (nats), where the run has a reference.
    columns: name → [N] what a stage has worked out of each target beforehand.
    kept: [2, M] target and token id of all tokens that sampling left to draw from, target after target; None if it left all.
    weight: 1, or 0 for a batch that only keeps the ranks in step and counts nothing.
    """

    layout: str
    input_ids: Tensor
    position_ids: Tensor
    segments: Tensor
    is_prompt: Tensor | None
    predict: Tensor
    targets: Tensor
    at: Tensor
    last: Tensor
    response: Tensor
    group: Tensor
    trained_per_response: Tensor
    ids: list[str]
    clusters: list[str]
    bytes: np.ndarray
    chars: np.ndarray
    rewards: Tensor
    standings: Tensor
    target_probs: Tensor
    sampler_logprobs: Tensor
    margin: Tensor
    reference: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    kept: Tensor | None = None
    weight: float = 1.0

    @property
    def groups(self) -> int:
        return len(self.ids) if self.weight else 0

    @property
    def responses(self) -> int:
        return len(self.group) if self.weight else 0

    @property
    def trained_tokens(self) -> int:
        return len(self.targets) if self.weight else 0

    @property
    def tokens(self) -> int:
        """Processed tokens, without padding."""
        return self._tokens if self.weight else 0

    @property
    def sequence_tokens(self) -> int:
        """Tokens of all responses, each with its prompt, whether or not the layout shares it."""
        return len(self.sequences()[0]) if self.weight else 0

    def sequences(self) -> tuple[Tensor, Tensor]:
        """Flat positions [T] of real tokens, and the response [T] in whose sequence each is: a shared prompt is in several."""
        segments = self.segments.flatten()
        if self.is_prompt is None:
            at = (segments >= 0).nonzero().squeeze(1)
            return at, segments[at]
        is_prompt = self.is_prompt.flatten()
        at, prompts = ((segments >= 0) & ~is_prompt).nonzero().squeeze(1), is_prompt.nonzero().squeeze(1)
        of, reader = (self.group[segments[prompts]][:, None] == self.group[None, :]).nonzero(as_tuple=True)
        return torch.cat([at, prompts[of]]), torch.cat([segments[at], reader])

    def __post_init__(self) -> None:
        self._tokens = int((self.segments >= 0).sum())

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        if str(self.input_ids.device) == str(device):
            return self
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        there = lambda v: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v  # noqa: E731
        moved = {k: {n: there(t) for n, t in v.items()} if k == "columns" else there(v) for k, v in moved.items()}
        return Batch(**moved)

    def by_response(self, values: Tensor) -> Tensor:
        """Sum values [N] of trained tokens over each response: [responses]."""
        return values.new_zeros(len(self.group)).index_add(0, self.response, values)

    def by_group(self, values: Tensor) -> Tensor:
        """Sum values [responses] over each Group: [groups]."""
        return values.new_zeros(len(self.ids)).index_add(0, self.group, values)

    def empty(self) -> Batch:
        """The same tensors counting nothing."""
        return replace(self, weight=0.0)


class Placed(NamedTuple):
    """Response k of Group g in a row: the column its prompt begins at, and its own."""

    g: int
    k: int
    prompt_at: int
    at: int


def collate(groups: Sequence[TokenGroup], rows: Rows, layout: str, extra_padding: int = 0) -> Batch:
    """Tensors of one micro-batch. Only tokens after a row's first can be targets."""
    placed = _place(groups, rows, layout)
    width = max(last.at + len(groups[last.g].responses[last.k]) for *_, last in placed) + extra_padding
    shape = (len(placed), width)
    ids, positions = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    segments, is_prompt = np.full(shape, -1, np.int64), np.zeros(shape, bool)
    parts: dict[str, list[Any]] = {name: [] for name in ("predict", "targets", "at", "response", "last", "trained")}
    owner: list[tuple[int, int]] = []
    for r, row in enumerate(placed):
        end = 0
        for g, k, prompt_at, at in row:
            group, number = groups[g], len(owner)
            first, tokens = len(group.prompt), np.array(group.responses[k])
            if not (layout == "shared" and k):
                there = slice(prompt_at, prompt_at + first)
                ids[r, there], positions[r, there], segments[r, there] = group.prompt, np.arange(first), number
                is_prompt[r, there] = True
            end = at + len(tokens)
            ids[r, at:end], segments[r, at:end] = tokens, number
            positions[r, at:end] = first + np.arange(len(tokens))
            chosen = np.flatnonzero(group.masks[k])
            assert first or 0 not in chosen, "a sequence's first token has nothing to be predicted from"
            before = np.where(chosen == 0, prompt_at + first - 1, at + chosen - 1)
            parts["predict"].append(r * width + before)
            parts["targets"].append(tokens[chosen])
            parts["at"].append(r * width + at + chosen)
            parts["response"].append(np.full(len(chosen), number))
            parts["last"].append([r * width + end - 1])
            parts["trained"].append([len(chosen)])
            owner.append((g, k))
        if layout == "padded":
            positions[r, end:] = np.arange(end, width)
    tensors: dict[str, Any] = {
        name: torch.from_numpy(np.concatenate(part).astype(np.int64)) for name, part in parts.items()
    }
    tensors["trained_per_response"] = tensors.pop("trained")
    return Batch(
        layout=layout,
        input_ids=torch.from_numpy(ids),
        position_ids=torch.from_numpy(positions),
        segments=torch.from_numpy(segments),
        is_prompt=torch.from_numpy(is_prompt) if layout == "shared" else None,
        **tensors,
        **_facts(groups, owner),
    )


def _place(groups: Sequence[TokenGroup], rows: Rows, layout: str) -> list[list[Placed]]:
    """The responses of each tensor row, in its order."""
    if layout == "padded":
        return [[Placed(g, k, 0, len(groups[g].prompt))] for row in rows for g in row for k in range(groups[g].count)]
    placed = []
    for row in rows:
        items, column = [], 0
        for g in row:
            prompt_at = column
            for k, response in enumerate(groups[g].responses):
                if k == 0 or layout == "packed":
                    prompt_at, column = column, column + len(groups[g].prompt)
                items.append(Placed(g, k, prompt_at, column))
                column += len(response)
        placed.append(items)
    return placed


def _facts(groups: Sequence[TokenGroup], owner: list[tuple[int, int]]) -> dict[str, Any]:
    """What is known of the Groups in a batch and of their responses; owner: (Group, k) of each response."""
    used = sorted({g for g, _ in owner})
    rank = {g: i for i, g in enumerate(used)}

    def each(name: str) -> Tensor:
        """[responses], NaN where a Group has none."""
        values = [getattr(groups[g], name) for g, _ in owner]
        return torch.tensor([v[k] if v else float("nan") for v, (_, k) in zip(values, owner, strict=True)]).double()

    margins = [groups[g].margin for g in used]
    return {
        "group": torch.tensor([rank[g] for g, _ in owner]),
        "ids": [groups[g].id for g in used],
        "clusters": [groups[g].cluster for g in used],
        "bytes": np.array([groups[g].bytes[k] for g, k in owner], dtype=np.float64),
        "chars": np.array([groups[g].chars[k] for g, k in owner], dtype=np.float64),
        **{name: each(name) for name in ("rewards", "standings", "target_probs", "sampler_logprobs")},
        "margin": torch.tensor([float("nan") if m is None else m for m in margins], dtype=torch.float64),
        "reference": _reference(groups, owner),
        "columns": {
            name: torch.from_numpy(np.concatenate([groups[g].tokens_of(name, k) for g, k in owner]).astype(np.float32))
            for name in groups[owner[0][0]].tokens
        },
        "kept": _kept(groups, owner),
    }


def _kept(groups: Sequence[TokenGroup], owner: list[tuple[int, int]]) -> Tensor | None:
    """See Batch.kept."""
    if groups[owner[0][0]].kept is None:
        return None
    each = [ids for g, k in owner for ids in groups[g].kept_of(k)]
    targets = np.repeat(np.arange(len(each)), [len(ids) for ids in each])
    return torch.from_numpy(np.stack([targets, np.concatenate(each).astype(np.int64)]))


def _reference(groups: Sequence[TokenGroup], owner: list[tuple[int, int]]) -> Tensor | None:
    """[N], the Groups' reference log-probs in the batch's order of targets."""
    if any(groups[g].reference is None for g, _ in owner):
        return None
    return torch.from_numpy(np.concatenate([groups[g].reference_of(k) for g, k in owner]).astype(np.float32))
