"""Key norm: tokens with short keys win (Devoto et al., arXiv:2406.11430)."""

import torch
from torch import Tensor

from kvtune.retention import Selector
from kvtune.view import View


class Knorm(Selector):
    """score = -||k||_2: in trained models short keys get most attention.

    In float32: norms of 16 bits tie, and which token wins would be chance.
    """

    def score(self, view: View) -> Tensor:
        """Norms with a minus, [B, H, T]."""
        wide = torch.promote_types(view.keys.dtype, torch.float32)
        length: Tensor = torch.linalg.vector_norm(view.keys, dim=-1, dtype=wide)
        return -length
