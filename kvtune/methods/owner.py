"""Reads another layer's cache (a map of owners, as KVSharer finds one, arXiv:2410.18517)."""

from kvtune.parts import Borrower


class Owner(Borrower):
    """The layer stores nothing: its queries read keys and values of an earlier `layer`.

    Exact only where both layers make the same keys and values, as in models that declare it; of
    others `kvtune bench sharing` finds which layers bear it best.
    """
