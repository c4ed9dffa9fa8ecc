"""KVTuner's presets (arXiv:2502.04420): YAML of bits for each layer, or kv head, to a recipe."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import yaml

from kvtune import parts
from kvtune.chains import Chain
from kvtune.errors import IntegrityError, MissingInputError, UsageError, suggest
from kvtune.parts import SEARCH, Codec
from kvtune.policy import Policy
from kvtune.recipe import Recipe
from kvtune.space import to_recipe

MAX_BYTES = 1 << 17  # 3,000 kv heads as KVTuner writes them; their recipe can still be read
MOST = 512  # layers, and kv heads of one; no model has more
COMMAND = "kvtune recipe import kvtuner-yaml"
EXAMPLE = "A preset reads: 0: { nbits_key: 4, nbits_value: 2 }, and so on for each layer."

_FILE_NAME = re.compile(
    r"(?P<model>.+?)(?:_(?P<mode>pertoken|kivi))?_KVTuner(?P<point>[0-9]+_[0-9]+)"
)
_WHOLE = re.compile(r"0|[1-9][0-9]{0,4}")  # YAML 1.1 would read 010 as 8 and 1:30 as 90
_INT, _STR = "tag:yaml.org,2002:int", "tag:yaml.org,2002:str"


class Mode(NamedTuple):
    """How KVTuner quantises: what a preset leaves out. The parts are open in their bits."""

    keys: dict[str, Any]
    values: dict[str, Any]
    recent: int


_PER_TOKEN = {"use": "affine", "bits": SEARCH, "group": "head", "axis": "token"}
MODES = {
    "kivi": Mode(
        {"use": "affine", "bits": SEARCH, "group": 32, "axis": "channel"},
        {"use": "affine", "bits": SEARCH, "group": 32, "axis": "token"},
        recent=32,
    ),
    "pertoken": Mode(_PER_TOKEN, _PER_TOKEN, recent=0),
}


@dataclass(frozen=True)
class Preset:
    """What a preset file says, and what only its name says."""

    model: str  # a label: the file binds nothing
    mode: str
    point: str  # "4_1": the limit of mean bits, and which point of KVTuner's front; or nothing
    layers: tuple[Policy, ...]

    @property
    def payload_bits(self) -> float:
        """Mean code bits per cached value, which the paper calls equivalent bits."""
        return sum(policy.payload_bits for policy in self.layers) / len(self.layers)

    @property
    def per_head(self) -> bool:
        """True when the kv heads of some layer differ."""
        return any(policy.heads for policy in self.layers)

    def recipe(self) -> Recipe:
        """Returns the recipe, bound to no model; equal layers share one entry."""
        bits, count = f"{self.payload_bits:.2f}", len(self.layers)
        preset = f"preset {self.point}" if self.point else "preset"
        return to_recipe(
            dict(enumerate(self.layers)),
            count,
            name=f"kvtuner-{self.model.lower()}-{self.mode}-{bits}",
            description=(
                f"KVTuner's {preset} of {self.model}, mode {self.mode} (arXiv:2502.04420): "
                f"{bits} mean code bits in {count} layers, scales and zeros not counted."
            ),
        )


def read(path: Path, mode: str | None = None) -> Preset:
    """Reads a preset; <Model>_<kivi|pertoken>_KVTuner<4|6>_<0|1>.yaml tells its model and mode.

    Args:
        mode: kivi or pertoken, for a file whose name does not say it.

    Raises:
        MissingInputError: there is no such file.
        UsageError: a mode that is unknown, not told, or another than the name's.
        IntegrityError: anything that is no preset, by its line, layer and value.
    """
    if not path.is_file():
        raise MissingInputError(f"There is no preset at {path}.", f"Run: {COMMAND} FILE.yaml")
    named = _FILE_NAME.fullmatch(path.stem)
    told = _mode(path, mode, named["mode"] if named else None)
    label = re.sub(r"[^A-Za-z0-9._-]+", "-", named["model"] if named else path.stem)[:100]
    layers = _Reader(str(path), MODES[told]).layers(_text(path))
    return Preset(label, told, named["point"] if named else "", layers)


def _mode(path: Path, given: str | None, named: str | None) -> str:
    if given is not None and given not in MODES:
        raise UsageError(f"There is no mode {given!r}.", suggest(given, tuple(MODES)))
    if given and named and given != named:
        raise UsageError(
            f"{path.name} is named for mode {named}, and --mode says {given}.",
            "Leave out --mode, or rename the file when its name is wrong.",
        )
    if found := given or named:
        return found
    raise UsageError(
        f"Neither the name {path.name} nor --mode says how its bits are meant.",
        f"Run: {COMMAND} {shlex.quote(str(path))} --mode kivi, "
        "or --mode pertoken when keys are quantised per token.",
    )


def _text(path: Path) -> str:
    with path.open("rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise IntegrityError(f"{path} is larger than {MAX_BYTES} bytes, so it is no preset.")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise IntegrityError(f"{path} is not UTF-8 text, so it is no preset.") from None


class _Tree(yaml.SafeLoader):
    """Composes nodes as they are written; nothing is constructed, so tags are only words."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuses aliases: a short file of them can stand for more layers than memory holds."""
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise yaml.MarkedYAMLError(problem="it holds an alias", problem_mark=mark)
        return super().compose_node(parent, index)


