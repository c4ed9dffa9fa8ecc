"""Laws of the house: floors, lean imports, one Part per file, and no kernels/__init__.py."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kvtune"
KERNELS = ROOT / "kernels" / "kvtune_kernels"
LONGEST = 350

# bottom up; an import goes strictly down, so modules that share a line do not know each other
FLOORS = (
    "beside errors haystack ladders owners halving shares splits subspace",
    "allotting discovery files goal knapsack marks orthogonal placement rope seen spans spectral",
    "bench.cases bench.clock gains",
    "report.markup report.numbers report.records",
    "lowrank view",
    "bench.basis demo metrics parts runs sampling shipped storage task tensors texts bench.store",
    "chains intervals leases levels models planes shortening",
    "pooling reading retention table turning turns routing",
    "bench.kernels",
    "entries pages selection bench.latents bench.ragged",
    "policy",
    "spots",
    "allotted sharing",
    "attention bonds fitted folded recipe workers methods.* tasks.* bench.latency",
    "commons fused fused_pages held rows space bench.applied bench.ranks watched",
    "tiers drafting replay retrieval",
    "in_cache",
    "fused_tiers",
    "growth kvtuner layer profile speed",
    "fit heads lent",
    "grouped",
    "units",
    "cache",
    "bank kvsharer lm_eval prefill saving scores surrogate bench.decode",
    "answers budgets clusters joint measure moments study views",
    "distortion layout prices prove",
    "occupancy",
    "packing.container packing.layout packing.span packing.weighing",
    "packing.codec packing.coding packing.kvtc",
    "packing.body packing.checks packing.fitting",
    "packing.shelf packing.whole",
    "packing",
    "baseline biased calibrate front lessons search",
    "publish suite training",
    "bench bench.compositions bench.sharing bench.tiers bench.tokens bench.trials trainer tune",
    "bench.codecs bench.duel bench.endless bench.frontier bench.packing bench.scaling bench.whole",
    "bench.cskv bench.lowrank bench.prefill",
    "cli.amounts cli.faults cli.smoke cli.spelled",
    "report.folder report.layers report.prices report.rank report.spectra",
    "report.axes report.figures report.sentences",
    "report.scatter report.terminal",
    "report.sections",
    "report.attention report.evidence",
    "report.page",
    "report",
    "cli.options cli.progress cli.timings cli.workers",
    "cli.output cli.estimate cli.verdicts",
    "cli.front cli.generate cli.suite cli.job cli.junit cli.markdown cli.verb",
    "cli.gates cli.plan cli.report cli.reports cli.run",
    "cli.checks",
    "cli.apply cli.bench cli.calibrate cli.doctor cli.fit cli.methods cli.recipe cli.search",
    "cli.pack cli.unpack",
    "cli.tune",
    "cli.bench_codecs cli.bench_search cli.bench_tiers",
    "cli.bench_basis cli.bench_cskv cli.bench_latents cli.bench_lowrank cli.bench_pack",
    "cli.bench_endless cli.bench_prefill cli.bench_sharing cli.bench_tokens cli.bench_ragged",
    "cli",
    "__main__",
)
FLOOR = {name: floor for floor, line in enumerate(FLOORS) for name in line.split()}

SOURCES = sorted(PACKAGE.rglob("*.py"))
KERNEL_SOURCES = sorted(KERNELS.rglob("*.py"))
ALL = [*SOURCES, *KERNEL_SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]
METHODS = sorted(path.stem for path in (PACKAGE / "methods").glob("*.py") if path.stem[0] != "_")


def shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module(path: Path) -> str:
    """Returns a source's dotted name below kvtune; the package root's is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def floor(name: str) -> int:
    """Returns a module's floor; KeyError for a module that the table lacks."""
    if name in FLOOR:
        return FLOOR[name]
    return FLOOR[f"{name.partition('.')[0]}.*"]


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields every name that is imported anywhere in a source, dotted, with its line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in node.names)


def target(name: str) -> str | None:
    """Returns the module of ours that an imported name belongs to, or None for another's."""
    head, _, rest = name.partition(".")
    if head != "kvtune":
        return None
    while rest and not exists(rest):
        rest = rest.rpartition(".")[0]
    return rest


