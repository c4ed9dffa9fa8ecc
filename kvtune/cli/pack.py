"""kvtune pack: the cache of a prompt as a small file."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvtune.cli import amounts
from kvtune.cli.amounts import size
from kvtune.cli.job import check_length, open_model
from kvtune.cli.options import Continuation, Model, Where
from kvtune.cli.output import Output
from kvtune.errors import MissingInputError, UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from kvtune.packing.codec import Codec

TEXT, CODEC, SETTING = "Text", "Codec", "Setting"


@dataclass(frozen=True)
class CodecOptions:
    """What a cache is coded with."""

    codec: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=CODEC, help="A codec; else made once, kept."),
    ] = None
    data: Annotated[
        str, typer.Option(metavar="TEXT", rich_help_panel=CODEC, help="What a codec is made of.")
    ] = "builtin"
    sequences: Annotated[
        int, typer.Option(min=1, rich_help_panel=CODEC, help="Sequences cut out of that text.")
    ] = 16
    context: Annotated[
        int,
        typer.Option(
            parser=amounts.tokens, metavar="TOKENS", rich_help_panel=CODEC, help="Tokens of each."
        ),
    ] = 2048

    def open(self, out: Output, opened: tuple[Any, Any], offline: bool) -> Codec:
        """The codec of a file, or that of the model and the text, made where there is none."""
        from kvtune.bank import Sizes
        from kvtune.models import facts
        from kvtune.packing import shelf
        from kvtune.packing.codec import Codec
        from kvtune.packing.fitting import SIZES
        from kvtune.texts import read, split

        if self.codec is not None:
            return Codec.load(self.codec)
        sizes = Sizes(self.sequences, self.context, SIZES.continuation)
        check_length(facts(opened[0].config), sizes.context, sizes.continuation)
        documents = split(read(self.data, offline))["calibrate"]
        codec, path = shelf.fitted(*opened, documents, sizes, out.say)
        out.data["codec_file"] = str(path)
        return codec


@dataclass(frozen=True)
class Setting:
    """How many bytes a cache may take."""

    step: Annotated[
        float | None,
        typer.Option(min=0, rich_help_panel=SETTING, help="Of all components; 2e-4."),
    ] = None
    bits: Annotated[
        float | None, typer.Option(min=0, rich_help_panel=SETTING, help="True bits a value.")
    ] = None
    ratio: Annotated[
        float | None, typer.Option(min=1, rich_help_panel=SETTING, help="Times below 16 bits.")
    ] = None
    coding: Annotated[
        str, typer.Option(rich_help_panel=SETTING, help="entropy, or kvtc as published.")
    ] = "entropy"

    def words(self) -> dict[str, Any]:
        """The arguments of `packing.pack`; UsageError for more than one size."""
        given = [name for name in ("step", "bits", "ratio") if getattr(self, name) is not None]
        if len(given) > 1:
            what = f"--{given[0]} and --{given[1]} both say how small the file is."
            raise UsageError(what, "Leave one of them out.")
        found: dict[str, Any] = {"coding": self.coding}
        if self.step is not None:
            found["step"] = self.step
        bits = 16 / self.ratio if self.ratio else self.bits
        return found if bits is None else {**found, "bits": bits}


PromptFile = Annotated[Path, typer.Argument(metavar="PROMPT_FILE", help="A text in UTF-8.")]
Target = Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The packed cache.")]
Check = Annotated[bool, typer.Option("--check", help="Unpack it, and measure what it costs.")]


def pack(
    out: Output,
    model: Model,
    prompt_file: PromptFile,
    where: Where,
    codecs: CodecOptions,
    setting: Setting,
    output: Target = Path("prefix.kvpack"),
    check: Check = False,
    continuation: Continuation = 64,
) -> None:
    """Run a prompt and write its KV cache as a small file, for kvtune unpack.

    The codec is made once for a model (minutes) and kept in the user's cache folder.
    """
    from kvtune import packing
    from kvtune.files import write_atomic
    from kvtune.models import facts
    from kvtune.packing.whole import values

    words, text = setting.words(), _read(prompt_file)
    opened = open_model(out, model, where)
    loaded, tokenizer = opened
    ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    known = facts(loaded.config)
    if ids.shape[1] < 2:
        raise UsageError(f"{prompt_file} has {ids.shape[1]} tokens; a cache takes two or more.")
    check_length(known, ids.shape[1], continuation if check else 0)
    codec = codecs.open(out, opened, where.offline)
    began = time.perf_counter()
    cache = _prefilled(loaded, ids, out)
    middle = time.perf_counter()
    data = packing.pack(cache, loaded, codec, tokens=ids[0], **words)
    done = time.perf_counter()
    write_atomic(output, data)
    tokens = ids.shape[1] - 1
    dense = 2 * values(known, tokens)
    out.data |= {
        "model": model,
        "file": str(output),
        "tokens": tokens,
        "bytes": len(data),
        "dense_bytes": dense,
        "ratio": dense / len(data),
        "bits": 16 * len(data) / dense,
        "codec": codec.digest,
        "codec_bytes": codec.nbytes,
        "seconds": {"prefill": middle - began, "encode": done - middle},
        "next": f"kvtune unpack {output} --model {model} --continue",
    }
    lines = f"{output} holds the cache of {tokens:,} tokens in {size(len(data))}, "
    lines += f"{dense / len(data):.1f}x below 16 bits ({done - middle:.2f} s; "
    lines += f"prefill {middle - began:.2f} s)."
    if check:
        found = _checked(loaded, ids, cache, data, codec, continuation)
        out.data["check"] = found
        lines += f"\nKL {found['kl']:.4f} nats over {found['positions']} tokens that the dense "
        lines += f"model says, {found['flips']:.1%} flips; unpacked in {found['decode']:.2f} s."
    out.print(f"{lines} Next:\n\n  {out.data['next']}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: byte {error.start} is wrong.") from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MissingInputError(f"{path} cannot be read: {reason}.") from error


def _prefilled(model: Any, ids: Tensor, out: Output) -> Any:
    """The cache of all ids [1, T + 1] but the last, which generation goes on from."""
    import torch
    from transformers import DynamicCache

    from kvtune.placement import input_device

    out.say("prefill", 0, 1)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1].to(input_device(model)), past_key_values=cache, logits_to_keep=1)
    out.say("prefill", 1, 1)
    return cache


def _checked(
    model: Any, ids: Tensor, cache: Any, data: bytes, codec: Codec, count: int
) -> dict[str, Any]:
    """What the dense model says next, said again from the unpacked cache."""
    import torch

    from kvtune.measure import compare
    from kvtune.packing import unpack
    from kvtune.placement import input_device

    began = time.perf_counter()
    other = unpack(data, model, codec)
    seconds = time.perf_counter() - began
    prompt = ids.to(input_device(model))
    said = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        past_key_values=copy.deepcopy(cache),
        max_new_tokens=count,
        do_sample=False,
        pad_token_id=0,
    )[:, ids.shape[1] - 1 :]
    with torch.no_grad():
        dense, coded = (
            model(said[:, :-1], past_key_values=own).logits.float() for own in (cache, other)
        )
    means = compare(dense.log_softmax(-1), coded, said[:, 1:]).means()
    return {**means, "positions": said.shape[1] - 1, "decode": seconds}