class _Reader:
    """Reads the text of a preset under a mode; `where` is for errors."""

    def __init__(self, where: str, mode: Mode) -> None:
        self._where, self._recent = where, mode.recent
        # both settings of a pair, by name, and the chain that each number of bits asks for
        self._legal = {"nbits_key": _by_bits(mode.keys), "nbits_value": _by_bits(mode.values)}

    def layers(self, text: str) -> tuple[Policy, ...]:
        """The policy of each layer."""
        nodes = self._numbered(self._tree(text), "layer", "")
        layers = [self._pairs(node, f"layer {layer}") for layer, node in enumerate(nodes)]
        for layer, (node, pairs) in enumerate(zip(nodes, layers, strict=True)):
            if len(pairs) != len(layers[0]):
                self._refuse(
                    node,
                    f"layer {layer} has bits for {len(pairs)}, and layer 0 for {len(layers[0])}.",
                    "Each layer has one pair of bits, or each of its kv heads, as many in all.",
                )
        return tuple(self._policy(pairs) for pairs in layers)

    def _policy(self, pairs: Sequence[tuple[Chain, Chain]]) -> Policy:
        policy = Policy.by_head(0, self._recent, pairs)
        return Policy() if policy.is_dense else policy  # where all is exact there is no window

    def _tree(self, text: str) -> yaml.Node | None:
        try:
            return yaml.compose(text, Loader=_Tree)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            place = f", line {mark.line + 1}," if mark else ""
            told = ", ".join(filter(None, (error.context, error.problem)))
        except yaml.YAMLError as error:
            place, told = "", str(error).partition("\n")[0]
        except RecursionError:
            place, told = "", "it is nested too deep"
        except (ValueError, OverflowError):  # of directives and escapes: yaml does not bound them
            place, told = "", "a number in it is out of range"
        raise IntegrityError(f"{self._where}{place} is no preset: {told}.", EXAMPLE)

    def _pairs(self, node: yaml.Node, place: str) -> list[tuple[Chain, Chain]]:
        """Keys and values of a layer: one pair, or one for each kv head."""
        first = node.value[0][0] if isinstance(node, yaml.MappingNode) and node.value else None
        if first is None or _whole(first) is None:
            return [self._pair(node, place)]
        heads = self._numbered(node, "kv head", f"{place}, ")
        return [self._pair(one, f"{place}, kv head {head}") for head, one in enumerate(heads)]

    def _pair(self, node: yaml.Node, place: str) -> tuple[Chain, Chain]:
        """The chains that `{ nbits_key: 4, nbits_value: 2 }` asks for."""
        if not isinstance(node, yaml.MappingNode):
            self._refuse(node, f"{place} is {_shown(node)}.", EXAMPLE)
        found: dict[str, Chain] = {}
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else ""
            if name not in self._legal:
                hint = suggest(name, tuple(self._legal))
                self._refuse(key, f"{place} has an unknown key: {_shown(key)}.", hint)
            if name in found:
                self._refuse(key, f"{place} says {name} twice.", "Leave one of them.")
            found[name] = self._chain(value, self._legal[name], f"{place}, {name}")
        for name in self._legal:
            if name not in found:
                self._refuse(node, f"{place} does not say {name}.", EXAMPLE)
        keys, values = (found[name] for name in self._legal)
        return keys, values

    def _chain(self, node: yaml.Node, legal: dict[int, Chain], place: str) -> Chain:
        bits = _whole(node) if node.tag == _INT else None
        if bits is None or bits not in legal:
            known = ", ".join(str(one) for one in sorted(legal))
            told = f"{place}: {_shown(node)} is not one of {known}."
            self._refuse(node, told, "16 leaves a side as it is.")
        return legal[bits]

    def _numbered(self, node: yaml.Node | None, what: str, place: str) -> list[yaml.Node]:
        """The entries of a mapping whose keys are 0 to n - 1, each once, in order."""
        if not isinstance(node, yaml.MappingNode) or not node.value:
            told = f"{place}expected a mapping of {what}s, got {_shown(node)}."
            self._refuse(node, told, EXAMPLE)
        found: dict[int, yaml.Node] = {}
        for key, value in node.value:
            if (number := _whole(key)) is None:
                told = f"{place}{_shown(key)} is not the number of a {what}."
                self._refuse(key, told, EXAMPLE)
            if number in found:
                self._refuse(key, f"{place}{what} {number} is listed twice.", "Leave one of them.")
            found[number] = value
        if len(found) > MOST:
            self._refuse(node, f"{place}{len(found)} {what}s are more than {MOST}.", EXAMPLE)
        for number in range(len(found)):
            if number not in found:
                told = f"{what} {number} is missing, and {what} {max(found)} is there."
                self._refuse(node, f"{place}{told}", "Layers and heads are counted from 0.")
        return [found[number] for number in range(len(found))]

    def _refuse(self, node: yaml.Node | None, told: str, hint: str) -> NoReturn:
        line = f", line {node.start_mark.line + 1}" if node else ""
        raise IntegrityError(f"{self._where}{line}: {told}", hint)


def _by_bits(table: dict[str, Any]) -> dict[int, Chain]:
    found = [Chain((part,)) for part in parts.choices(table) if isinstance(part, Codec)]
    return {int(chain.payload_bits): chain for chain in (*found, Chain())}


def _whole(node: yaml.Node) -> int | None:
    """The number that a scalar spells, as a number or a text."""
    plain = isinstance(node, yaml.ScalarNode) and node.tag in (_INT, _STR)
    return int(node.value) if plain and _WHOLE.fullmatch(node.value) else None


def _shown(node: yaml.Node | None) -> str:
    if node is None:
        return "nothing"
    if not isinstance(node, yaml.ScalarNode):
        return f"{'a' if node.value else 'an empty'} {node.id}"
    if len(node.value) > 40:
        return f"{node.value[:40]!r}..."
    return str(node.value) if node.tag == _INT else repr(node.value)
