"""Token-level groups, and what planning needs of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.data.group import asked


@dataclass(slots=True)
class TokenGroup:
    """A prompt and its K responses as token ids.

    masks: for each response, which of its tokens are targets (a conversation's later user turns are not).
    bytes, chars: for each response, UTF-8 bytes and Unicode characters of the targets' text; special tokens have none.
    cluster: what is resampled together when intervals are formed (windows of one document share theirs).
    text: the text-level Group as JSON, for display and for verifying generated answers.
    rewards, ranks, target_probs, sampler_logprobs, margin: as in the Group; an empty list where it has none.
    reference: [trained_tokens] the reference's log-probs of the targets, response after response, once they are known.
    tokens: name → [trained_tokens] numbers of each target that a stage has worked out beforehand, in the same order.
    kept: for each target the token ids that sampling left to draw from, where it left some out.
    """

    id: str
    cluster: str
    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool]]
    bytes: list[int]
    chars: list[int]
    text: str
    rewards: list[float] = field(default_factory=list)
    ranks: list[float] = field(default_factory=list)
    target_probs: list[float] = field(default_factory=list)
    sampler_logprobs: list[float] = field(default_factory=list)
    margin: float | None = None
    source: int = 0
    reference: np.ndarray | None = None
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    kept: list[np.ndarray] | None = None

    @property
    def count(self) -> int:
        """K, its responses."""
        return len(self.responses)

    @property
    def standings(self) -> list[float]:
        """K numbers by which the responses order, higher is better; empty where nothing judges."""
        return self.rewards or self.target_probs or [-rank for rank in self.ranks]

    @property
    def lengths(self) -> list[int]:
        """Tokens of prompt + response, one number a response."""
        return [len(self.prompt) + len(response) for response in self.responses]

    @property
    def longest(self) -> int:
        """Tokens of the longest response with the prompt, or of a prompt alone."""
        return max(self.lengths, default=len(self.prompt))

    @property
    def once(self) -> int:
        """Tokens of the prompt and all responses."""
        return len(self.prompt) + sum(map(len, self.responses))

    @property
    def trained_tokens(self) -> int:
        return sum(sum(mask) for mask in self.masks)

    @property
    def question(self) -> str:
        """The prompt as a person asked it, without the chat template: its text, or its last turn."""
        return asked(json.loads(self.text))

    def in_two(self) -> TokenGroup:
        """A prompt alone as an example: its second half as the response to its first."""
        half = max(1, len(self.prompt) // 2)
        rest = self.prompt[half:] or self.prompt[-1:]
        return TokenGroup(self.id, self.cluster, self.prompt[:half], [rest], [[True] * len(rest)], [0], [0], self.text)

    def each(self) -> list[TokenGroup]:
        """Its responses as Groups of their own."""
        of = [(self.responses, self.masks, self.bytes, self.chars)]
        return [
            TokenGroup(self.id, self.cluster, self.prompt, [r[k]], [m[k]], [b[k]], [c[k]], self.text)
            for r, m, b, c in of
            for k in range(self.count)
        ]

    def only(self, chosen: np.ndarray) -> TokenGroup:
        """The same, of whose targets [trained_tokens] only the chosen ones train."""
        left = iter(chosen.tolist())
        masks = [[target and next(left) for target in mask] for mask in self.masks]
        kept = None if self.kept is None else [self.kept[i] for i in chosen.nonzero()[0]]
        return replace(self, masks=masks, tokens={name: v[chosen] for name, v in self.tokens.items()}, kept=kept)

    def reference_of(self, k: int) -> np.ndarray:
        """Of response k alone."""
        assert self.reference is not None
        return self.reference[self._targets(k)]

    def tokens_of(self, name: str, k: int) -> np.ndarray:
        """Of response k alone."""
        return self.tokens[name][self._targets(k)]

    def kept_of(self, k: int) -> list[np.ndarray]:
        """Of response k alone."""
        assert self.kept is not None
        return self.kept[self._targets(k)]

    def _targets(self, k: int) -> slice:
        stops = np.cumsum([0, *(sum(mask) for mask in self.masks)])
        return slice(stops[k], stops[k + 1])


class Sized:
    """What planning needs of Groups, [n] each.

    counts: K of each Group (0: a prompt alone). lengths: its tokens in the padded layout (each response with the prompt).
    longest: of its longest response with the prompt. shared: its tokens with the prompt once. trained: its target tokens.
    """

    counts: np.ndarray
    lengths: np.ndarray
    longest: np.ndarray
    shared: np.ndarray
    trained: np.ndarray

    def widths(self, layout: str) -> np.ndarray:
        """[n] tokens of each Group's widest tensor row in a layout."""
        return {"padded": self.longest, "packed": self.lengths, "shared": self.shared}[layout]

    def heights(self, layout: str) -> np.ndarray:
        """[n] tensor rows of each Group in a layout."""
        return self.counts if layout == "padded" else np.ones_like(self.counts)

    def processed(self, layout: str) -> np.ndarray:
        """[n] tokens of each Group that a forward pass reads, padding apart."""
        return self.shared if layout == "shared" else self.lengths


class Examples(Sized):
    """A few TokenGroups in memory, with what planning needs of them; see TokenDataset (token_dataset.py)."""

    def __init__(self, groups: Sequence[TokenGroup]) -> None:
        self.held = list(groups)
        sizes = [(g.count, sum(g.lengths), g.longest, g.once, g.trained_tokens) for g in groups]
        columns = np.array(sizes, dtype=np.int64).reshape(-1, 5).T
        self.counts, self.lengths, self.longest, self.shared, self.trained = columns

    def __len__(self) -> int:
        return len(self.held)

    def groups(self, positions: Sequence[int] | np.ndarray) -> list[TokenGroup]:
        """The Groups at these positions, in this order."""
        return [self.held[position] for position in positions]
