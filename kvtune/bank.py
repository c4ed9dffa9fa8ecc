"""The bank: what one dense pass over each sequence leaves
behind, so that a trial costs its continuation only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from kvtune_kernels import attend
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from kvtune.attention import NAME, Reading, causal
from kvtune.errors import UsageError
from kvtune.models import Facts, facts
from kvtune.placement import input_device
from kvtune.policy import Policy
from kvtune.texts import Document, sequences
from kvtune.view import Observed, received


class Sizes(NamedTuple):
    """How much text a measurement takes: N sequences of C context and M continuation tokens."""

    sequences: int = 8
    context: int = 512
    continuation: int = 128


Observe = Callable[
    [int, Tensor, Tensor, Tensor], None
]  # layer, query [B, Hq, T, D], keys and values [B, H, T, D]


class Scaled(NamedTuple):
    """How a layer scales its logits, and where it caps them."""

    scale: float | None = None
    softcap: float | None = None


@dataclass(frozen=True, eq=False)
class Bank:
    """N sequences of C context and M continuation tokens under
    the dense model; it depends on no recipe.

    Each layer's tensors are on that layer's device, tokens and logp on the one that takes tokens.
    Full-attention layers hold the context's post-RoPE keys and values [N, H, C, D] and the queries
    [N, Hq, W, D] of its last tokens; sliding layers stand as transformers left them. The attention
    [N, H, C] that each token of the context got is there where it was asked for.
    """

    tokens: Tensor  # [N, C + M + 1]; the last one is only a target
    context: int
    facts: Facts
    keys: dict[int, Tensor]
    values: dict[int, Tensor]
    queries: dict[int, Tensor]
    others: dict[int, Any]  # the cache layers that stay transformers' own
    logp: Tensor  # [N, M, V], log-probabilities of the dense model on the continuation
    attention: dict[int, Tensor] = field(default_factory=dict)
    logits: dict[int, Scaled] = field(default_factory=dict)
    # keys [N, H, a, D] of tokens that were looked at behind the context; `queries` end in theirs
    ahead: dict[int, Tensor] = field(default_factory=dict)
    replayed: bool = False  # `attention` is what a replay gave, not a sum

    @property
    def continuation(self) -> int:
        """M, the tokens that a trial runs."""
        return self.tokens.shape[1] - self.context - 1

    @property
    def inputs(self) -> Tensor:
        """The continuation's tokens [N, M]."""
        return self.tokens[:, self.context : -1]

    @property
    def targets(self) -> Tensor:
        """The token after each of them [N, M]."""
        return self.tokens[:, self.context + 1 :]

    def observed(self, layer: int, policy: Policy) -> Observed | None:
        """What is known of a layer's context where the selectors of a policy want it.

        Raises:
            UsageError: the bank was built for other policies.
        """
        if policy.select is None:
            return None
        scale, softcap = self.logits[layer]
        found = Observed(scale=scale, softcap=softcap)
        if policy.needs & {"attention", "replay"}:
            if self.replayed != ("replay" in policy.needs):
                raise _unseen("a replay, or by sums of attention", "holds the other of")
            if layer not in self.attention:
                raise _unseen("attention", "did not sum up")
            found = found._replace(attention=self.attention[layer])
        if "queries" in policy.needs:
            more = self.ahead[layer].shape[2] if self.ahead else 0
            asked, held = min(policy.observed, self.context) + more, self.queries[layer]
            if held.shape[2] < asked:
                raise _unseen(f"the last {asked} queries", f"holds {held.shape[2]} of")
            found = found._replace(queries=held[:, :, held.shape[2] - asked :])
        if "ahead" in policy.needs:
            if layer not in self.ahead:
                raise _unseen("what a draft looks at", "has not read")
            found = found._replace(ahead=self.ahead[layer])
        return found

    def dense_layer(self, layer: int, rows: slice | list[int] = slice(None)) -> Any:
        """A stock cache layer that holds the context of the given sequences."""
        if layer in self.others:
            held = copy.copy(
                self.others[layer]
            )  # its updates replace tensors and never write into them
            held.keys, held.values = held.keys[rows], held.values[rows]
            return held
        dense = DynamicLayer()
        dense.update(self.keys[layer][rows], self.values[layer][rows])
        return dense


def _unseen(what: str, why: str) -> UsageError:
    return UsageError(
        f"The policy selects tokens by {what}, which this bank {why}.",
        "Build the bank for these policies: build(model, tokens, context, **wanted(policies)).",
    )


def wanted(policies: Iterable[Policy]) -> dict[str, Any]:
    """What `build` is told of the policies to be measured: `needs`, and a `window` of queries."""
    needs, window = frozenset[str](), 16
    for policy in policies:
        needs, window = needs | policy.needs, max(window, policy.observed)
    return {"needs": needs, "window": window}


