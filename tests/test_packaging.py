"""Laws of what is shipped: the wheel and the sdist hold our packages, and nothing else's names."""

import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with an sdist of a copy of the sources, and the wheel built from that sdist."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("kvtune", "kernels", "recipes", "tests"):
        shutil.copytree(ROOT / name, copy / name, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    tuned = copy / "recipes" / "of-a-test"
    tuned.mkdir()
    for name in ("recipe.toml", "README.md", "kvtune.safetensors", "stray.py"):
        (tuned / name).write_bytes(b"")
    (copy / "recipes" / "of-a-test.toml").write_bytes(b"")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def wheel(built: Path) -> list[str]:
    """The names in the wheel."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        return archive.namelist()


def sources(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_the_wheel_installs_kvtune_and_kvtune_kernels_and_no_other_name(wheel: list[str]) -> None:
    # a top-level `kernels`, `recipes` or `tests` would shadow or break other packages
    tops = {name.partition("/")[0] for name in wheel}
    assert tops == {"kvtune", "kvtune_kernels", f"kvtune-{PROJECT['version']}.dist-info"}


def test_the_wheel_holds_every_source(wheel: list[str]) -> None:
    ours = {f"kvtune/{name}" for name in sources(ROOT / "kvtune")}
    ours |= {f"kvtune_kernels/{name}" for name in sources(ROOT / "kernels" / "kvtune_kernels")}
    assert ours == {name for name in wheel if name.endswith(".py")}


def test_the_wheel_holds_recipes_as_data_only(wheel: list[str]) -> None:
    shipped = {name for name in wheel if name.startswith("kvtune/recipes/")}
    mine = {name for name in shipped if "of-a-test" in name}
    assert mine == {
        "kvtune/recipes/of-a-test.toml",
        "kvtune/recipes/of-a-test/recipe.toml",
        "kvtune/recipes/of-a-test/README.md",
        "kvtune/recipes/of-a-test/kvtune.safetensors",
    }
    tables = {f"kvtune/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.toml")}
    assert tables <= shipped


def test_the_license_and_the_command_are_in_the_wheel(built: Path, wheel: list[str]) -> None:
    info = f"kvtune-{PROJECT['version']}.dist-info"
    with zipfile.ZipFile(next(built.glob("*.whl"))) as archive:
        license_ = archive.read(f"{info}/licenses/LICENSE")
        metadata = archive.read(f"{info}/METADATA").decode()
        commands = archive.read(f"{info}/entry_points.txt").decode()
    assert license_ == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in metadata
    assert "kvtune = kvtune.cli:main" in commands


def test_the_sdist_holds_all_that_the_wheel_is_built_from(built: Path) -> None:
    with tarfile.open(next(built.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"LICENSE", "README.md", "pyproject.toml"} <= names
    assert {f"kvtune/{name}" for name in sources(ROOT / "kvtune")} <= names
    assert "recipes/of-a-test/recipe.toml" in names
    assert "kernels/__init__.py" not in names


def name_of(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement, maxsplit=1)[0].lower()


def test_the_constraints_pin_every_direct_dependency_but_triton() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", pin) for pin in pins)
    wanted = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["dev"]]
    assert {name_of(pin) for pin in pins} == {name_of(one) for one in wanted} - {"triton"}
    assert "torch==2.13.0" in pins


def test_only_linux_asks_for_triton() -> None:
    (triton,) = (one for one in PROJECT["dependencies"] if name_of(one) == "triton")
    assert triton.replace(" ", "") == "triton;platform_system=='Linux'"
