"""Generation with a recipe: plain model.generate() with a compressed cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.amounts import size
from kvtune.cli.output import Output
from kvtune.errors import UnsupportedError, UsageError

if TYPE_CHECKING:
    from kvtune.cache import CompressedCache
    from kvtune.recipe import Recipe

PANEL = "Generation"


@dataclass(frozen=True)
class Prompt:
    """What is generated."""

    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", rich_help_panel=PANEL, help="Generate after this.")
    ] = None
    chat: Annotated[
        bool, typer.Option("--chat", rich_help_panel=PANEL, help="As a question to a chat model.")
    ] = False
    max_new_tokens: Annotated[
        int, typer.Option(min=1, rich_help_panel=PANEL, help="Tokens to generate at most.")
    ] = 200


def generate(
    out: Output,
    path: Path,
    opened: tuple[Any, Any],
    prompt: Prompt,
    force: bool,
    draft: tuple[Any, Any] | None = None,
) -> None:
    """Prints what the model says with the recipe's cache, and on stderr what the cache took."""
    import torch

    from kvtune import recipe as recipes
    from kvtune.cache import load
    from kvtune.prefill import Draft, prefill

    model, tokenizer = opened
    recipe = recipes.load(path)
    inputs = _inputs(tokenizer, prompt, model, _most(recipe, model, prompt))
    cache = load(path, model, force)
    if force:
        forced(out, recipe, model)
    out.say("generating", 0, 1)
    asked = inputs["input_ids"]
    read = prefill(model, cache, asked, tokenizer=tokenizer, draft=draft and Draft(*draft))
    if read is not asked:  # it was cut
        inputs = {"input_ids": read, "attention_mask": torch.ones_like(read)}
    made = model.generate(
        **inputs, past_key_values=cache, max_new_tokens=prompt.max_new_tokens, do_sample=False
    )
    out.say("generating", 1, 1)
    new = made[0, read.shape[1] :]
    text = tokenizer.decode(new, skip_special_tokens=True)
    # the last token was said, but never read
    weight = _weight(recipe, model, cache, made.shape[1] - 1)
    out.data |= {"text": text, "new_tokens": len(new), **weight}
    out.print(text)
    out.note(
        f"The cache of {weight['tokens']:,} tokens takes {size(weight['bytes'])} instead of "
        f"{size(weight['dense_bytes'])} in 16 bit: {weight['ratio']:.2f}x smaller."
    )


def _most(recipe: Recipe, model: Any, prompt: Prompt) -> int:
    """How many tokens the prompt may have: with the new ones as many as the model has positions,
    unless the cache has positions of its own."""
    from kvtune.in_cache import endless
    from kvtune.models import facts

    known = facts(model.config)
    policies = recipe.policies(known)
    if endless([policies[index] for index in known.compressible()]):
        return known.max_positions
    return known.max_positions - prompt.max_new_tokens


def _inputs(tokenizer: Any, prompt: Prompt, model: Any, most: int) -> dict[str, Any]:
    from kvtune.models import facts
    from kvtune.placement import input_device

    text = prompt.prompt
    if prompt.chat:
        if not tokenizer.chat_template:
            raise UnsupportedError("This model has no chat template.", "Leave out --chat.")
        asked = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not prompt.chat)
    count = inputs["input_ids"].shape[1]
    if not count:
        raise UsageError("The prompt is empty.", 'Give --prompt "TEXT".')
    if count > most:
        what = f"{count:,} tokens of prompt and {prompt.max_new_tokens:,} new ones exceed the "
        hint = "Give a shorter --prompt or a smaller --max-new-tokens, or apply lacache."
        raise UsageError(f"{what}model's {facts(model.config).max_positions:,} positions.", hint)
    names = ("input_ids", "attention_mask")
    return {name: inputs[name].to(input_device(model)) for name in names if name in inputs}


def _weight(recipe: Recipe, model: Any, cache: CompressedCache, tokens: int) -> dict[str, Any]:
    """What the cache stores, in a 16-bit model's terms, and what the allocator holds here."""
    from kvtune.cache import weigh
    from kvtune.models import facts

    known = facts(model.config)
    weight = weigh(recipe.policies(known), known, tokens)
    return {
        "tokens": tokens,
        "bytes": weight.bytes,
        "dense_bytes": weight.dense_bytes,
        "ratio": weight.ratio,
        "held_bytes": cache.nbytes,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def forced(out: Output, recipe: Recipe, model: Any) -> None:
    """Says that a recipe of another model was applied."""
    from kvtune.models import fingerprint

    if recipe.model is not None and recipe.model.fingerprint != fingerprint(model):
        out.warn(f"--force: this recipe was tuned for {recipe.model.name}, another model.")
