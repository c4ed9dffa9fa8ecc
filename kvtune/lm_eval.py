"""lm-evaluation-harness on a compressed cache: the tasks of lm-eval, scored under a recipe."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from tqdm import tqdm
from transformers.cache_utils import Cache

from kvtune import __version__, shipped
from kvtune import recipe as recipes
from kvtune.cache import load
from kvtune.errors import UnsupportedError
from kvtune.layer import CompressedLayer
from kvtune.models import load_model
from kvtune.placement import input_device
from kvtune.recipe import Recipe

CHUNK = 512  # tokens whose logits are held at once; scores do not depend on it
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts, and tokens of both
Score = tuple[float, bool]  # log-likelihood in nats, and whether greedy decoding says the same


@register_model("kvtune")
class KvtuneLM(HFLM):
    """A model whose tasks are answered through a recipe's cache.

    What is measured: every scored position reads the context as it is stored. The harness scores
    in one forward, and a prompt sees itself exactly, so nothing would be compressed. Here the
    context is a prompt up to its last token, and is stored; the last token and the continuation
    then read it through the cache, as in generation that is forced to say the continuation. A
    rolling log-likelihood has a context of one token: all other tokens read what came before as
    it is stored. Generation, too, reads the prompt's last token through the cache, so that the
    first token of an answer counts. Contexts that fit into a recipe's sinks and recent window
    are stored exactly, which is what they are in use.

    Rows of a log-likelihood batch are padded on the right without a mask, which a cache would
    store: they are scored one by one, and continuations of one context share its prompt.

    A recipe that compresses nothing takes the harness's own way and gives its very numbers.

    Args:
        pretrained: a loaded transformers model, or what `kvtune --model` takes.
        recipe: a Recipe, the path of one, or a shipped name.
        tokenizer: of a loaded model.
        force: apply another model's recipe all the same.
        device, dtype: of a model given by name, as `kvtune --device` and `--dtype`.
        more: everything else that HFLM takes (batch_size, max_length, ...).

    Raises:
        IntegrityError: the recipe was tuned for another model.
        UnsupportedError: the model cannot be compressed, or remote code is asked for.
    """

    def __init__(
        self,
        pretrained: Any,
        recipe: Recipe | Path | str,
        tokenizer: Any = None,
        force: bool = False,
        device: str | None = None,
        dtype: str = "auto",
        **more: Any,
    ) -> None:
        if more.pop("trust_remote_code", False):
            raise UnsupportedError("kvtune never runs a model's remote code.")
        if isinstance(pretrained, str):
            # the harness's command line says cuda:0 unasked, and takes a CPU where there is none
            place = device if device and (torch.cuda.is_available() or "cuda" not in device) else ""
            pretrained, found = load_model(pretrained, dtype, place or "auto")
            tokenizer = tokenizer or found
        given = recipe if isinstance(recipe, Recipe) else shipped.find(str(recipe))
        self._empty = load(given, pretrained, force)
        self._recipe = given if isinstance(given, Recipe) else recipes.load(given)
        self._compresses = any(isinstance(own, CompressedLayer) for own in self._empty.layers)
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, **more)
        self._device = input_device(pretrained)

    def get_model_info(self) -> dict[str, Any]:
        """What stands in the harness's results: its own facts, and which recipe was applied."""
        named = {"name": self._recipe.name, "digest": recipes.digest(self._recipe)}
        return {**super().get_model_info(), "kvtune": __version__, "recipe": named}

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[Score]:
        if not self._compresses:
            found: list[Score] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
            return found
        split = [self._split(context, rest) for _, context, rest in requests]
        # the longest first, so that memory runs out at once if at all; equal prompts together
        order = sorted(range(len(split)), key=lambda i: (-len(split[i][0]), split[i][0]))
        scores: dict[int, Score] = {}
        prompt, stored = list[int](), None
        for index in tqdm(order, disable=disable_tqdm or self.rank != 0, desc="log-likelihoods"):
            if stored is None or prompt != split[index][0]:
                prompt = split[index][0]
                stored = self._stored(prompt)
            said, texts = requests[index][2], requests[index][0]
            scores[index] = self._score(*stored, split[index][1], said)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, scores[index])
        return [scores[index] for index in range(len(split))]

    def _split(self, context: list[int], said: list[int]) -> tuple[list[int], list[int]]:
        """The prompt, and the tokens that are read through the cache; cut on the left to fit."""
        tokens = (context + said)[-(self.max_length + 1) : -1]
        # a first forward sees itself exactly: one token, where the context has no more
        first = max(1, len(tokens) - len(said))
        return tokens[:first], tokens[first:]

    def _stored(self, prompt: list[int]) -> tuple[Cache, Tensor]:
        """The cache of a prompt, and its last logits [1, 1, V]."""
        cache = self._empty.fresh()
        return cache, self._logits(prompt, cache, logits_to_keep=1)

    def _score(self, stored: Cache, last: Tensor, read: list[int], said: list[int]) -> Score:
        cache = Cache(layers=[_fork(layer) for layer in stored.layers])
        targets = torch.tensor(said, device=last.device)
        logits = [last] if len(read) < len(said) else []  # a context of one token
        total, greedy, done = 0.0, True, 0
        for start in range(0, max(1, len(read)), CHUNK):
            if part := read[start : start + CHUNK]:
                logits.append(self._logits(part, cache))
            logp = torch.cat(logits, 1)[0].log_softmax(-1, dtype=self.softmax_dtype)
            wanted = targets[done : done + len(logp)]
            total += float(logp.gather(1, wanted[:, None]).sum())
            greedy = greedy and bool((logp.argmax(-1) == wanted).all())
            logits, done = [], done + len(logp)
        return total, greedy

    @torch.no_grad()
    def _logits(self, tokens: list[int], cache: Cache, **more: Any) -> Tensor:
        inputs = torch.tensor([tokens], device=self.device)
        with self._precision():
            logits: Tensor = self.model(inputs, past_key_values=cache, **more).logits
        return logits

    def _precision(self) -> AbstractContextManager[Any]:
        wanted = self.mixed_precision_dtype
        return torch.autocast(self.device.type, dtype=wanted, enabled=wanted is not None)

    def _model_generate(
        self, context: Tensor, max_length: int, stop: list[str], **generation: Any
    ) -> Tensor:
        cache = self._empty.fresh()
        if self._compresses and generation.get("num_beams", 1) == 1:
            self._prefill(context, generation.get("attention_mask"), cache)
        made: Tensor = super()._model_generate(
            context, max_length, stop, past_key_values=cache, **generation
        )
        return made

    @torch.no_grad()
    def _prefill(self, context: Tensor, mask: Tensor | None, cache: Cache) -> None:
        """Stores context [B, T] but for its last token, which then reads the rest as stored."""
        mask = torch.ones_like(context) if mask is None else mask
        if not bool(mask[:, :-1].any(1).all()):
            return  # a row of one token has nothing that could be stored before it
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        with self._precision():
            self.model(
                context[:, :-1],
                attention_mask=mask[:, :-1],
                position_ids=positions[:, :-1],
                past_key_values=cache,
                logits_to_keep=1,
            )


def _fork(layer: Any) -> Any:
    """A twin that a continuation may extend; a stock layer replaces its tensors and keeps none."""
    return layer.fork() if isinstance(layer, CompressedLayer) else copy.copy(layer)


def main() -> None:
    """lm-eval's own command line, with the model "kvtune" in it: python -m kvtune.lm_eval run."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
