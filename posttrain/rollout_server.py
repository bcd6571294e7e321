"""Rollouts by a vLLM server: token ids over its OpenAI-compatible HTTP API, the policy's weights by a path both machines see.

An adapter is put at the path and loaded by /v1/load_lora_adapter (start the server with --enable-lora and
VLLM_ALLOW_RUNTIME_LORA_UPDATING=1); a whole model by /collective_rpc reload_weights; then its cache of prompts is reset (all with
VLLM_SERVER_DEV_MODE=1). Tried against tests/vllm_like.py, and not yet against vLLM itself. The server's
own rounding is not the training forward's, so its log-probs are only compared with ours, never trained on; and what it draws
depends on its batches: such a run can be resumed, but not to the bit.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.disk import whole_directory, writing
from posttrain.errors import ConfigError, TrainingError
from posttrain.generation import Generation
from posttrain.models.bottleneck import Bottleneck
from posttrain.models.export import save_model
from posttrain.rollout import Request
from posttrain.saving import collected

if TYPE_CHECKING:
    from posttrain.models.networks import Networks
    from posttrain.runtime import Runtime

SECONDS = 600
AT_ONCE = 64
"""Requests under way, which the server batches."""
ADAPTER = "posttrain-policy"


def refuse_unreadable(adapter: Any, network: Any) -> None:
    """ConfigError for what the server would not load, or would load as something else. Of adapters that were not asked for by
    key, but came from adapter.path or model.path: config/check.py tells of the keys, sooner."""
    settings = vars(adapter.peft_config["default"]) if adapter is not None else {}
    found = [key for key in ("use_dora", "rank_pattern", "alpha_pattern") if settings.get(key)]
    if any(isinstance(module, Bottleneck) for module in network.modules()):
        found.insert(0, "bottleneck")
    if found:
        raise ConfigError(
            f"stage.rollout_server reads adapters of one rank and one alpha without DoRA, and this model has {found[0]}; leave "
            "the server out and this process writes the answers itself"
        )


class VLLMServer:
    """A RolloutBackend that asks the server at `url`. directory: where weights are put for it."""

    def __init__(self, url: str, directory: Path, ends: set[int], runtime: Runtime) -> None:
        self.url, self.directory, self.ends, self.runtime = url.rstrip("/"), directory, ends, runtime
        self.model = self._first_model()

    def update(self, networks: Networks) -> None:
        """The server takes on the policy's weights as they are; rank 0 writes and asks, the others wait."""
        adapter = networks.module.model is not networks.module.network
        refuse_unreadable(networks.module.model if adapter else None, networks.module.network)
        weights = collected(networks, self.runtime)
        if self.runtime.is_main:
            with (
                writing(self.directory),
                whole_directory(self.directory, self.directory.with_suffix(".tmp")) as scratch,
            ):
                save_model(networks, scratch, self.ends, critic=False, state=weights)
            path = str(self.directory.resolve())
            if adapter:
                self._post("/v1/load_lora_adapter", {"lora_name": ADAPTER, "lora_path": path, "load_inplace": True})
            else:
                self._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": path}})
            self._post("/reset_prefix_cache", {})  # what it has kept of prompts is of the weights before
        self.model = ADAPTER if adapter else self.model
        self.runtime.barrier()

    def __call__(self, networks: Networks, request: Request) -> list[Generation]:
        sampling = request.sampling

        def ask(prompt: list[int], key: int) -> list[Generation]:
            seed = int(np.random.default_rng([sampling.seed, key]).integers(2**31))
            found = self._post("/v1/completions", {
                "model": self.model, "prompt": prompt, "max_tokens": request.max_new_tokens, "n": request.samples, "seed": seed,
                "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or -1, "min_p": 0.0,
                "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logprobs": 0,
                "stop_token_ids": sorted(self.ends), "return_token_ids": True, "skip_special_tokens": False,
            })  # fmt: skip
            return [self._generation(choice) for choice in sorted(found["choices"], key=lambda c: c["index"])]

        with ThreadPoolExecutor(AT_ONCE) as pool:
            return [answer for answers in pool.map(ask, request.prompts, request.keys) for answer in answers]

    def _generation(self, choice: dict[str, Any]) -> Generation:
        ids = choice.get("token_ids")
        if not ids:
            raise TrainingError(
                f"the server at {self.url} answered without token_ids; it must know return_token_ids (vLLM 0.10.2 or later)"
            )
        end = ids[-1] if choice["finish_reason"] == "stop" and ids[-1] in self.ends else None
        if choice["finish_reason"] == "stop" and end is None:
            raise TrainingError(
                f"the server at {self.url} stopped at token {ids[-1]}, which does not end an answer here; start it with "
                "--generation-config vllm, so that the model's own settings play no part"
            )
        return Generation(ids if end is None else ids[:-1], end, choice["logprobs"]["token_logprobs"])

    def _first_model(self) -> str:
        try:
            with urllib.request.urlopen(f"{self.url}/v1/models", timeout=SECONDS) as answer:
                return str(json.load(answer)["data"][0]["id"])
        except (OSError, ValueError, LookupError) as error:
            raise ConfigError(
                f"stage.rollout_server={self.url} answers no GET /v1/models: {error}; start it with `vllm serve`, or leave the "
                "key null and this process writes the answers itself"
            ) from error

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                said = answer.read()
        except urllib.error.HTTPError as error:
            told = error.read().decode(errors="replace")[:500]
            raise TrainingError(f"the server at {self.url} refused {path} ({error.code}): {told}") from error
        except OSError as error:
            raise TrainingError(f"the server at {self.url} did not answer {path}: {error}") from error
        found: dict[str, Any] = json.loads(said) if said[:1] == b"{" else {}
        return found
