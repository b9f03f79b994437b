"""A transformers causal language model of Llama 3 8B's shape (or LAYERS of its 32), random weights, bfloat16.

Its KV cache for KV_TOKENS is allocated. An answer is the next TOKENS tokens, greedily. The weights are made on the GPU:
a server that reads them from a disk starts slower.
"""

from __future__ import annotations

import os
from typing import Any

from support.workloads.gpu import base, tensors
from support.workloads.gpu.tensors import torch

LAYERS = int(os.environ.get("LAYERS", "32"))
KV_TOKENS = int(os.environ.get("KV_TOKENS", "16384"))
TOKENS = int(os.environ.get("TOKENS", "4"))
PROMPT = 32


class Model(base.Case):
    def __init__(self) -> None:
        import transformers  # type: ignore[import-not-found, unused-ignore]

        config = transformers.LlamaConfig(
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=LAYERS,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128256,
            max_position_embeddings=max(KV_TOKENS, 8192),
        )
        torch.manual_seed(13)
        torch.set_default_dtype(torch.bfloat16)
        with torch.device("cuda"):
            self.model = transformers.LlamaForCausalLM(config).eval()
        torch.set_default_dtype(torch.float32)
        self.prompt = torch.arange(1000, 1000 + PROMPT, device="cuda").view(1, PROMPT)
        self.cache = transformers.StaticCache(config=config, max_cache_len=KV_TOKENS)
        self.next = self._forward(self.prompt)

    def _forward(self, tokens: Any) -> Any:
        found = self.model(input_ids=tokens, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return found.logits[:, -1:].argmax(-1)

    def reset(self) -> None:
        self.cache.reset()
        self.next = self._forward(self.prompt)

    def step(self) -> Any:
        made = []
        for _ in range(TOKENS):
            made.append(int(self.next.item()))
            self.next = self._forward(self.next)
        return [made, tensors.digest(*(layer.keys[:, :, : PROMPT + TOKENS] for layer in self.cache.layers[:2]))]

    def checksum(self) -> Any:
        return tensors.digest(torch.stack([p.flatten().view(torch.int16).sum() for p in self.model.parameters()]))

    def state(self) -> dict[str, Any]:
        layers = self.cache.layers
        return {
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "kv_bytes": sum(t.numel() * t.element_size() for layer in layers for t in (layer.keys, layer.values)),
        }


def main() -> None:
    tensors.set_up()
    tensors.serve(Model())


if __name__ == "__main__":
    main()
