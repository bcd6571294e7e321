"""Supervised fine-tuning with prompt masking.

    normalize=token      L = -(1/N) Σ_i Σ_t log π(y_it | x_i, y_i<t),         N = completion tokens of the step
    normalize=sequence   L = -(1/B) Σ_i (1/T_i) Σ_t log π(y_it | x_i, y_i<t), B = examples of the step

Only completion tokens are targets, the end-of-turn token among them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from posttrain.data.group import Group
from posttrain.data.preferences import best_response
from posttrain.errors import ConfigError
from posttrain.stages.likelihood import Likelihood

if TYPE_CHECKING:
    from posttrain.data.batches import Batch


@dataclass
class SFT(Likelihood):
    """Completion tokens are targets: of all assistant turns, of the last, or of the turns of all the roles listed."""

    data_formats: ClassVar[tuple[str, ...]] = ("prompt_completion", "messages", "pairs", "groups", "scored")

    train_on: Literal["all", "last"] | list[str] = "all"
    normalize: Literal["token", "sequence"] = "token"

    def check(self) -> None:
        super().check()
        if isinstance(self.train_on, list) and (not self.train_on or {"all", "last"} & set(self.train_on)):
            raise ConfigError(
                f"stage.train_on must be all, last or a list of roles, got [{', '.join(self.train_on)}]; "
                "try [assistant, tool]"
            )

    def groups(self, groups: Iterable[Group], notes: Counter[str], seed: int = 0) -> Iterator[Group]:
        """One response each: the only one, or of judged responses the best (chosen, label true, best rank or reward)."""
        for group in groups:
            best = best_response(group)
            if best is None:
                notes["have no good response (label false, or all rewards alike): not trained on"] += 1
            elif len(group.responses) == 1:
                yield Group(group.prompt, group.responses, columns=group.columns, file=group.file, row=group.row)
            else:
                notes["train the best of their responses only"] += 1
                yield Group(group.prompt, (best,), columns=group.columns, file=group.file, row=group.row)

    def token_weights(self, batch: Batch) -> torch.Tensor:
        if self.normalize == "token":
            return super().token_weights(batch)
        return 1.0 / batch.trained_per_response[batch.response].float()

    def units(self, batch: Batch) -> float:
        return super().units(batch) if self.normalize == "token" else float(batch.responses)
