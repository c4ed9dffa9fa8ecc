"""Takes the mean of each channel away, which biased keys are mostly made of (Qwen2.5)."""

import torch
from torch import Tensor

from kvtune.parts import Fold, Seen
from kvtune.turns import Turn


class Centre(Turn):
    """x - mean, with a calibrated mean of each channel of each kv head.

    Hadamard matrices spread outliers but keep a constant offset, so centre first where groups lie
    along the channels. Of keys, softmax does not see what is taken away.
    """

    def blanks(self, heads: int, head_dim: int) -> dict[str, Tensor]:
        """The mean of each head in 16 bits."""
        return {"mean": torch.empty(heads, head_dim, dtype=torch.float16, device="meta")}

    def fit(self, seen: Seen) -> dict[str, Tensor]:
        """Finds the mean."""
        return {"mean": seen.mean.half()}

    def made(self, tensors: dict[str, Tensor]) -> Fold:
        """A shift alone."""
        mean = tensors["mean"]
        same = torch.eye(mean.shape[1], dtype=mean.dtype, device=mean.device)
        return Fold(mean, same.expand(mean.shape[0], -1, -1), same.expand(mean.shape[0], -1, -1))
