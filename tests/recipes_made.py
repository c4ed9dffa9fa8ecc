"""Recipes by name that laws are tried on: each a few lines of TOML."""

from __future__ import annotations


def entry(
    keys: str = "", values: str = "", sinks: int = 0, recent: int = 0, span: str = "all"
) -> str:
    """Returns the TOML of one layer entry; `keys` and `values` are tables without braces."""
    lists = [
        ", ".join(f"{{ {table} }}" for table in side.split(" > ") if table)
        for side in (keys, values)
    ]
    return (
        f'[[layers]]\nspan = "{span}"\nsinks = {sinks}\nrecent = {recent}\n'
        f"kept.keys = [{lists[0]}]\nkept.values = [{lists[1]}]\n"
    )


def channel(bits: int, group: int = 32) -> str:
    """Affine quantisation per channel."""
    return f'use = "affine", bits = {bits}, group = {group}, axis = "channel"'


def token(bits: int) -> str:
    """Affine quantisation per token, a head in one group."""
    return f'use = "affine", bits = {bits}, group = "head", axis = "token"'


DEROPE = 'use = "derope"'
HEAD = (
    f'[[layers.heads]]\nspan = "0"\nkept = {{ keys = [{{{DEROPE}}}], values = [{{{token(8)}}}] }}\n'
)
MADE = {
    "k8v8": entry(channel(8), token(8), recent=7),
    "k4v2-windowed": entry(channel(4), token(2), sinks=3, recent=64),
    "k2v4-bare": entry(token(2), token(4)),
    "k3-only": entry(channel(3), sinks=3),
    "v3-only": entry(values=token(3), recent=7),
    "v2-per-channel": entry(channel(4, 64), channel(2)),
    "derope": entry(DEROPE, sinks=3, recent=7),
    "derope-k4": entry(f"{DEROPE} > {channel(4)}", token(4), recent=7),
    "layers-apart": entry(channel(2), token(8), recent=7, span="last 1")
    + entry(DEROPE, token(3), sinks=3, span="rest"),
    # one kv head, the first, of models with several; of the others the only one
    "heads-apart": entry(channel(4), token(2), sinks=3, recent=7) + HEAD,
    "hadamard-k4": entry(f'use = "hadamard" > {token(4)}', f'use = "hadamard" > {token(2)}'),
    "klt-k2": entry(
        'use = "klt" > use = "waterfill", bits = 2, group = 64',
        'use = "hadamard" > use = "normal", bits = 2',
        sinks=3,
        recent=7,
    ),
    # a prompt's own basis, whose tokens stay exact until it pays
    "svd": entry(
        f'{DEROPE} > use = "svd", rank = 0.25',
        'use = "svd", rank = 0.5, heads = 1, metric = "whitened"',
        sinks=3,
        recent=7,
    ),
    "first-dense": entry(span="first 1") + entry(token(4), token(4), recent=3, span="rest"),
}
