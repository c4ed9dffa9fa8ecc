"""The newcomer's law: a method is one file, dropped into methods/, and nothing else is edited."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

HALVE = '''"""Halves the bytes: one scale for some channels of a token, and 8-bit whole numbers."""

from typing import Annotated

import torch
from torch import Tensor

from kvtune.parts import Code, OneOf, Quantizer, Site


class Halve(Quantizer):
    """x = code * scale with signed codes, a scale for `part` channels."""

    part: Annotated[int, OneOf((8, 16))] = 8

    @property
    def payload_bits(self) -> float:
        """A byte."""
        return 8.0

    def encode(self, x: Tensor, site: Site) -> Code:
        """Stores int8 codes and a scale in 16 bits."""
        grouped = x.float().unflatten(-1, (-1, self.part))
        scale = (grouped.abs().amax(-1, keepdim=True) / 127 + 1e-6).half()
        codes = (grouped / scale).round().clamp(-127, 127)
        return Code(codes.to(torch.int8).flatten(-2), (scale.squeeze(-1),))

    def decode(self, code: Code, site: Site) -> Tensor:
        """Returns code * scale."""
        grouped = code.body.unflatten(-1, (-1, self.part))
        return (grouped * code.side[0].float().unsqueeze(-1)).flatten(-2).to(site.dtype)
'''

FOUND = """
import kvtune, kvtune.recipe as recipes, kvtune.space as space
from kvtune import parts
from kvtune.models import Facts, LayerFacts

assert kvtune.__file__.startswith({place!r}), kvtune.__file__
assert "halve" in parts.names()
assert "halve" in str(recipes.schema())
tier = '[{{ use = "halve", part = "search" }}]'
template = recipes.loads(f'kvtune = 1\\n[[layers]]\\nspan = "all"\\nkept.keys = {{tier}}')
known = Facts("Tiny", (LayerFacts("full_attention", 2, 4, 64),), 128, 61)
chains = space.opened(template, known)[""][0].chains("keys")
print(sorted(codec.part for chain in chains for codec in chain.codecs))
try:
    parts.parse({{"use": "halv"}})
except ValueError as error:
    print(error)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package with one more method."""
    folder = tmp_path_factory.mktemp("newcomer")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "kvtune", folder / "kvtune", ignore=ignored)
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=ignored)
    methods = folder / "kvtune" / "methods"
    (methods / "halve.py").write_text(HALVE, encoding="utf-8")
    (methods / "absmax.py").write_text(readme_example(), encoding="utf-8")
    return folder


def readme_example() -> str:
    """The method that the README shows."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Add a method")[2]
    return section.partition("```python\n")[2].partition("```")[0]


def run(place: Path, *arguments: str) -> str:
    """Runs Python where the copy shadows the package."""
    path = os.pathsep.join([str(place), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=place,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_new_file_is_found_by_name_schema_and_search(place: Path) -> None:
    found = run(place, "-c", FOUND.format(place=str(place))).splitlines()
    assert found == ["[8, 16]", "There is no method 'halv'. Did you mean 'halve'?"]


def test_a_new_file_is_listed_by_the_command_line(place: Path) -> None:
    listed = run(place, "-m", "kvtune", "methods")
    assert "halve" in listed and "absmax" in listed and "affine" in listed


@pytest.mark.parametrize("method", ["halve", "absmax"])
def test_a_new_file_is_held_to_the_laws(place: Path, method: str) -> None:
    laws = str(ROOT / "tests" / "methods" / "test_laws.py")
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT)]
    output = run(place, "-m", "pytest", *settings, "-p", "no:cacheprovider", "-k", method, laws)
    assert " passed" in output and "failed" not in output
    assert int(output.rpartition(" passed")[0].split()[-1]) >= 15