def exists(name: str) -> bool:
    place = PACKAGE.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or (place / "__init__.py").is_file()


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_every_module_has_a_floor(path: Path) -> None:
    name = module(path)
    if name:
        assert floor(name) >= 0


def allowed(source: str, wanted: str) -> bool:
    """Returns whether a module may import another one of ours."""
    return wanted != "" and floor(wanted) < floor(source)


@pytest.mark.parametrize("path", SOURCES, ids=shown)
def test_an_import_goes_strictly_down(path: Path) -> None:
    source = module(path)
    if source == "":
        return
    for name, line in imported(parsed(path)):
        assert not name.startswith("."), f"{shown(path)}:{line} imports relatively"
        wanted = None if name == "kvtune.__version__" else target(name)  # the root imports nothing
        assert wanted is None or allowed(source, wanted), f"{shown(path)}:{line} imports {name}"


@pytest.mark.parametrize("path", [p for p in SOURCES if module(p) in ("", "cli")], ids=shown)
def test_the_front_doors_import_nothing_heavy_when_they_are_imported(path: Path) -> None:
    light = {*sys.stdlib_module_names, "typer", "rich"}
    for node in parsed(path).body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            for name, line in imported(node):
                known = name.startswith(("kvtune.cli.output", "kvtune.errors"))
                assert known or name.partition(".")[0] in light, f"{shown(path)}:{line} {name}"


def test_there_is_no_circle() -> None:
    names = {module(path) for path in SOURCES}
    graph = {
        module(path): {target(name) for name, _ in imported(parsed(path))} & names
        for path in SOURCES
        if module(path)
    }
    while leaves := {name for name, uses in graph.items() if not uses & graph.keys() - {name}}:
        for name in leaves:
            del graph[name]
    assert not graph, f"these import one another: {sorted(graph)}"


@pytest.mark.parametrize("path", KERNEL_SOURCES, ids=shown)
def test_the_kernels_know_only_torch_and_triton(path: Path) -> None:
    known = {*sys.stdlib_module_names, "torch", "triton", "kvtune_kernels", ""}
    for name, line in imported(parsed(path)):
        assert name.partition(".")[0] in known, f"{shown(path)}:{line} imports {name}"


def run(code: str) -> str:
    """Runs code with a fresh Python in the repository's root, as a user in a checkout would."""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_runtime_needs_no_optuna() -> None:
    assert (PACKAGE / "cache.py").is_file()
    code = "import sys, kvtune.cache; print({'optuna', 'datasets'} & sys.modules.keys())"
    assert run(code) == "set()"


def test_the_folder_of_kernels_is_no_package() -> None:
    """transformers probes for the PyPI package `kernels` and imports from it.

    With a kernels/__init__.py here, our folder would win over that package whenever Python runs
    in the repository's root, and loading any model would end in an ImportError. A folder without
    `__init__.py` never wins over a regular package, so it is only a source root, as src/ is.
    """
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = (
        "import kvtune, importlib.util as u; spec = u.find_spec('kernels');"
        "print(spec.origin if spec else None)"
    )
    origin = run(code)
    assert origin == "None" or "site-packages" in origin


def test_folders_of_data_and_tests_are_no_packages() -> None:
    folders = (ROOT / "recipes", ROOT / "tests")
    assert not [path for folder in folders for path in folder.rglob("__init__.py")]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_one_part_in_one_file(name: str) -> None:
    from kvtune.parts import Part

    method = importlib.import_module(f"kvtune.methods.{name}")
    parts = [
        label
        for label, kind in inspect.getmembers(method, inspect.isclass)
        if issubclass(kind, Part) and kind.__module__ == method.__name__
    ]
    assert len(parts) == 1, f"{name}.py has {parts or 'no Part'}"


@pytest.mark.parametrize("path", ALL, ids=shown)
def test_the_first_line_of_a_file_says_what_it_is_for(path: Path) -> None:
    tree = parsed(path)
    if path.name == "__init__.py" and not tree.body:
        return
    assert ast.get_docstring(tree), f"{shown(path)} has no docstring"
    assert tree.body[0].lineno == 1
    assert path.read_text(encoding="utf-8").partition("\n")[0].lstrip('r"').strip()


@pytest.mark.parametrize("path", ALL, ids=shown)
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST
