"""The reference's log-probs: computed once, before training, kept by content of model and data, never recomputed in a step.

The reference is the policy as it starts (with a fresh adapter that is the policy without it, for B = 0; with a trained
adapter the adapter as it came), or the model at model.reference. What is kept is one number a trained token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from posttrain.data import cache
from posttrain.data.batches import collate
from posttrain.data.loader import evaluation_batches, gather
from posttrain.data.packing import Packing
from posttrain.data.pipeline import Prepared
from posttrain.data.token_dataset import TokenDataset
from posttrain.data.tokens import Examples, TokenGroup
from posttrain.errors import DataError, ModelError
from posttrain.models.float8 import float8_of
from posttrain.models.networks import build_network, read_by_all
from posttrain.models.others import other_model, told_of
from posttrain.models.probe import check_forward
from posttrain.models.sharding import whole

if TYPE_CHECKING:
    from posttrain.config import Config
    from posttrain.models.policy import Policy
    from posttrain.runtime import Runtime

VERSION = 1
TOLERANCE = {"fp32": 1e-4, "tf32": 1e-2, "fp8": 1.5}
HALF_TOLERANCE = 0.3
"""By how many nats, times √T for a response of T tokens, the start may differ from its own stored log-probs: other batches
round otherwise, each token apart from the next. In bf16 a 135 M model's tokens differ by .06 (standard deviation), its
responses by at most .1·√T. In fp8 (tensorwise: the scale is of all that stands in a forward) its tokens differ by .31."""


def attach(
    cfg: Config,
    runtime: Runtime,
    prepared: Prepared,
    packing: Packing,
    keys: dict[str, str],
    start: Policy | None,
    probed: list[int],
    tell: Callable[[str], None],
) -> tuple[dict[str, str], dict[str, float]]:
    """Give prepared's datasets the reference's log-probs where the stage wants them.

    keys: of an earlier part of this run. start: the policy where it is still the start, else None. Returns the keys that were
    used and what the start-up check, on the training examples `probed`, found. tell: says what takes long.
    """
    wanted = cfg.stage.needs_reference(_sampler_known(prepared.train))
    if wanted == "never":
        return {}, {}
    reference = Reference(cfg, runtime, packing, keys, prepared.train.groups(probed), tell)
    if len(prepared.eval):
        prepared.eval = reference.attach("eval", prepared.eval, prepared.fingerprint, start)
    if wanted != "always":
        return reference.keys, {}
    assert isinstance(prepared.train, TokenDataset), "preference stages are not streamed"
    prepared.train = reference.attach("train", prepared.train, prepared.fingerprint, start)
    if start is None or cfg.model.reference is not None:
        return reference.keys, {}
    return reference.keys, {"reference": check_start(start, prepared.train.groups(probed), packing, runtime)}


def _sampler_known(data: TokenDataset | Examples) -> bool:
    """Whether the data has the sampler's log-probs; DataError where some of its Groups have and others have not."""
    if not isinstance(data, TokenDataset) or not len(data):
        return False
    known = sum(map(bool, data.column("sampler_logprobs")))
    if known not in (0, len(data)):
        raise DataError(
            f"{known:,} of {len(data):,} prompts have sampler_logprobs; give them in every row or in none (data.columns)"
        )
    return known > 0


class Reference:
    """Finds or computes log-probs; `keys` name what was used, so that a resumed run finds it without its first weights."""

    def __init__(
        self,
        cfg: Config,
        runtime: Runtime,
        packing: Packing,
        keys: dict[str, str],
        examples: list[TokenGroup],
        tell: Callable[[str], None],
    ) -> None:
        """examples: real ones that a model given as reference is checked with."""
        self.tell = tell
        self.cfg, self.runtime, self.packing = cfg, runtime, packing
        self.examples = examples
        self.keys = dict(keys)
        self._policy: Policy | None = None
        self._digest: str | None = None

    def attach(self, side: str, data: TokenDataset, fingerprint: str, start: Policy | None) -> TokenDataset:
        """The dataset with the reference's log-probs. start: the policy where it is still the start, else None."""
        known = self._stored(self.keys.get(side))
        if known is None:
            self._open(start)
            self.keys[side] = self._key(side, fingerprint)
            known = self._stored(self.keys[side])
        if known is None:
            assert self._policy is not None
            what = {"train": "training", "eval": "evaluation"}[side]
            self.tell(f"the reference reads {len(data):,} {what} examples, once (kept in data.cache) ...")
            known = token_logprobs(self._policy, data, self.packing, self.runtime)
            self._store(self.keys[side], known)
        return data.with_reference(known)

    def _open(self, start: Policy | None) -> None:
        if self._policy is not None:
            return
        if self.cfg.model.reference is None and start is not None:
            self._policy = start
            return
        found = reference_network(self.cfg, self.runtime)
        self._policy = found if self.runtime.shards else found.to(self.runtime.device)
        if self.cfg.model.reference is not None:
            with told_of("model.reference"):
                check_forward(self._policy, self.examples, self.packing.layout, self.runtime.device)

    def _key(self, side: str, fingerprint: str) -> str:
        if self._digest is None:
            self._digest = weights_digest(self._policy)
        parts = {
            "version": VERSION, "torch": torch.__version__, "device": self.runtime.device.type, "weights": self._digest,
            "precision": self._arithmetic(), "data": fingerprint, "side": side, "packing": asdict(self.packing),
        }  # fmt: skip
        return cache.digest(parts)

    def _arithmetic(self) -> str:
        """The precision, and of fp8 how."""
        float8 = float8_of(self.cfg.precision)
        return self.runtime.precision + (f" {float8}" if float8 else "")

    def _directory(self, key: str) -> Any:
        return cache.cache_root(self.cfg.data.cache) / f"reference-{key}"

    def _stored(self, key: str | None) -> np.ndarray | None:
        found = key is not None and cache.is_built(self._directory(key))
        if key is None or not all(self.runtime.gather([found])):  # data.cache may be each machine's own
            return None
        return np.load(self._directory(key) / "logprobs.npy", mmap_mode="r")

    def _store(self, key: str, values: np.ndarray) -> None:
        if self.runtime.is_main:

            def fill(scratch: Any) -> dict[str, Any]:
                np.save(scratch / "logprobs.npy", values)
                return {"tokens": len(values)}

            cache.build(self._directory(key), fill)
        self.runtime.barrier()


