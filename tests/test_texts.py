"""Laws of kvtune/texts.py: every source reads the same each time, and no role sees another's."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvtune import texts
from kvtune.errors import KvtuneError, MissingInputError, UsageError
from kvtune.texts import Document

# prepares a dataset in the cache as a fetch from the hub would, then reads it with no network
OFFLINE = """
import datasets, json, sys
from kvtune import texts
from kvtune.errors import MissingInputError

class Pets(datasets.GeneratorBasedBuilder):
    def _info(self):
        return datasets.DatasetInfo(features=datasets.Features(text=datasets.Value("string")))

    def _split_generators(self, manager):
        return [datasets.SplitGenerator(name="train")]

    def _generate_examples(self):
        yield 0, {"text": "cat"}
        yield 1, {"text": "dog"}

def guard(event, args):
    if event in ("socket.connect", "socket.getaddrinfo"):
        raise SystemExit(f"the network was asked: {event} {args}")

sys.addaudithook(guard)
for repo in ("owner/pets", "alone"):
    name = repo.rpartition("/")[2]
    Pets(dataset_name=name, repo_id=repo, config_name="default", hash="a").download_and_prepare()
told = []
for spec in sys.argv[1:]:
    try:
        told.append(texts.read(spec, offline=True))
    except MissingInputError as error:
        told.append(str(error))
print(json.dumps(told))
"""


class Characters:
    """A tokenizer with one token for each character."""

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        assert not add_special_tokens
        return {"input_ids": [[ord(letter) for letter in one] for one in text]}


def made(count: int, length: int = 10) -> list[Document]:
    return [Document(f"d{number}", f"{number:0{length}}") for number in range(count)]


def lines(path: Path, *records: object) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    return path


def test_the_built_in_text_is_pythons_own_reference_in_order() -> None:
    documents = texts.read("builtin")
    names = [document.name for document in documents]
    assert len(names) > 50 and names == sorted(names)
    assert sum(len(document.text) for document in documents) > 300_000
    assert texts.digest(documents) == texts.digest(texts.read("builtin", offline=True))


def test_a_text_file_is_cut_at_blank_lines_and_loses_nothing(tmp_path: Path) -> None:
    paragraphs = [f"{number} " * (40 * number) for number in range(1, 30)]
    text = "\n\n".join(paragraphs)
    (tmp_path / "a.md").write_text(text, encoding="utf-8")
    documents = texts.read(str(tmp_path / "a.md"))
    assert "\n\n".join(document.text for document in documents) == text
    assert len(documents) > 5
    assert all(len(document.text) >= texts.DOCUMENT_CHARS for document in documents)
    assert [document.name for document in documents[:2]] == ["a.md#0", "a.md#1"]


def test_a_short_text_is_one_document(tmp_path: Path) -> None:
    (tmp_path / "a,b.txt").write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo")
    assert texts.read(str(tmp_path / "a,b.txt")) == [Document("a,b.txt#0", "one\n\ntwo")]


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path: Path) -> None:
    records = {"text": "a\u2028b", "content": "x"}, {"content": "c", "prompt": "x"}, {"prompt": "p"}
    path = lines(tmp_path / "a.jsonl", *records)
    path.write_text(path.read_text().replace("\\u2028", "\u2028") + "\n\n", encoding="utf-8")
    assert texts.read(str(path)) == [
        Document("a.jsonl:1", "a\u2028b"),
        Document("a.jsonl:2", "c"),
        Document("a.jsonl:3", "p"),
    ]


@pytest.mark.parametrize("second", ['{"title": "x"}', '{"text": 3}', "[1]", "{", "[" * 100_000])
def test_a_wrong_line_is_named_by_file_and_number(tmp_path: Path, second: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + second, encoding="utf-8")
    with pytest.raises(UsageError, match=re.escape(f"{path}:2 ")):
        texts.read(str(path))


def test_sources_are_joined_by_commas_in_their_order(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("b")
    path = lines(tmp_path / "a.jsonl", {"text": "a"})
    names = [document.name for document in texts.read(f"{tmp_path}/b.txt, {path},builtin")]
    assert names[:2] == ["b.txt#0", "a.jsonl:1"] and len(names) > 50


@pytest.mark.parametrize("spec", ["", "bultin", "none.txt", "builtin,", "hf:", "hf:a:b:c:d", "."])
def test_a_source_that_is_not_there_is_a_missing_input_with_a_hint(spec: str) -> None:
    with pytest.raises(MissingInputError) as caught:
        texts.read(spec)
    assert "builtin" in caught.value.hint


def test_a_file_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" \n\n ")
    with pytest.raises(MissingInputError, match="holds no text"):
        texts.read(str(tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    with pytest.raises(UsageError, match=r"byte 3"):
        texts.read(str(tmp_path / "a.txt"))


class Rows:
    """What `datasets` gives back, as far as we read it."""

    def __init__(self, columns: dict[str, list[object]]) -> None:
        self.columns = columns
        self.column_names = list(columns)

    def select_columns(self, names: list[str]) -> "Rows":
        return Rows({name: self.columns[name] for name in names})

    def __getitem__(self, name: str) -> list[object]:
        return self.columns[name]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What the hub was asked for; it has the data set `o/d` with `text`, and `n` config `c`."""
    datasets = pytest.importorskip("datasets")
    calls: list[tuple[object, ...]] = []

    def load(name: str, config: str | None, *, split: str) -> Rows:
        calls.append((name, config, split))
        if (name, config) not in (("o/d", None), ("n", "c"), ("o/d", "c")):
            raise datasets.exceptions.DatasetNotFoundError(f"no {name}")
        return Rows({"text": ["one", "two"], "body": ["x", None]})

    monkeypatch.setattr(datasets, "load_dataset", load)
    return calls


