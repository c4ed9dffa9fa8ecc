"""The promise that a hostile recipe is only data: 10,000 mutations are read under watch."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILES = 10_000
READER = Path(__file__).with_name("recipe_reader.py")
HEADED = b"""kvtune = 1
[model]
name = "somebody/tiny"
fingerprint = "sha256:%s"
architecture = "LlamaForCausalLM"
layers = 4
kv_heads = 4
head_dim = 64
[artifact]
file = "kvtune.safetensors"
sha256 = "%s"
[[layers]]
span = "first 2"
sinks = 4
recent = 64
kept.keys = [{ use = "affine", bits = 4, group = 32, axis = "channel" }]
[[layers.heads]]
span = "0, 2"
kept.keys = [{ use = "derope" }, { use = "affine", bits = 2 }]
kept.values = [{ use = "hadamard" }, { use = "affine", bits = 2, group = "head" }]
[[layers]]
span = "rest"
sinks = [0, 4]
recent = "search"
heads = "search"
kept.values = [{ use = "hadamard", optional = true }, { use = "affine", bits = "search" }]
[measured]
kl = 0.01
""" % (b"0" * 64, b"0" * 64)
SELECTING = b"""kvtune = 1
[[layers]]
span = "first 2"
recent = 64
select = { use = "attention", share = 0.2 }
rest = "drop"
[[layers]]
span = "rest"
sinks = 4
kept.keys = [{ use = "affine", bits = 8, group = "head" }]
[layers.select]
use = "attention"
share = 0.25
[layers.rest]
keys = [{ use = "hadamard" }, { use = "affine", bits = 2 }]
values = [{ use = "affine", bits = 2, group = 32 }]
"""
VALUES = (
    *(b"nan", b"inf", b"-inf", b"-1", b"0", b"1e999", b"9" * 30, b"9" * 5000, b"0x7fffffff"),
    *(b"1979-05-27T07:32:00Z", b"true", b"[]", b"{}", b'""', b'"search"', b'["search"]', b"[4, 4]"),
    *(b"[" + b"1, " * 40 + b"1]", b"[1" + b"0" * 20 + b"]", b'{ use = "affine" }', b"'''a'''"),
    *(b'"../../etc/passwd"', b'"/etc/passwd"', b'"os.system"', b'"__init__"', b'"..affine"'),
    *(b'"affine\\u0000"', b'"%s"' % (b"x" * 3000), b'"0-99999"', b'"first 99999"', b'"\xff\xfe"'),
    *(b"[" * 60 + b"]" * 60, b"[" * 3000 + b"]" * 3000, b"{ a = " * 40 + b"1" + b" }" * 40),
)
LINES = (
    *(b"heads = 3", b'heads = "all"', b"heads = [1, 2]", b"[[layers.heads]]", b"[layers.heads]"),
    *(b"[[layers.heads]]\nspan = '0'\n" * 50, b"[[layers]]\nspan = 'all'", b"[__class__]"),
    *(b"sinks = [0, 4, 16]", b"recent = [64, 128]", b"optional = true", b"a.b.c.d.e = 1"),
    *(b"kept.keys = [{ use = 'affine', optional = 'search' }]", b"[measured.x.y.z]", b"\x00"),
    b"kept = { keys = [{ use = 'hadamard', optional = false }] }",
    *(b"rest = { keys = 3 }", b"select = { use = 'affine' }", b"rest = [1]", b"select = [[]]"),
    *(b"select = { use = 'attention', share = 'search' }", b"[layers.rest.rest]", b"rest = nan"),
)

Draw = random.Random
Mutation = Callable[[bytes, Draw], bytes]


def flipped(text: bytes, draw: Draw) -> bytes:
    """Some bytes are others."""
    changed = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        changed[draw.randrange(len(changed))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(text: bytes, draw: Draw) -> bytes:
    """A piece is missing."""
    start = draw.randrange(len(text))
    return text[:start] + text[start + draw.randint(1, len(text)) :]


def doubled(text: bytes, draw: Draw) -> bytes:
    """A line, or several, stand again somewhere else."""
    lines = text.splitlines()
    start, place = draw.randrange(len(lines)), draw.randrange(len(lines))
    lines[place:place] = lines[start : start + draw.randint(1, 6)] * draw.choice((1, 1, 2, 20))
    return b"\n".join(lines)


def revalued(text: bytes, draw: Draw) -> bytes:
    """A value is another one, mostly of another type."""
    found = draw.choice(list(re.finditer(rb"= ?([^,}\n\]]+)", text)))
    return text[: found.start(1)] + draw.choice(VALUES) + text[found.end(1) :]


def renamed(text: bytes, draw: Draw) -> bytes:
    """A word is another word of the file."""
    words = list(re.finditer(rb"[A-Za-z_]+", text))
    one, two = draw.choice(words), draw.choice(words)
    return text[: one.start()] + two[0] + text[one.end() :]


def added(text: bytes, draw: Draw) -> bytes:
    """A line is new."""
    lines = text.splitlines()
    lines.insert(draw.randint(1, len(lines)), draw.choice(LINES))
    return b"\n".join(lines)


MUTATIONS: tuple[Mutation, ...] = (flipped, cut, doubled, revalued, renamed, added)


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, shipped: dict[str, Path]) -> dict[str, Any]:
    """What reading all mutations did."""
    place = tmp_path_factory.mktemp("hostile")
    seeds = [path.read_bytes() for path in shipped.values()]
    # a recipe is not larger for having many layers: its first ones stand for the rest
    sources = [*(seed if len(seed) < 3000 else seed[:3000] for seed in seeds), HEADED, HEADED]
    sources += [SELECTING, SELECTING]
    draw, files = random.Random(7), []
    for index in range(FILES):
        text = draw.choice(sources)
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            text = draw.choice(MUTATIONS)(text, draw) or b"\n"
            if not re.search(rb"= ?[^,}\n\]]+", text) or not re.search(rb"[A-Za-z_]", text):
                break
        files.append(place / f"{index}.toml")
        files[-1].write_bytes(text)
    sample = place / "headed.toml"
    sample.write_bytes(HEADED)
    lists = place / "files", place / "samples"
    for name, paths in zip(lists, (files, [sample, *shipped.values()]), strict=True):
        name.write_text("\n".join(map(str, paths)), encoding="utf-8")
    command = [sys.executable, str(READER), *map(str, lists)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_every_hostile_recipe_is_read_or_refused_in_words(watched: dict[str, Any]) -> None:
    told = watched["told"]
    assert set(told) == {"read", "refused"}, told
    assert sum(told.values()) == FILES
    assert min(told.values()) > FILES // 50, "else the mutations are all too mild, or too wild"


def test_reading_a_hostile_recipe_runs_and_opens_nothing_else(watched: dict[str, Any]) -> None:
    assert watched["seen"] == {}


def test_no_hostile_recipe_takes_much_time_or_memory(watched: dict[str, Any]) -> None:
    assert watched["slowest"] < 5, "seconds of processor time for a file of a few kilobytes"
    assert watched["added_kib"] < 200 << 10