def text_tokens(documents: list[Document], tokenizer: Any, sizes: Sizes, role: str) -> Tensor:
    """Returns tokens [N, C + M + 1]."""
    return sequences(
        documents, tokenizer, sizes.sequences, sizes.context + sizes.continuation + 1, role
    )


class Recorder(DynamicLayer):
    """A dense layer that shows what passes: keys, values and queries as attention sees them."""

    def __init__(
        self, show: Callable[[Tensor, Tensor, Tensor], None], sum_up: bool = False
    ) -> None:
        super().__init__()
        self._show, self._sum_up, self._shown = show, sum_up, False
        self.attention: Tensor | None = None  # [B, H, T] that the first tokens to come got
        self.logits = Scaled()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Reading, Reading]:
        """Stores densely and hands out a Reading."""
        super().update(key_states, value_states)
        self._shown = False
        return Reading(self), Reading(self)

    def attend(
        self, query: Tensor, mask: Tensor | None, scale: float | None, softcap: float | None
    ) -> Tensor:
        """Answers query [B, Hq, n, D] exactly."""
        if not self._shown:  # a model may hand the reading on to other layers
            self._show(query, self.keys, self.values)
            self._shown = True
        self.logits = Scaled(scale, softcap)
        if self._sum_up:
            self.attention, self._sum_up = received(query, self.keys, scale, softcap), False
        count = query.shape[2]
        seen = causal(count, self.keys.shape[2], query.device) if count > 1 else None
        return attend(query, self.keys, self.values, seen, scale, softcap)


@torch.no_grad()
def build(
    model: Any,
    tokens: Tensor,
    context: int,
    window: int = 16,
    observe: Observe | None = None,
    needs: frozenset[str] = frozenset(),
) -> Bank:
    """Runs the dense model over tokens [N, C + M + 1], one
    sequence after the other to bound memory.

    Args:
        context: C; M is what remains.
        window: W, how many of the context's last queries are kept per layer.
        observe: sees each layer's queries, keys and values of each context.
        needs: what the policies to be measured need (`Policy.needs`): "attention" is summed up.

    Raises:
        UsageError: a context and continuation beyond the model's positions.
    """
    known = facts(model.config)
    if tokens.shape[1] - 1 > known.max_positions:
        raise UsageError(
            f"{tokens.shape[1] - 1} tokens of context and continuation exceed the model's "
            f"{known.max_positions} positions.",
            "Give a smaller --context.",
        )
    model.set_attn_implementation(NAME)
    tokens = tokens.to(input_device(model))
    kept: list[tuple[dict[int, Tensor], Cache]] = []
    logp = []
    for row in tokens.split(1):
        queries: dict[int, Tensor] = {}
        cache = _recording(model, known, queries, window, observe, "attention" in needs)
        model(row[:, :context], past_key_values=cache, logits_to_keep=1)
        kept.append((queries, _context_of(cache)))
        out = model(row[:, context:-1], past_key_values=_dense(cache))
        logp.append(out.logits.to(tokens.device).float().log_softmax(-1))
    full = known.compressible()
    return Bank(
        tokens,
        context,
        known,
        {i: torch.cat([cache.layers[i].keys for _, cache in kept]) for i in full},
        {i: torch.cat([cache.layers[i].values for _, cache in kept]) for i in full},
        {i: torch.cat([queries[i] for queries, _ in kept]) for i in full},
        {
            i: _stacked([cache.layers[i] for _, cache in kept])
            for i, layer in enumerate(known.layers)
            if i not in full and layer.reads is None
        },
        torch.cat(logp),
        {
            i: torch.cat([cache.layers[i].attention for _, cache in kept])
            for i in full
            if "attention" in needs
        },
        {i: kept[0][1].layers[i].logits for i in full},
    )


def _recording(
    model: Any,
    known: Facts,
    queries: dict[int, Tensor],
    window: int,
    observe: Observe | None,
    sum_up: bool,
) -> Cache:
    def shower(layer: int) -> Callable[[Tensor, Tensor, Tensor], None]:
        def show(query: Tensor, keys: Tensor, values: Tensor) -> None:
            queries[layer] = query[:, :, -window:].clone()
            if observe:
                observe(layer, query, keys, values)

        return show

    layers = list(DynamicCache(config=model.config).layers)
    for index in known.compressible():
        layers[index] = Recorder(shower(index), sum_up)
    return Cache(layers=layers)


def _context_of(cache: Cache) -> Cache:
    return Cache(layers=[copy.copy(layer) for layer in cache.layers])


def _dense(cache: Cache) -> Cache:
    layers = []
    for layer in cache.layers:
        dense = copy.copy(layer)
        if isinstance(layer, Recorder):
            dense = DynamicLayer()
            dense.update(layer.keys, layer.values)
        layers.append(dense)
    return Cache(layers=layers)


def _stacked(layers: list[Any]) -> Any:
    whole = copy.copy(layers[0])
    whole.keys = torch.cat([layer.keys for layer in layers])
    whole.values = torch.cat([layer.values for layer in layers])
    return whole
