"""Laws of files that are no preset of KVTuner: refused by place and value, or only data."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from time import process_time

import pytest

from kvtune import kvtuner
from kvtune import recipe as recipes
from kvtune.errors import IntegrityError
from kvtune.kvtuner import MAX_BYTES

Write = Callable[[str | bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a preset's text; returns its file."""

    def made(text: str | bytes) -> Path:
        file = tmp_path / "m_kivi_KVTuner4_0.yaml"
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
        return file

    return made


ONE = "{ nbits_key: 4, nbits_value: 2 }"
BOMB = "a: &a {0: {nbits_key: 4, nbits_value: 2}}\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n" for i in range(20)
)
REFUSED = {
    "nothing": ("", "expected a mapping of layers, got nothing"),
    "an empty mapping": ("{}", "got an empty mapping"),
    "a list": (f"- {ONE}", "line 1: expected a mapping of layers, got a sequence"),
    "a word": ("hello", "got 'hello'"),
    "no YAML": (
        "0: {nbits_key: 4",
        "line 1, is no preset: while parsing a flow mapping, expected ',' or '}'",
    ),
    "two documents": (f"0: {ONE}\n---\n0: {ONE}", "is no preset"),
    "five bits": (f"0: {ONE}\n1: {ONE.replace('2', '5')}", "line 2: layer 1, nbits_value: 5 is"),
    "legal bits": (f"0: {ONE.replace('4', '6')}", "6 is not one of 2, 3, 4, 8, 16"),
    "no bits": (f"0: {ONE.replace('4', '')}", "layer 0, nbits_key: '' is not one of"),
    "bits as a text": (f"0: {ONE.replace('4', repr('4'))}", "nbits_key: '4' is not one of"),
    "bits as a fraction": (f"0: {ONE.replace('4', '4.0')}", "nbits_key: '4.0' is not one of"),
    "bits as a truth": (f"0: {ONE.replace('4', 'true')}", "nbits_key: 'true' is not one of"),
    "bits of base 8": (f"0: {ONE.replace('4', '010')}", "nbits_key: 010 is not one of"),
    "bits of base 60": (f"0: {ONE.replace('4', '0:4')}", "nbits_key: '?0:4'? is not one of"),
    "bits as a list": (f"0: {ONE.replace('4', '[4]')}", "nbits_key: a sequence is not one of"),
    "many digits": (f"0: {ONE.replace('4', '9' * 5000)}", r"nbits_key: '9{40}'\.\.\. is not"),
    "negative bits": (f"0: {ONE.replace('4', '-4')}", "nbits_key: -4 is not one of"),
    "a layer as a number": ("0: 4", "layer 0 is 4"),
    "an empty layer": ("0: {}", "layer 0 does not say nbits_key"),
    "no value bits": ("0: {nbits_key: 4}", "layer 0 does not say nbits_value"),
    "another key": (f"0: {ONE.replace('key', 'keys')}", "unknown key: 'nbits_keys'. Did you mean"),
    "a key too many": (
        f"0: {ONE.replace('}', ', axis: 1}')}",
        "layer 0 has an unknown key: 'axis'",
    ),
    "a key as a list": ("0: {[1]: 2}", "layer 0 has an unknown key: a sequence"),
    "a key twice": (f"0: {ONE.replace('}', ', nbits_key: 2}')}", "layer 0 says nbits_key twice"),
    "a layer twice": (f"0: {ONE}\n1: {ONE}\n0: {ONE}", "line 3: layer 0 is listed twice"),
    "a layer as number and text": (f"0: {ONE}\n'0': {ONE}", "line 2: layer 0 is listed twice"),
    "a layer is missing": (f"0: {ONE}\n2: {ONE}", "layer 1 is missing, and layer 2 is there"),
    "layers from one": (f"1: {ONE}", "layer 0 is missing, and layer 1 is there"),
    "a layer by name": (f"first: {ONE}", "'first' is not the number of a layer"),
    "a negative layer": (f"-1: {ONE}", "-1 is not the number of a layer"),
    "a layer as a list": (f"[0]: {ONE}", "a sequence is not the number of a layer"),
    "too many layers": ("".join(f"{i}: {ONE}\n" for i in range(513)), "513 layers are more"),
    "a head twice": (f"0: {{0: {ONE}, 0: {ONE}}}", "layer 0, kv head 0 is listed twice"),
    "a head is missing": (f"0: {{0: {ONE}, 2: {ONE}}}", "layer 0, kv head 1 is missing"),
    "a head by name": (f"0: {{0: {ONE}, a: {ONE}}}", "layer 0, 'a' is not the number of a kv head"),
    "five bits of a head": (
        f"0: {{0: {ONE}, 1: {ONE.replace('4', '5')}}}",
        "layer 0, kv head 1, nbits_key: 5",
    ),
    "some layers with heads": (
        f"0: {ONE}\n1: {{0: {ONE}, 1: {ONE}}}",
        "layer 1 has bits for 2, and layer 0 for 1",
    ),
    "fewer heads": (
        f"0: {{0: {ONE}, 1: {ONE}}}\n1: {{0: {ONE}}}",
        "layer 1 has bits for 1, and layer 0 for 2",
    ),
    "an alias": (f"0: &a {ONE}\n1: *a", "line 2, is no preset: it holds an alias"),
    "a bomb of aliases": (BOMB, "it holds an alias"),
    "a merge": (f"0: {{<<: {ONE}}}", "layer 0 has an unknown key: '<<'"),
    "depth": ("[" * 20000, "is no preset: it is nested too deep"),
    "a mapping as deep": ("0: {" * 20000, "it is nested too deep"),
    "a number of a directive": (
        f"%YAML {'9' * 5000}.1\n---\n0: {ONE}",
        "a number in it is out of range",
    ),
    "an escape beyond Unicode": (f'"\\UFFFFFFFF": {ONE}', "a number in it is out of range"),
    "a zero byte": (f"0: {ONE}\x00", "is no preset"),
    "not UTF-8": (b"\xff\xfe0\x00", "is not UTF-8 text"),
    "too large": (f"0: {ONE}\n{'#' * MAX_BYTES}", "larger than 131072 bytes"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_preset_is_refused_by_its_place_and_value(write: Write, what: str) -> None:
    wrong, words = REFUSED[what]
    file = write(wrong)
    with pytest.raises(IntegrityError, match=words) as caught:
        kvtuner.read(file)
    assert str(caught.value).startswith(str(file))


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.mkdir", "!!python/name:os.system", "!!int", "!mine"]
)
@pytest.mark.parametrize("place", ["0: {} [{}]", "{} {}: 4", "0: {{nbits_key: {} {}}}"])
def test_a_tag_is_only_a_word(write: Write, tmp_path: Path, tag: str, place: str) -> None:
    made = tmp_path / "made"
    with pytest.raises(IntegrityError):
        kvtuner.read(write(place.format(tag, made)))
    assert not made.exists()


SEED = f"0: {ONE}\n1: {ONE}\n2:\n  nbits_key: 8\n  nbits_value: 8\n"
PIECES = [b"", b"&a ", b"*a", *(bytes([byte]) for byte in b" 23469:!%{['}\n\xff")]


def test_a_preset_with_random_changes_is_read_or_refused_in_words(write: Write) -> None:
    draw, told = random.Random(5), {"read": 0, "refused": 0}
    for _ in range(1000):
        text = bytearray(SEED, "ascii")
        for _ in range(draw.randint(1, 2)):
            digits = [place for place, byte in enumerate(text) if chr(byte).isdigit()]
            place = draw.choice((draw.randrange(len(text)), draw.choice(digits)))
            text[place : place + draw.choice((0, 1, 1, 5))] = draw.choice(PIECES)
        try:
            made = kvtuner.read(write(bytes(text))).recipe()
        except IntegrityError:
            told["refused"] += 1
        else:
            assert recipes.loads(made.dumps()) == made
            told["read"] += 1
    assert min(told.values()) > 50, told


@pytest.mark.parametrize(
    "piece", ["[", "{a: ", "- ", "? ", "!a ", "'", "a: ", "0: 4\n", "[a, ", "#"]
)
def test_no_hostile_preset_takes_long(write: Write, piece: str) -> None:
    file = write(piece * (MAX_BYTES // len(piece)))
    begun = process_time()
    with pytest.raises(IntegrityError):
        kvtuner.read(file)
    assert process_time() - begun < 20


def test_the_largest_preset_makes_a_recipe_that_can_be_read(write: Write, tmp_path: Path) -> None:
    draw, bits = random.Random(3), (2, 3, 4, 8, 16)
    heads = [f"{{nbits_key: {keys}, nbits_value: {values}}}" for keys in bits for values in bits]
    lines: list[str] = []
    while True:  # each layer shares its heads out differently, and so takes an entry of its own
        draw.shuffle(heads)
        line = ",".join(f"{head}: {pair}" for head, pair in enumerate(heads))
        if sum(map(len, lines)) + len(line) + 100 > MAX_BYTES:
            break
        lines.append(f"{len(lines)}: {{{line}}}\n")
    made = kvtuner.read(write("".join(lines))).recipe()
    assert len(made.layers) == len(lines)
    made.save(tmp_path / "recipe.toml")
    assert recipes.load(tmp_path / "recipe.toml") == made
