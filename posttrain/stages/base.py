"""What a stage is: the units it counts, the loss it sums, the scores it gives. The trainer does the rest.

A stage is one file here, one YAML in conf/stage/ and one test. It is found by its file's name (`stages/sft.py` is
`stage=sft`), or, from another package, by an entry point of the group `posttrain.stages` that names its class.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor
from torch.nn import Parameter

from posttrain import stages
from posttrain.errors import ConfigError

if TYPE_CHECKING:
    from posttrain.data.batches import Batch
    from posttrain.data.group import Group
    from posttrain.data.loader import Step
    from posttrain.data.tokens import TokenGroup
    from posttrain.models.networks import Head, Networks
    from posttrain.models.router import Router
    from posttrain.rollout import RolloutBackend

Records = dict[str, np.ndarray]


@dataclass(frozen=True)
class Asked:
    """What an evaluation wants in the records.

    bins: of the calibration error. temperature: that confidences in them are taken at. fit_every: of the tokens whose sums a
    temperature is fitted to, one in so many is taken; 0: no such sums (those of pairs cost nothing and are always there).
    """

    bins: int
    temperature: float = 1.0
    fit_every: int = 0


@dataclass
class Loss:
    """The sums of one micro-batch.

    terms: one differentiable scalar a term, a SUM over its units; the trainer divides by the step's count of them.
    stats: cheap numbers for the log, each a detached (sum, count) pair, pooled over micro-batches, ranks and steps.
    peaks: likewise numbers >= 0 of which the largest is told.
    """

    terms: dict[str, Tensor]
    stats: dict[str, tuple[Tensor, float]] = field(default_factory=dict)
    peaks: dict[str, Tensor] = field(default_factory=dict)

    def with_router(self, router: Router | None) -> Loss:
        """With a mixture's load balance as the term `aux`, where there is one."""
        if router is not None:
            self.terms["aux"] = router.balance
            self.stats |= router.stats()
        return self


@dataclass
class Supply:
    """What a stage that makes its own steps works with.

    runtime: ranks, device, precision. level: of intervals. rollout: writes answers. judge: (prompts, answers) → their rewards.
    loader: the data's order; its `take` gives the prompts of an iteration. draws: how many examples an epoch-counted run
    draws. state: what Step.stream held at the checkpoint that the run goes on from.
    """

    runtime: Any
    packing: Any
    seed: int
    level: float = 0.95
    rollout: RolloutBackend | None = None
    judge: Any = None
    loader: Any = None
    draws: int | None = None
    state: dict[str, Any] = field(default_factory=dict)


