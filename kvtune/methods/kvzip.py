"""KVzip: tokens win that the model looks at when it repeats the context (context replay)."""

from typing import ClassVar

from torch import Tensor

from kvtune.retention import Selector
from kvtune.view import View


class Kvzip(Selector):
    """score = the most attention a token got while the context was read again behind itself.

    KVzip (arXiv:2505.23416): no question is known yet, so what a repetition needs is kept. It costs
    one to two prefills more, see `kvtune.replay`. The paper leaves it at the context; here tokens
    behind it compete as well, by the attention that they get, which is added up for all.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"replay"})

    def score(self, view: View) -> Tensor:
        """What the replay gave, [B, H, T]."""
        assert view.attention is not None, "the layer gives what a part needs"
        return view.attention
