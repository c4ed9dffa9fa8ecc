"""Laws of a recipe's speed: the table's times, summed over layers; what it lacks is said."""

from pathlib import Path
from typing import Any

import pytest
import torch
from kvtune_kernels import Format

from kvtune.bench import latency
from kvtune.chains import Chain
from kvtune.errors import MissingInputError, UnsupportedError, UsageError
from kvtune.goal import Bounds, Goal
from kvtune.methods.affine import Affine
from kvtune.methods.derope import Derope
from kvtune.models import Facts, LayerFacts
from kvtune.recipe import Policy
from kvtune.space import Opened
from kvtune.speed import Speed, open_table, timed

HEADS = (4, 2, 64)
LAYER = LayerFacts("full_attention", 2, 4, 64)
SLIDING = LayerFacts("sliding_attention", 2, 4, 64, 128)
KNOWN = Facts("Tiny", (LAYER, SLIDING, LAYER), 4096, 61)


def keys(bits: int) -> Chain:
    """Keys as the table times them."""
    return Chain((Affine(bits=bits, group=64, axis="channel"),))


def values(bits: int) -> Chain:
    """Values as the table times them."""
    return Chain((Affine(bits=bits, group="head", axis="token"),))


@pytest.fixture
def table() -> latency.Table:
    """Times in proportion to batch and context; three bits are as slow as they are on a GPU."""
    cost = {2: 2, 3: 6, 4: 4, 8: 8}
    cells = tuple(
        latency.Cell(
            Format(k, 64, False),
            Format(v, 64, True),
            b,
            n,
            (cost[k] + cost[v]) * b * n / 4096,
            32 * b * n / 4096,
        )
        for k in latency.BITS
        for v in latency.BITS
        for b in (1, 8)
        for n in (4096, 32768)
    )
    return latency.Table("card", *HEADS, {}, cells)


@pytest.fixture
def speed(table: latency.Table) -> Speed:
    """At 4096 tokens and four rows."""
    return Speed(table, KNOWN, 4096, 4)


def test_a_recipe_takes_the_sum_of_its_full_layers(speed: Speed) -> None:
    own = Policy(keys=keys(4), values=values(2))
    assert speed.layer(own) == pytest.approx((4 + 2) * 4)
    assert speed.dense() == pytest.approx(32 * 4)
    assert speed.recipe((own, Policy(), Policy())) == pytest.approx(24 + 128)


def test_part_of_the_heads_cost_their_part(speed: Speed) -> None:
    assert speed.pair(keys(4), values(4), 0.5) == pytest.approx(16)


def test_what_no_kernel_reads_has_no_time(speed: Speed) -> None:
    turned = Chain((Derope(), Affine(bits=4, group=64, axis="channel")))
    assert speed.knows(keys(4)) and not speed.knows(turned)
    with pytest.raises(UnsupportedError, match="no kernel"):
        speed.pair(turned, values(4))
    own = Opened(0, 64, (turned, keys(4)), (values(4),))
    found, dropped = timed({"": {0: own}}, speed)
    assert found[""][0].keys == (keys(4),)
    assert dropped == 1
    with pytest.raises(UsageError, match="layer 0"):
        timed({"": {0: Opened(0, 64, (turned,), (values(4),))}}, speed)


def test_a_missing_table_is_refused_with_the_command_that_makes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    cpu = torch.device("cpu")
    for file in (None, tmp_path / "table.json"):
        with pytest.raises(MissingInputError) as refused:
            open_table(KNOWN, cpu, file)
        assert "kvtune bench kernels --table --heads 4/2/64" in str(refused.value)


def test_a_table_in_a_file_serves_only_the_heads_it_was_made_for(
    table: latency.Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVTUNE_HOME", str(tmp_path))
    file, cpu = table.save(), torch.device("cpu")
    assert open_table(KNOWN, cpu, file) == table
    other = Facts("Tiny", (LayerFacts("full_attention", 1, 4, 64),), 4096, 61)
    with pytest.raises(UnsupportedError, match="4/2/64 and 4/1/64"):
        open_table(other, cpu, file)


def test_a_search_for_latency_finds_its_front_on_three_axes(
    llama: Any, draw: Any, tmp_path: Path, table: latency.Table
) -> None:
    from kvtune.bank import build
    from kvtune.calibrate import price_cells
    from kvtune.measure import Bench
    from kvtune.models import facts
    from kvtune.prices import pulls
    from kvtune.prices import table as priced
    from kvtune.profile import Profile
    from kvtune.recipe import loads
    from kvtune.search import Limits, Search
    from kvtune.space import opened

    known, bench = facts(llama.config), Bench(llama, build(llama, draw(4, 161), 128))
    template = loads(
        'kvtune = 1\n[[layers]]\nspan = "all"\n'
        'kept.keys = [{ use = "affine", bits = "search", group = 64, axis = "channel" }]\n'
        'kept.values = [{ use = "affine", bits = "search", group = "head", axis = "token" }]\n'
    )
    first = known.layers[0]
    shape = (first.query_heads, first.kv_heads, first.head_dim)
    cells = tuple(
        cell if cell.values.group == first.head_dim else _of_head(cell, first.head_dim)
        for cell in table.cells
    )
    own = latency.Table("card", *shape, {}, cells)
    goal = Goal(("latency", "memory", "accuracy"), 4096, 4, Bounds(), 4, 4, 2)
    speed = Speed(own, known, goal.context, goal.batch)
    windows, _ = timed(opened(template, known), speed)
    found = price_cells(windows)
    places = [(cell.layer, policy) for cell, policy in found]
    prices = priced(bench, places, pulls(llama, bench.bank, 0), lambda done, total: None)
    profile = Profile(tuple(cell for cell, _ in found), {"prices": prices[:, 0].float()})
    search = Search(bench, profile, windows, goal, Limits(str(tmp_path / "s.db")), speed)
    assert any(name.startswith("fast") for name in search.layout.bases)
    for row in search.run(seed=0):
        assert row.values is not None
        policies = search.layout.policies(search.layout.base(row.choice))
        assert row.values[0] == pytest.approx(speed.recipe(policies))


def _of_head(cell: latency.Cell, head_dim: int) -> latency.Cell:
    return latency.Cell(
        cell.keys, Format(cell.values.bits, head_dim, True), *list(vars(cell).values())[2:]
    )