@dataclass
class Stage:
    """Base of all stages; a subclass's dataclass fields are its part of the configuration."""

    data_formats: ClassVar[tuple[str, ...]] = ()
    splits_long_documents: ClassVar[bool] = False
    streams: ClassVar[bool] = True
    """Whether it can train on data that is read as it goes (data.streaming)."""
    useless: ClassVar[str] = ""
    """Why a Group that `groups` leaves out teaches nothing, for the user."""
    generates: ClassVar[bool] = True
    """Whether its model writes answers, so that evaluation can ask for some."""
    watches: ClassVar[str] = "nll"
    """The metric by which best-so-far and early stopping judge; stats.LOWER_IS_BETTER says in which direction."""

    confidence_of: ClassVar[str] = "tokens"
    """Whose confidence a fitted temperature corrects: "tokens", or "pairs" of responses."""
    shows: ClassVar[tuple[str, ...]] = ("loss",)
    """What the line of a training step tells; metrics.jsonl has all."""
    undecided: ClassVar[tuple[str, ...]] = ()
    """Metrics that the final table gives no verdict on, since they may rise or fall whether the model is better or not."""

    def check(self) -> None:
        """Raise ConfigError for settings that cannot go together. Ranges and choices stand in the fields' metadata."""

    def groups(self, groups: Iterable[Group], notes: Counter[str], seed: int = 0) -> Iterable[Group]:
        """The Groups this stage trains on; by default the data's own. notes: what to tell the user → how often. seed: the
        run's, for a stage that draws."""
        return groups

    def needs_reference(self, sampler_known: bool) -> str:
        """Whether the reference's log-probs are wanted: "never", for "evaluation" alone, or "always".

        sampler_known: the data has the log-probs under the model that sampled its responses.
        """
        return "never"

    def group_settings(self) -> dict[str, Any]:
        """The settings that decide which Groups there are: with others, data is not found in the cache again."""
        return asdict(self)

    def head(self, ends: set[int]) -> Head | None:
        """What a reward model has in place of the output layer; None for a policy. ends: tokens that end a turn."""
        return None

    @property
    def closes_responses(self) -> bool:
        """Whether every response must end with an end-of-turn token, one that was cut or lacks it included."""
        return False

    @property
    def needs_critic(self) -> bool:
        """Whether the policy carries a value head."""
        return False

    @property
    def keeps_reference(self) -> bool:
        """Whether the frozen reference itself is wanted while training, for what is sampled."""
        return False

    @property
    def answer_tokens(self) -> int:
        """Room that a prompt must leave for the answer; 0 where answers come with the data. A stage that has one samples."""
        return 0

    @property
    def answers(self) -> int:
        """How many answers it samples to each prompt; 0 where answers come with the data."""
        return 0

    @property
    def updates(self) -> int:
        """Optimizer steps that the Groups of one draw are good for."""
        return 1

    def facts(self) -> list[tuple[str, str]]:
        """What: value, for the plan's table."""
        return []

    def rehearsed(self, groups: list[TokenGroup], layout: str) -> list[TokenGroup]:
        """What a plan takes for the Groups of one step, of those that the data gives it; a stage that samples adds answers."""
        return groups

    def batches(self, networks: Networks, supply: Supply, first: int, last: int) -> Iterable[Step]:
        """Steps first .. last-1; by default the data's own. A stage that samples makes them of what it has sampled."""
        return supply.loader.steps(first, last, supply.draws)

    def held_out(self, networks: Networks, supply: Supply, prompts: list[TokenGroup]) -> list[dict[str, float]]:
        """A stage that samples: the metrics of one sampled answer to each held-out prompt, on every rank."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weight of each loss term; a term that is not named here weighs 1."""
        return {}

    def counts(self, batch: Batch) -> dict[str, float]:
        """Units of each loss term in this micro-batch, known before any forward pass."""
        raise NotImplementedError

    def loss(self, networks: Networks, batch: Batch) -> Loss:
        """Sums over this micro-batch's units; see Loss."""
        raise NotImplementedError

    def resting(self, networks: Networks, step: Step) -> Iterable[Parameter]:
        """Parameters that this step leaves as they are: without a gradient, weight decay and the optimizer's averages stand
        still too."""
        return ()

    def score(self, networks: Networks, batch: Batch, asked: Asked) -> Records:
        """Evaluation records: column name → fp64 array with a row for each of the batch's Groups. At another temperature than 1
        only the bins are read."""
        raise NotImplementedError


def names() -> list[str]:
    """Every stage there is: the modules of this package, then other packages' entry points."""
    own = [module.name for module in pkgutil.iter_modules(stages.__path__) if module.name not in NOT_STAGES]
    return sorted({*own, *(point.name for point in entry_points(group=GROUP))})


def find(name: str) -> type[Stage]:
    """The class of the stage called `name`; ConfigError where there is none."""
    if name not in names():
        raise ConfigError(f"stage={name} is not a stage; the stages are {', '.join(names())}")
    for point in entry_points(group=GROUP):
        if point.name == name:
            return _checked(name, point.load())
    module = importlib.import_module(f"posttrain.stages.{name}")
    classes = [c for c in vars(module).values() if _is_stage(c) and c.__module__ == module.__name__]
    assert len(classes) == 1, f"posttrain/stages/{name}.py must define one Stage, found {classes}"
    return classes[0]


GROUP = "posttrain.stages"
NOT_STAGES = {
    "base", "controls", "experience", "likelihood", "policy_gradient", "ppo_options", "preferences", "recomputed", "responses",
}  # fmt: skip


def _is_stage(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, Stage) and value is not Stage


def _checked(name: str, value: Any) -> type[Stage]:
    if not _is_stage(value):
        raise ConfigError(f"the entry point {GROUP}:{name} gives {value!r}; it must name a subclass of Stage")
    return value
