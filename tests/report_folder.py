"""For the tests of reports: a run folder written by hand, with plain or with hostile names."""

import json
from pathlib import Path
from typing import Any

import torch

from kvtune.profile import Cell, Profile
from kvtune.recipe import loads

LAYERS, HEADS, DIM = 3, 2, 8
PARTS = ("profile.safetensors", "tune.json", "trials.json", "run.json", "scores", "front", "chosen")
HOSTILE = "<img src=x onerror=alert(1)>\"'&amp;</script><!--<script>alert(2)//"
PLAIN = "ordinary"


def write(folder: Path, name: str = PLAIN) -> Path:
    """Writes a whole run folder in which every free text is `name`; returns it."""
    (folder / "front").mkdir(parents=True)
    (folder / "scores").mkdir()
    (folder / "chosen").mkdir()
    profile(name).save(folder / "profile.safetensors")
    for index in range(3):
        (folder / "front" / f"{index:02}.toml").write_text(recipe(index, name))
    (folder / "chosen" / "README.md").write_text(f"# x\n\nMade by `kvtune tune {name}`.\n")
    for file, found in {
        "tune.json": summary(name),
        "trials.json": trials(name),
        "run.json": job(name),
        "scores/first.json": scores(name),
    }.items():
        (folder / file).write_text(json.dumps(found))
    return folder


def recipe(index: int, name: str) -> str:
    """A recipe of three layers for a model that it names."""
    bits = (8, 4, 2)[index]
    lines = [
        "kvtune = 1",
        f"name = {json.dumps(name)}",
        f"description = {json.dumps(name)}",
        "[model]",
        f"name = {json.dumps(name)}",
        f'fingerprint = "sha256:{"0" * 64}"',
        'architecture = "LlamaForCausalLM"',
        f"layers = {LAYERS}\nkv_heads = {HEADS}\nhead_dim = {DIM}",
        '[[layers]]\nspan = "0-1"\nsinks = 4\nrecent = 64',
        f'kept.keys = [{{ use = "affine", bits = {bits}, group = 32, axis = "channel" }}]',
        f'kept.values = [{{ use = "affine", bits = {bits}, group = "head", axis = "token" }}]',
        '[[layers]]\nspan = "rest"',
        f"[measured]\nkl = 0.1\ntexts = {{ proof = {json.dumps(name)} }}",
    ]
    text = "\n".join(lines) + "\n"
    loads(text)
    return text


def profile(name: str) -> Profile:
    """A profile of random numbers, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    settings = [
        json.dumps([{"use": "affine", "bits": bits, "group": group, "axis": "token"}])
        for bits in (2, 4, 8)
        for group in (32, 128)
    ]
    cells = tuple(
        Cell(layer, side, setting, 4, 64)
        for layer in range(LAYERS)
        for side in ("keys", "values")
        for setting in settings
    )
    by_head = 10 ** -(1 + 6 * torch.rand(len(cells), HEADS, generator=generator))
    root = torch.randn(3, LAYERS, HEADS, DIM, DIM, generator=generator)
    moments = root @ root.mT
    names = ("keys", "values", "queries")
    tensors = {"prices": by_head.sum(-1), "prices_by_head": by_head}
    tensors |= {f"moments.{side}": moments[i].contiguous() for i, side in enumerate(names)}
    for stat in ("sinks", "recent", "coverage90"):
        tensors[f"mass.{stat}"] = torch.rand(LAYERS, 2 * HEADS, generator=generator)
    return Profile(cells, tensors, {"model": name, "text": name, "fingerprint": name})


def summary(name: str) -> dict[str, Any]:
    """`tune.json` of three points, of which the second is chosen."""
    points = []
    for index, (bits, kl) in enumerate(((8.5, 1e-5), (4.5, 1e-3), (2.5, 0.1))):
        point = {"file": f"front/{index:02}.toml", "label": name, "origin": name, "kl": kl}
        point |= {"kl_low": kl / 2, "kl_high": kl * 2, "held_out_kl": kl * 1.1}
        point |= {"best_uniform_kl": kl * 3 if index else None, "flips": 0.01, "dnll": 0.0}
        point |= {"positions": 256, "context": 512, "bytes": int(bits * 1e6), "bits": bits}
        point |= {"bytes_context": 8192, "batch": 1, "ratio": 16 / bits, "payload_bits": bits}
        points.append(point | {"latency": 100 + 50 * bits})
    held = [
        {"uniform": True, "origin": f"uniform {name}", "bits": bits, "bytes": bits * 1e6, "kl": kl}
        for bits, kl in ((8.6, 1e-5), (4.6, 0.01), (3.0, 0.2))
    ]
    held += [{"uniform": False, "origin": name, "bits": 5.0, "bytes": 5e6, "kl": 0.0}]
    return {
        "binding": name,
        "points": points,
        "chosen": 1,
        "model": name,
        "device": name,
        "torch": name,
        "transformers": name,
        "python": name,
        "held_out": [own | {"ratio": 16 / own["bits"], "latency": 300.0} for own in held],
        "dense": {"bytes": 16_000_000, "bits": 16, "latency": 900.0},
        "search": {
            "objectives": [name],
            "constraints": {name: 0.5},
            "trials": 4,
            "infeasible": 1,
            "stopped": 1,
            "rank_correlation": 0.98,
            "interaction": {name: 0.1},
        },
        "seconds": {name: 12.5, "search": 61.0},
    }


def trials(name: str) -> dict[str, Any]:
    """`trials.json` of three trials, one of them infeasible."""
    rows: list[dict[str, Any]] = [
        {"number": i, "origin": origin, "state": "complete", "bits": 4.0, "kl": kl}
        for i, (origin, kl) in enumerate(((name, 0.01), (f"uniform {name}", 0.1)))
    ]
    rows = [row | {"predicted": row["kl"] * 0.9, "error": None} for row in rows]
    rows.append({"number": 2, "origin": name, "state": "infeasible", "error": name, "kl": None})
    return {"objectives": ["memory", "accuracy"], "rows": rows}


def job(name: str) -> dict[str, Any]:
    """`run.json`."""
    where = {"device": "auto", "dtype": "auto", "offline": False}
    text = {"data": name, "sequences": 8, "context": 512}
    more = {"continuation": 128, "seed": 0}
    return {"kvtune_run": 1, "model": name, "where": where, "text": text, **more}


def scores(name: str) -> dict[str, Any]:
    """A file of `scores/` with a task that tells and one at chance."""
    one = {"score": 0.8, "low": 0.7, "high": 0.9}
    task = {"chance": 0.0, "n": 24, "dense": one, "compressed": one, "verdict": name}
    task["difference"] = {"mean": 0.0, "low": -0.1, "high": 0.1}
    tasks = {name: task | {"at_chance": False}, f"{name} 2": task | {"at_chance": True}}
    mean = {"dense": 0.8, "compressed": 0.8}
    return {"recipe": name, "length": 512, "seed": 0, "items": 24, "tasks": tasks, "mean": mean}
