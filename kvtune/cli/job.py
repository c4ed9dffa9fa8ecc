"""A job: what a run folder was made from, kept in it, so that `search DIR` needs nothing else."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtune import shipped
from kvtune.cli.options import Text, Where
from kvtune.cli.output import Output
from kvtune.errors import IntegrityError, MissingInputError, UsageError
from kvtune.files import write_atomic

if TYPE_CHECKING:
    from kvtune.models import Facts
    from kvtune.recipe import Recipe
    from kvtune.texts import Document

FILE, TEMPLATE, FORMAT = "run.json", "template.toml", 1
USUAL_BYTES_AT = 32768


@dataclass(frozen=True)
class Job:
    """A model, how it is loaded, and the text that it is measured on."""

    model: str
    where: Where
    text: Text
    continuation: int
    seed: int

    @classmethod
    def of(cls, model: str, where: Where, text: Text, continuation: int, seed: int) -> Job:
        """The same, with paths that hold from any folder."""
        parts = [text.data] if Path(text.data).is_file() else text.data.split(",")
        data = ",".join(_absolute(part.strip()) for part in parts)
        settled = replace(text, data=data)
        return cls(_absolute(model), where, settled, continuation, seed)

    def changed(self, seed: int | None, offline: bool) -> Job:
        """The same with another seed, or with no network."""
        where = replace(self.where, offline=offline or self.where.offline)
        return replace(self, where=where, seed=self.seed if seed is None else seed)

    def save(self, folder: Path, template: Recipe) -> None:
        """Writes the job and its template into the run folder."""
        template.save(folder / TEMPLATE)
        text = json.dumps({"kvtune_run": FORMAT, **asdict(self)}, indent=1)
        write_atomic(folder / FILE, text.encode())

    @classmethod
    def load(cls, folder: Path) -> Job:
        """Reads the job of a run folder.

        Raises:
            MissingInputError: the folder holds none.
            IntegrityError: it is damaged.
        """
        file = folder / FILE
        if not file.is_file():
            hint = f"Run: kvtune calibrate MODEL -o {folder}"
            raise MissingInputError(f"{folder} is no run folder: it has no {FILE}.", hint)
        try:
            held = json.loads(file.read_text())
            if held.pop("kvtune_run") != FORMAT:
                raise ValueError("it has another format")
            held["where"], held["text"] = Where(**held["where"]), Text(**held["text"])
            return cls(**held)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hint = f"Delete it and run: kvtune calibrate MODEL -o {folder}"
            raise IntegrityError(f"{file} is damaged: {error}.", hint) from None


def _absolute(name: str) -> str:
    # these two names win over files that are called so
    there = name not in ("demo", "builtin") and Path(name).expanduser().exists()
    return str(Path(name).expanduser().resolve()) if there else name


def folder_for(output: Path | None, model: str) -> Path:
    """The run folder: as given, else named after the model."""
    from kvtune.models import label

    return output or Path(f"kvtune-{label(model).rpartition('/')[2].lower()}")


def template_of(name: str) -> Recipe:
    """Reads a template by path or shipped name."""
    from kvtune.recipe import load

    return load(shipped.find(name))


def open_model(out: Output, model: str, where: Where) -> tuple[Any, Any]:
    """Loads model and tokenizer, with the libraries as quiet as the user wants them."""
    if where.offline:
        go_offline()
    from kvtune.models import load_model

    if not out.manners.verbose:
        _hush()
    out.say(f"loading {model}", 0, 1)
    loaded = load_model(model, where.dtype, where.device, where.offline, where.device_map)
    out.say(f"loading {model}", 1, 1)
    return loaded


def go_offline() -> None:
    """Keeps the hub's library off the network; it reads this once, when it is imported."""
    os.environ["HF_HUB_OFFLINE"] = "1"


def _hush() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def read_texts(text: Text, where: Where) -> dict[str, list[Document]]:
    """Deals the text out to calibration, search and proof."""
    from kvtune.texts import read, split

    return split(read(text.data, where.offline))


def check_length(known: Facts, context: int, continuation: int) -> None:
    """Refuses more tokens than the model has positions, before any text is read for them."""
    if (wanted := context + continuation) > known.max_positions:
        what = f"{wanted:,} tokens of context and continuation exceed the model's"
        raise UsageError(f"{what} {known.max_positions:,} positions.", "Give a smaller --context.")


def bytes_context(out: Output, known: Facts, wanted: int | None) -> int:
    """The context length at which bytes are counted."""
    if wanted is None:
        return min(USUAL_BYTES_AT, known.max_positions)
    if wanted > known.max_positions:
        out.warn(
            f"Bytes are counted at {wanted:,} tokens, "
            f"beyond the model's {known.max_positions:,} positions."
        )
    return wanted