def reference_network(cfg: Config, runtime: Runtime) -> Any:
    """The model at model.reference, or the one that the run began with; on the CPU, or in parts on the ranks."""
    model, adapter, given = cfg.model, cfg.adapter, cfg.model.reference
    if given is not None:
        model, adapter = other_model(model, given), replace(adapter, name="none", path=None)
    with told_of("model.reference") if given is not None else nullcontext():
        by_all, float8 = read_by_all(model, adapter), float8_of(cfg.precision)
        shape_only = not runtime.reads_weights(by_all)
        network, _ = build_network(
            model, adapter, runtime.compute_dtype, cfg.train.seed, float8=float8, shape_only=shape_only
        )
    return runtime.place(network, by_all) if runtime.shards else network


@torch.no_grad()
def token_logprobs(policy: Policy, data: TokenDataset, packing: Packing, runtime: Runtime) -> np.ndarray:
    """log π of every target of the dataset in its order, fp32, [data.trained.sum()]; the work is shared by the ranks.

    The batches are those of an evaluation, so that a policy that has not moved gives the same bits there.
    """
    was_training = policy.training
    policy.eval()
    parts: list[tuple[np.ndarray, np.ndarray]] = []
    for positions, rows in evaluation_batches(data, packing, runtime.rank, runtime.world):
        batch = gather(data, positions, rows, packing.layout).to(runtime.device)
        with runtime.autocast():
            found = policy(batch).logprobs.float()
        parts.append((positions[[i for row in rows for i in row]], found.cpu().numpy()))
    policy.train(was_training)
    values = np.full(int(data.trained.sum()), np.nan, dtype=np.float32)
    starts = np.concatenate([[0], np.cumsum(data.trained)])
    for used, found in runtime.gather(parts):  # a batch's targets stand Group after Group
        stop = 0
        for position in used:
            start, stop = stop, stop + int(data.trained[position])
            values[starts[position] : starts[position + 1]] = found[start:stop]
    assert not np.isnan(values).any(), "every target has its log-prob"
    return values


@torch.no_grad()
def check_start(policy: Policy, groups: list[TokenGroup], packing: Packing, runtime: Runtime) -> float:
    """Largest difference in nats a response between the policy and its stored log-probs; ModelError above the tolerance."""
    batch = collate(groups, [[i] for i in range(len(groups))], packing.layout).to(runtime.device)
    assert batch.reference is not None
    policy.eval()
    with runtime.autocast():
        logprobs = policy(batch).logprobs
    gaps = batch.by_response(logprobs - batch.reference).abs()
    allowed = TOLERANCE.get(runtime.precision, HALF_TOLERANCE) * batch.trained_per_response.sqrt()
    if not bool((gaps <= allowed).all()):
        worst = int((gaps / allowed).nan_to_num(nan=float("inf")).argmax())
        raise ModelError(
            f"the policy at the start differs from its own stored log-probs by {float(gaps[worst]):.2g} nats in a response of "
            f"{int(batch.trained_per_response[worst])} tokens, where rounding explains {float(allowed[worst]):.2g}: the cache "
            "does not belong to this model, or its forward pass is not repeatable; give another data.cache"
        )
    return float(gaps.max())


def weights_digest(policy: Any) -> str:
    """24 hex digits of every parameter and buffer, names and bits."""
    found = hashlib.blake2b(digest_size=12)
    for name, tensor in sorted(policy.state_dict().items()):
        found.update(f"{name} {getattr(tensor, 'dtype', '')} {tuple(getattr(tensor, 'shape', ()))}".encode())
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            found.update(whole(tensor).detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
