"""Last query: tokens win that the last token looks at (TOVA, arXiv:2401.06104)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Selector
from kvtune.view import View, looked


class Tova(Selector):
    """score = attention of the last query, the mean over all query heads of the layer.

    All kv heads so keep the same tokens, as in the paper.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"queries"})

    @property
    def observed(self) -> int:
        """One query."""
        return 1

    def score(self, view: View) -> Tensor:
        """Attention from 0 to 1, the same in every head, [B, H, T]."""
        return looked(view, 1).mean((1, 2))[:, None].expand(view.keys.shape[:3])
