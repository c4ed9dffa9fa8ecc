"""kvtune unpack: a packed cache comes back, to generate from or as safetensors."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli.apply import ModelOption
from kvtune.cli.job import check_length, open_model
from kvtune.cli.options import Where
from kvtune.cli.output import Output
from kvtune.errors import IntegrityError, MissingInputError, UsageError

if TYPE_CHECKING:
    from kvtune.packing.codec import Codec

LARGEST = 1 << 40
PackedFile = Annotated[Path, typer.Argument(metavar="FILE", help="What kvtune pack wrote.")]
CodecFile = Annotated[
    Path | None, typer.Option("--codec", metavar="FILE", help="Its codec, if not kept here.")
]
Prompted = Annotated[
    str | None, typer.Option("--prompt", metavar="TEXT", help="Generate after this.")
]
Goes = Annotated[bool, typer.Option("--continue", help="Generate after the prefix itself.")]
Most = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate at most.")]
Target = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Keys and values, as tensors.")
]


def unpack(
    out: Output,
    file: PackedFile,
    model: ModelOption,
    where: Where,
    codec: CodecFile = None,
    prompt: Prompted = None,
    goes: Goes = False,
    max_new_tokens: Most = 200,
    output: Target = None,
) -> None:
    """Restore a packed cache: generate from it (--prompt, --continue), or write it (-o)."""
    from kvtune import packing
    from kvtune.models import facts

    if prompt is None and not goes and output is None:
        raise UsageError("Nothing is to be done.", "Give --prompt TEXT, --continue or -o FILE.")
    data = _read(file)
    told = packing.header(data)
    opened = open_model(out, model, where)
    loaded, tokenizer = opened
    read = _codec(loaded, told, codec)
    began = time.perf_counter()
    cache = packing.unpack(data, loaded, read)
    seconds = time.perf_counter() - began
    tokens = cache.get_seq_length(facts(loaded.config).compressible()[0])
    out.data |= {"model": model, "file": str(file), "tokens": tokens}
    out.data |= {"bytes": len(data), "seconds": {"decode": seconds}}
    if output is not None:
        _write(output, cache, told)
        out.data["output"] = str(output)
        out.print(f"{output} holds keys and values of {tokens:,} tokens.")
    if prompt is not None or goes:
        _generate(out, loaded, tokenizer, cache, packing.prompt(data), prompt or "", max_new_tokens)
    out.note(f"{tokens:,} tokens were restored in {seconds:.2f} s.")


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise IntegrityError(f"{path} is not a regular file.")
        return path.read_bytes()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MissingInputError(f"{path} cannot be read: {reason}.") from error


def _codec(model: Any, told: dict[str, Any], file: Path | None) -> Codec:
    from kvtune.models import fingerprint
    from kvtune.packing import shelf
    from kvtune.packing.codec import Codec

    if file is not None:
        return Codec.load(file)
    if told.get("fingerprint") != fingerprint(model):
        raise IntegrityError("The packed cache is another model's.", "Give --model, the one it is.")
    return shelf.named(model, str(told.get("codec")))


def _write(path: Path, cache: Any, told: dict[str, Any]) -> None:
    from kvtune.tensors import Artifact

    tensors = {
        f"layers.{i}.{side}": getattr(layer, side)
        for i, layer in enumerate(cache.layers)
        for side in ("keys", "values")
    }
    Artifact(tensors, {"tokens": told["tokens"], "fingerprint": told["fingerprint"]}).save(path)


def _generate(
    out: Output, model: Any, tokenizer: Any, cache: Any, ids: Any, text: str, most: int
) -> None:
    """Prints what the model says after the prefix and a text."""
    import torch

    from kvtune.models import facts
    from kvtune.placement import input_device

    if ids is None:
        raise UsageError("The packed cache has no ids, so nothing can be said after it.")
    parts = [ids]
    if text:
        more = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        parts.append(more)
    whole = torch.cat(parts)[None].to(input_device(model))
    check_length(facts(model.config), whole.shape[1], most)
    if whole.shape[1] <= cache.get_seq_length():
        what = "The cache holds its whole prefix, so nothing is left to read."
        raise UsageError(what, 'Give --prompt "TEXT".')
    made = model.generate(
        whole,
        attention_mask=torch.ones_like(whole),
        past_key_values=cache,
        max_new_tokens=most,
        do_sample=False,
        pad_token_id=0,
    )
    new = made[0, whole.shape[1] :]
    said = tokenizer.decode(new, skip_special_tokens=True)
    out.data |= {"text": said, "new_tokens": len(new)}
    out.print(said)
