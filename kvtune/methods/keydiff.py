"""Key difference: tokens win whose keys are unlike the mean key (KeyDiff, arXiv:2504.15364)."""

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from kvtune.retention import Selector
from kvtune.view import View


class Keydiff(Selector):
    """score = -cos(k, mean of k' / ||k'||) over all keys k' of the head that compete.

    It looks at no query. The paper lets blocks compete as they come, as `budget` and `every` do.
    """

    def score(self, view: View) -> Tensor:
        """Cosines with a minus, [B, H, T], from -1 to 1."""
        keys = view.keys.to(torch.promote_types(view.keys.dtype, torch.float32))
        return -cosine_similarity(keys, normalize(keys, dim=-1).mean(2, keepdim=True), dim=-1)
