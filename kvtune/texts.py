"""Where calibration, search and held-out text comes from: built in, files, or `datasets`."""

import json
import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from kvtune.errors import MissingInputError, UsageError
from kvtune.files import canonical_json, sha256_bytes

if TYPE_CHECKING:
    import datasets

ROLES = ("calibrate", "search", "proof")
DOCUMENT_CHARS = 2000
SEPARATOR = "\n\n"

_FIELDS = ("text", "content", "prompt")
_LINES = frozenset({".jsonl", ".ndjson"})
_FORMS = "--data takes builtin, text or JSONL files, or hf:NAME[/CONFIG][:SPLIT][:FIELD]."


class Document(NamedTuple):
    """One text and the name that its place in the source gives it."""

    name: str
    text: str


class Tokenizer(Protocol):
    """What we ask of a transformers tokenizer: a list of token ids for each text."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, Sequence[Sequence[int]]]: ...


def read(spec: str, offline: bool = False) -> list[Document]:
    """Reads the documents that a `--data` value names.

    Args:
        spec: `builtin`, a text or JSONL file, `hf:NAME[/CONFIG][:SPLIT][:FIELD]`, or several of
            them with commas between.
        offline: take `hf:` data from the local cache only, with no network.

    Raises:
        MissingInputError: the source is not there, holds no text, or cannot be fetched.
        UsageError: a line of a JSONL file, or a field of a dataset, is not a text.
    """
    parts = [spec] if Path(spec).is_file() else spec.split(",")
    documents = [document for part in parts for document in _source(part.strip(), offline)]
    if not any(document.text.strip() for document in documents):
        raise MissingInputError(f"{spec} holds no text.", _FORMS)
    return documents


def _source(part: str, offline: bool) -> list[Document]:
    if part == "builtin":
        return _builtin()
    if part.startswith("hf:"):
        return _hub(part.removeprefix("hf:"), offline)
    path = Path(part).expanduser()
    if not part or not path.is_file():
        what = "is a folder" if path.is_dir() and part else "is not there"
        raise MissingInputError(f"The text {part!r} {what}.", _FORMS)
    return _lines(path) if path.suffix.lower() in _LINES else _prose(path)


def _builtin() -> list[Document]:
    """Returns the language reference that every CPython ships, one document per topic."""
    from pydoc_data.topics import topics

    return [Document(name, topics[name]) for name in sorted(topics)]


def _decoded(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{path} is not UTF-8 text: byte {error.start} is wrong.", "Convert it to UTF-8."
        ) from error
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise MissingInputError(f"{path} cannot be read: {reason}.") from error


def _prose(path: Path) -> list[Document]:
    """Cuts a text at blank lines into documents of at least DOCUMENT_CHARS characters."""
    texts, held = list[str](), list[str]()
    for paragraph in re.split(r"\n[ \t]*\n", _decoded(path)):
        held.append(paragraph)
        if sum(map(len, held)) >= DOCUMENT_CHARS:
            texts.append(SEPARATOR.join(held))
            held = []
    rest = SEPARATOR.join(held)
    if rest.strip():
        # too short to stand alone, unless it is all there is
        texts[-1:] = [SEPARATOR.join([*texts[-1:], rest])]
    return [Document(f"{path.name}#{number}", text) for number, text in enumerate(texts)]


def _lines(path: Path) -> list[Document]:
    """Reads one document from each line of a JSONL file that is not blank."""
    # not `splitlines`: JSON strings may hold other line breaks than \n unescaped
    lines = enumerate(_decoded(path).split("\n"), start=1)
    return [
        Document(f"{path.name}:{number}", _record(f"{path}:{number}", line))
        for number, line in lines
        if line.strip()
    ]


def _record(where: str, line: str) -> str:
    try:
        record: object = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}") from error
    if isinstance(record, dict):
        name = next((name for name in _FIELDS if name in record), "")
        if name and isinstance(text := record[name], str):
            return text
    raise UsageError(f"{where} has no text.", f"Each line needs one of: {', '.join(_FIELDS)}.")


def _hub(spec: str, offline: bool) -> list[Document]:
    """Reads NAME[/CONFIG][:SPLIT][:FIELD] through the `datasets` library."""
    # a split may be a slice such as train[:100], whose colon separates nothing
    name, *rest = re.split(r":(?![^\[]*\])", spec)
    if not name or len(rest) > 2:
        raise MissingInputError(f"'hf:{spec}' names no dataset.", _FORMS)
    share, column = (given or usual for given, usual in zip_longest(rest, ("train", "text")))
    rows = _rows(name, share, offline)
    if column not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UsageError(f"hf:{name} has no field {column!r}.", f"It has: {columns}.")
    texts = rows.select_columns([column])[column]
    return [
        Document(f"{name}:{share}:{row}", _text(f"hf:{name} row {row}", column, text))
        for row, text in enumerate(texts)
    ]


def _text(where: str, column: str, value: object) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{where}: the field {column!r} is not a text.")
    return value


def _rows(name: str, split: str, offline: bool) -> "datasets.Dataset":
    """Tries each reading of NAME[/CONFIG] in turn."""
    from datasets.exceptions import DatasetsError

    reasons = []
    for dataset, config in _readings(name):
        try:
            load = _cached if offline else _fetched
            return load(dataset, config, split)
        except (OSError, ValueError, KeyError, RuntimeError, DatasetsError) as error:
            reasons.append(str(error).partition("\n")[0])
    why = " / ".join(dict.fromkeys(reasons))
    if offline:
        hint = "Run once without --offline, or use --data builtin or a file."
        raise MissingInputError(f"hf:{name} cannot be fetched offline: {why}.", hint)
    raise MissingInputError(f"hf:{name} cannot be read: {why}.", _FORMS)


def _readings(name: str) -> list[tuple[str, str | None]]:
    """Returns what NAME[/CONFIG] may mean, as (dataset, configuration), likeliest first."""
    match name.split("/"):
        case [first, second]:
            return [(name, None), (first, second)]
        case [owner, dataset, config]:
            return [(f"{owner}/{dataset}", config)]
    return [(name, None)]


def _fetched(dataset: str, config: str | None, split: str) -> "datasets.Dataset":
    import datasets

    return datasets.load_dataset(dataset, config, split=split)


def _cached(dataset: str, config: str | None, split: str) -> "datasets.Dataset":
    """Reads what an earlier fetch prepared; `load_dataset` itself would ask the network first."""
    from datasets.packaged_modules.cache.cache import Cache

    name = dataset.rpartition("/")[2]
    cache = Cache(
        dataset_name=name, repo_id=dataset, config_name=config, version="auto", hash="auto"
    )
    return cache.as_dataset(split=split)


def split(
    documents: Sequence[Document], roles: tuple[str, ...] = ROLES
) -> dict[str, list[Document]]:
    """Deals documents out, in order, each to the role that has the least text so far.

    A text that comes twice is dealt once, so that no role sees another's text.
    """
    dealt: dict[str, list[Document]] = {role: [] for role in roles}
    sizes = dict.fromkeys(roles, 0)
    seen = set[str]()
    for document in documents:
        if document.text in seen:
            continue
        seen.add(document.text)
        # min takes the first of equals, which is role order
        role = min(roles, key=sizes.__getitem__)
        dealt[role].append(document)
        sizes[role] += len(document.text)
    return dealt


def digest(documents: Sequence[Document]) -> str:
    """Returns `sha256:` and 64 hex digits over all names and texts, in order."""
    return f"sha256:{sha256_bytes(canonical_json([list(d) for d in documents]).encode())}"


def sequences(
    documents: Sequence[Document], tokenizer: Tokenizer, count: int, length: int, role: str
) -> torch.Tensor:
    """Cuts token sequences out of documents, evenly spread and without overlap.

    Args:
        documents: joined by blank lines into one stream.
        tokenizer: of the model; it adds no special tokens.
        count: how many sequences.
        length: tokens in each.
        role: what the text is for, named in the error.

    Returns:
        [count, length] int64.

    Raises:
        MissingInputError: the text is too short.
        UsageError: count or length is not positive.
    """
    if count < 1 or length < 1:
        raise UsageError(f"{count} sequences of {length} tokens cannot be cut.")
    stream = _stream(documents, tokenizer)
    if len(stream) < count * length:
        raise MissingInputError(
            f"The text for {role} has {len(stream)} tokens, but {count} sequences of "
            f"{length} need {count * length}.",
            "Give more text with --data, fewer --sequences or a shorter --context.",
        )
    slack = len(stream) - length
    starts = [number * slack // max(count - 1, 1) for number in range(count)]
    return torch.stack([stream[start : start + length] for start in starts])


def _stream(documents: Sequence[Document], tokenizer: Tokenizer) -> torch.Tensor:
    """Returns all tokens, [tokens] int64; each document is tokenized apart from its neighbours."""
    texts = [document.text for document in documents]
    # no text at all would break some tokenizers, so the separator goes along
    found = tokenizer([SEPARATOR, *texts], add_special_tokens=False, verbose=False)
    separator, *pieces = found["input_ids"]
    tokens = list[int]()
    for number, piece in enumerate(pieces):
        tokens.extend(separator if number else ())
        tokens.extend(piece)
    return torch.tensor(tokens, dtype=torch.int64)