@pytest.mark.parametrize(
    ("spec", "calls"),
    [
        ("hf:o/d", [("o/d", None, "train")]),
        ("hf:o/d:test", [("o/d", None, "test")]),
        ("hf:o/d/c:train[:10%]:text", [("o/d", "c", "train[:10%]")]),
        ("hf:n/c", [("n/c", None, "train"), ("n", "c", "train")]),
    ],
)
def test_a_hub_name_is_read_as_owner_first_then_as_configuration(
    asked: list[tuple[object, ...]], spec: str, calls: list[tuple[object, ...]]
) -> None:
    assert [document.text for document in texts.read(spec)] == ["one", "two"]
    assert asked == calls


@pytest.mark.parametrize(
    ("spec", "error", "words"),
    [
        ("hf:o/none", MissingInputError, "no o/none / no o"),
        ("hf:o/d::title", UsageError, "no field 'title'. It has: text, body"),
        ("hf:o/d::body", UsageError, "row 1: the field 'body' is not a text"),
    ],
)
def test_what_the_hub_lacks_is_said(
    asked: list[tuple[object, ...]], spec: str, error: type[KvtuneError], words: str
) -> None:
    with pytest.raises(error, match=re.escape(words)):
        texts.read(spec)


def test_offline_reads_the_local_cache_and_never_the_network(tmp_path: Path) -> None:
    specs = ["hf:owner/pets", "hf:alone:train[1:]", "hf:owner/none", "hf:owner/pets:test"]
    told = subprocess.run(
        [sys.executable, "-c", OFFLINE, *specs],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    pets, alone, none, split = json.loads(told.stdout)
    assert pets == [["owner/pets:train:0", "cat"], ["owner/pets:train:1", "dog"]]
    assert [text for _, text in alone] == ["dog"]
    assert "cannot be fetched offline" in none and "--offline" in none
    assert "cannot be fetched offline" in split


def environment(home: Path) -> dict[str, str]:
    # a cache of its own, and nothing that would already keep `datasets` off the network
    own = {"HF_HOME": str(home / "hf"), "HF_DATASETS_CACHE": str(home / "hf" / "datasets")}
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return {**kept, **own}


def test_every_document_goes_to_exactly_one_role_and_all_get_a_like_share() -> None:
    documents = texts.read("builtin")
    dealt = texts.split(documents)
    assert list(dealt) == ["calibrate", "search", "proof"]
    together = [document for role in dealt.values() for document in role]
    assert {document.text for document in together} == {document.text for document in documents}
    assert len({document.text for document in together}) == len(together)
    sizes = [sum(len(document.text) for document in role) for role in dealt.values()]
    assert max(sizes) - min(sizes) <= max(len(document.text) for document in documents)
    assert dealt == texts.split(documents)


def test_a_document_goes_to_the_role_with_the_least_text_and_ties_to_the_first() -> None:
    documents = [
        Document(letter, letter * size) for letter, size in zip("abcd", (9, 2, 3, 1), strict=True)
    ]
    dealt = texts.split([*documents, Document("again", "a" * 9)], ("x", "y"))
    assert {role: "".join(one.name for one in got) for role, got in dealt.items()} == {
        "x": "a",
        "y": "bcd",
    }


def test_the_digest_changes_with_any_name_text_or_order() -> None:
    documents = made(3)
    others = [
        documents[:2],
        documents[::-1],
        [*documents[:2], documents[2]._replace(name="d")],
        [*documents[:2], documents[2]._replace(text="d")],
        [Document("d0", documents[0].text + documents[1].name), *documents[2:]],
        [],
    ]
    digests = {texts.digest(one) for one in [documents, *others]}
    assert len(digests) == 7
    assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", one) for one in digests)
    assert texts.digest([Document("a", "\ud800")])


@pytest.mark.parametrize(("count", "length"), [(1, 118), (1, 5), (2, 59), (7, 16), (118, 1)])
def test_sequences_are_spread_evenly_and_never_overlap(count: int, length: int) -> None:
    documents = made(10)
    stream = "\n\n".join(document.text for document in documents)
    numbered = [Document("all", "".join(chr(place) for place in range(len(stream))))]
    starts = texts.sequences(numbered, Characters(), count, length, "search")[:, 0]
    gaps = starts.diff()
    assert starts[0] == 0 and (gaps >= length).all()
    assert not len(gaps) or int(gaps.max() - gaps.min()) <= 1
    cut = texts.sequences(documents, Characters(), count, length, "search")
    assert cut.shape == (count, length) and cut.dtype == torch.int64
    for row, start in zip(cut, starts, strict=True):
        assert "".join(map(chr, row.tolist())) == stream[start : start + length]


def test_too_little_text_says_how_much_there_is_and_the_cure() -> None:
    words = r"text for proof has 34 tokens, but 5 sequences of 7 need 35"
    with pytest.raises(MissingInputError, match=words) as caught:
        texts.sequences(made(3), Characters(), 5, 7, "proof")
    for cure in ("--data", "--sequences", "--context"):
        assert cure in caught.value.hint
    with pytest.raises(MissingInputError, match="has 0 tokens"):
        texts.sequences([], Characters(), 1, 1, "proof")
    with pytest.raises(UsageError):
        texts.sequences(made(3), Characters(), 0, 7, "proof")


def test_a_tokenizer_of_transformers_fits() -> None:
    documents = [Document("a", "one two"), Document("b", "two two")]
    assert texts.sequences(documents, word_tokenizer(), 1, 4, "proof").tolist() == [[1, 2, 2, 2]]


def word_tokenizer() -> texts.Tokenizer:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    plain = Tokenizer(models.WordLevel({"<s>": 0, "one": 1, "two": 2}, unk_token="<s>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # a special token that must not appear among the documents
    plain.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    build: Callable[..., texts.Tokenizer] = PreTrainedTokenizerFast
    return build(tokenizer_object=plain)
