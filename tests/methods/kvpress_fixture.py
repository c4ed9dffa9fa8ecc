"""Writes tests/methods/kvpress_scores.safetensors: what kvpress scores on the tensors of
tests/kvpress_inputs.py.

It runs only where kvpress is installed, which kvtune's own environment does not need:

    python -m venv kvpress && kvpress/bin/pip install kvpress==0.5.5 safetensors
    PYTHONPATH=tests kvpress/bin/python tests/methods/kvpress_fixture.py

The file was made with kvpress 0.5.5, torch 2.13.0 and transformers 5.2.0, on a CPU; its metadata
say so too. Each score is kvpress's own, [2, 2, 280] in float32, of one layer of Llama with 6 query
heads and 2 kv heads of 16 channels; those of `critical` are of the tokens before the window.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import (
    CriticalKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    LagKVPress,
    ObservedAttentionPress,
    ScorerPress,
    SnapKVPress,
    StreamingLLMPress,
    TOVAPress,
)
from kvpress_inputs import (
    DIM,
    HEADS,
    HIDDEN,
    QUERY_HEADS,
    SHARES,
    SINKS,
    THETA,
    TOKENS,
    Inputs,
    heads,
    inputs,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

FILE = Path(__file__).with_name("kvpress_scores.safetensors")
WINDOW = 32  # of the scores that `critical` weighs


@dataclass
class Given(ScorerPress):
    """A press that scores as it is told."""

    scores: Tensor | None = None

    def score(self, *args: Any) -> Tensor:
        assert self.scores is not None
        return self.scores.clone()


def layer(given: Inputs) -> nn.Module:
    """An attention layer with the weights of the inputs."""
    config = LlamaConfig(
        hidden_size=HIDDEN,
        num_attention_heads=QUERY_HEADS,
        num_key_value_heads=HEADS,
        head_dim=DIM,
        rope_parameters={"rope_type": "default", "rope_theta": THETA},
    )
    module = LlamaAttention(config, 0)
    for name in ("query", "key", "value", "output"):
        getattr(module, f"{name[0]}_proj").weight.data = getattr(given, name)
    module.rotary_emb = LlamaRotaryEmbedding(config)
    return module


def attended(query: Tensor, keys: Tensor) -> Tensor:
    """Causal attention [B, Hq, T, T], as eager attention returns it."""
    logits = query @ keys.repeat_interleave(QUERY_HEADS // HEADS, 1).transpose(2, 3) * DIM**-0.5
    future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, float("-inf")).softmax(-1)


@torch.no_grad()
def scores() -> dict[str, Tensor]:
    """Every score by the name under which the test asks for it."""
    given = inputs()
    module = layer(given)
    query, keys, values = (heads(given.hidden, w) for w in (given.query, given.key, given.value))
    turns = module.rotary_emb(given.hidden, torch.arange(TOKENS)[None])
    query, keys = apply_rotary_pos_emb(query, keys, *turns)
    told = {"position_embeddings": turns}

    def score(press: ScorerPress, attentions: Tensor | None = None) -> Tensor:
        return press.score(module, given.hidden, keys, values, attentions, told)

    snapkv = score(SnapKVPress(window_size=WINDOW))
    found = {
        "knorm": score(KnormPress()),
        "keydiff": score(KeyDiffPress()),
        "lagkv": score(LagKVPress(n_sink=SINKS, lag_size=64)),
        "snapkv.32.5": snapkv,
        "snapkv.8.7": score(SnapKVPress(window_size=8, kernel_size=7)),
        "expected.0": score(ExpectedAttentionPress(n_sink=SINKS)),
        "expected.0.02": score(ExpectedAttentionPress(n_sink=SINKS, epsilon=0.02)),
        "tova": score(TOVAPress()),
        "attention": score(ObservedAttentionPress(), attended(query, keys)),
    }
    for share in SHARES:
        streaming = StreamingLLMPress(compression_ratio=1 - share, n_sink=SINKS)
        found[f"streaming.{share}"] = score(streaming)
        # of the tokens that compete alone: else the window takes most of the first stage
        before = slice(0, TOKENS - WINDOW)
        press = CriticalKVPress(Given(1 - share, snapkv[..., before]))
        own = keys[:, :, before], values[:, :, before]
        found[f"critical.{share}"] = press.score(module, given.hidden, *own, None, told)
    return {name: x.float().contiguous() for name, x in found.items()}


if __name__ == "__main__":
    save_file(
        scores(), FILE, {name: version(name) for name in ("kvpress", "torch", "transformers")}
    )
