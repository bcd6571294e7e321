"""A local HTTP server that speaks the part of vLLM's protocol which posttrain uses, over the transformers library.

Written from vLLM's documentation of its OpenAI-compatible server; what it was told is kept in `seen`.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM


class VLLMLike(ThreadingHTTPServer):
    def __init__(self, model: str) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.name, self.model, self.lock = model, AutoModelForCausalLM.from_pretrained(model).eval(), threading.Lock()
        self.seen: list[tuple[str, Any]] = []
        self.fail_at: str | None = None
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()

    @torch.no_grad()
    def complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        prompt = torch.tensor([asked["prompt"]] * asked["n"])
        torch.manual_seed(asked["seed"])
        output = self.model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=asked["max_tokens"], do_sample=True,
            temperature=asked["temperature"], top_k=0, eos_token_id=asked["stop_token_ids"], pad_token_id=0,
            return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
        choices = []
        for k, row in enumerate(output.sequences[:, prompt.shape[1] :].tolist()):
            stop = next((n for n, token in enumerate(row) if token in asked["stop_token_ids"]), None)
            ids = row if stop is None else row[: stop + 1]
            nats = [float(output.scores[n][k].log_softmax(-1)[token]) for n, token in enumerate(ids)]
            choices.append({
                "index": k, "token_ids": ids, "finish_reason": "length" if stop is None else "stop",
                "logprobs": {"token_logprobs": nats},
            })  # fmt: skip
        return {"choices": choices[::-1]}  # their index says which is which


class Handler(BaseHTTPRequestHandler):
    server: VLLMLike

    def do_GET(self) -> None:
        self._answer(200, {"data": [{"id": self.server.name}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append((self.path, asked))
            if self.path == self.server.fail_at:
                self._answer(500, {"error": "out of memory"})
            elif self.path == "/v1/completions":
                self._answer(200, self.server.complete(asked))
            elif self.path == "/collective_rpc" and asked["method"] == "reload_weights":
                path = Path(asked["kwargs"]["weights_path"])
                assert [file.name for file in path.glob("*.safetensors")] == [
                    "model.safetensors"
                ]  # vLLM would read them all
                self.server.model = AutoModelForCausalLM.from_pretrained(path).eval()
                self._answer(200, {"results": [None]})
            elif self.path == "/reset_prefix_cache":
                self._answer(200, None)
            elif self.path == "/v1/load_lora_adapter":
                base = AutoModelForCausalLM.from_pretrained(self.server.name)
                self.server.model = PeftModel.from_pretrained(base, asked["lora_path"]).eval()
                self._answer(200, None)
            else:
                self._answer(404, {"error": self.path})

    def _answer(self, status: int, body: Any) -> None:
        said = json.dumps(body).encode() if body is not None else b"Success: LoRA adapter added"
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def log_message(self, *_: object) -> None:
        pass
