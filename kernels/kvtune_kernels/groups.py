"""Groups of values to codes and back in plain torch: affine codes, symmetric codes, and the digits
of codes whose bits differ from channel to channel."""

import torch
from torch import Tensor

# How far codes reach, in parts of a group's largest magnitude: nearly what costs a normal
# distribution least. Dyadic, so that a 16-bit magnitude times it is exact wherever it is computed.
CLIP = {2: 0.75, 3: 0.8984375, 4: 0.96875}
# Kernels lift a symmetric scale up to 32 times into float16.
LARGEST = 65504 / 32
# Groups that reach less far are zeros: their float16 scale would be none.
SMALLEST = 2.0**-26


def quantize(x: Tensor, bits: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each group x [..., G, N] over its axis -2:
    codes [..., G, N], scale and zero [..., 1, N]. `bits` may differ: int64 [..., 1, N].

    x is about codes * scale + zero. The minimum is subtracted first and all arithmetic is fp32:
    with the usual round(min / scale) zero point, channels with a large constant offset lose bits
    (Qwen2.5's key biases). Scale and zero are float16 whatever the dtype of x, since bfloat16 would
    cost eight times the rounding; zero is rounded down and scale up, so no value is ever clipped.
    """
    limit = torch.finfo(torch.float16).max
    wide = (x if x.dtype == torch.float64 else x.float()).clamp(-limit, limit)
    low, high = wide.aminmax(dim=-2, keepdim=True)
    zero = low.half()
    zero = torch.where(zero.to(wide.dtype) > low, _next(zero, up=False), zero)
    # a product, since torch divides by a number in one way on a CPU and in another on a GPU
    most = 2**bits - 1
    inverse = torch.tensor([1 / (2**n - 1 or 1) for n in range(9)], device=x.device)
    step = (high - zero) * (inverse[bits] if isinstance(bits, Tensor) else 1 / most)
    scale = step.half()
    scale = torch.where(scale.to(wide.dtype) < step, _next(scale, up=True), scale)
    # a constant group: all codes are 0
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    codes = ((wide - zero) * (1 / scale.to(wide.dtype))).round_()
    codes = codes.clamp_min_(0)
    codes = codes.minimum(most) if isinstance(most, Tensor) else codes.clamp_max_(most)
    return codes.to(torch.uint8), scale, zero


def _next(x: Tensor, up: bool) -> Tensor:
    """The next float16 above, of numbers that are not negative, or below.

    By its bits: of sums that should do the same a GPU's compiler may leave out a rounding.
    """
    bits = x.view(torch.int16)
    if up:
        return (bits + 1).view(torch.float16)
    beyond = torch.where(
        bits == 0, -(2**15) + 1, bits + 1
    )  # a negative number's bits grow downwards
    return torch.where(bits > 0, bits - 1, beyond.to(torch.int16)).view(torch.float16)


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns codes * scale + zero, computed in fp32; the shapes broadcast."""
    return torch.addcmul(zero.float(), codes.float(), scale.float()).to(dtype)


def quantize_symmetric(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Quantises each group x [..., N] over its last axis to codes [..., N] and scale [..., 1]:
    x is about (codes - (2**bits - 1) / 2) * scale.

    Codes are the nearest ones of a grid that ends at CLIP of the largest magnitude. The scale then
    makes the code unbiased, <decoded, x> = <x, x>: averages over many tokens, which is what values
    are read for, keep the noise of rounding small and would keep all of a bias (as EDEN does,
    arXiv:2108.08842). A group of zeros has scale 0.
    """
    limit, middle = torch.finfo(torch.float16).max, (2**bits - 1) / 2
    wide = (x if x.dtype == torch.float64 else x.float()).clamp(-limit, limit)
    reach = wide.abs().amax(-1, keepdim=True).clamp_min(SMALLEST) * CLIP[bits]
    # a tensor over a tensor, since torch divides a number by one in two roundings
    codes = ((wide + reach) * (torch.full_like(reach, middle) / reach)).round_()
    codes = codes.clamp_(0, 2**bits - 1)
    signed = codes - middle
    along = (wide * signed).sum(-1, keepdim=True)
    scale = (wide * wide).sum(-1, keepdim=True) / torch.where(along > 0, along, 1.0)
    scale = torch.where(along > 0, scale, 0.0).clamp_max(LARGEST)
    return codes.to(torch.uint8), scale.half()


def source_of(planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source channel, plane and count of planes [H, C] of each virtual channel, int64."""
    wide = planes.long()
    return wide & 0xFFFF, wide >> 16 & 0xFF, wide >> 24


def quantize_planes(x: Tensor, planes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantises each group x [B, H, ..., G, D] over its axis -2 to the digits [B, H, ..., G, C] of
    the virtual channels of `planes` [H, C], and their scales and zeros [B, H, ..., 1, C].

    A channel of `count` planes has codes of 2 * count bits, code = sum of digit_p * 4**p. So
    x = sum of digit_p * (scale * 4**p) + zero, and the zero is plane 0's.
    """
    # the planes' axes: H stands at 1, C last
    shape = (1, planes.shape[0], *[1] * (x.dim() - 3), planes.shape[1])
    _, plane, count = (part.reshape(shape) for part in source_of(planes))
    codes, scale, zero = quantize(gather_channels(x, planes), 2 * count)
    digits = codes.long() >> 2 * plane & 3
    return digits.to(torch.uint8), scale * 4**plane, torch.where(plane == 0, zero, 0)


def dequantize_planes(
    digits: Tensor, scale: Tensor, zero: Tensor, planes: Tensor, dim: int
) -> Tensor:
    """Sums the planes of each channel, in fp32: digits [B, H, ..., G, C] -> [B, H, ..., G, dim].

    A channel without planes is 0.
    """
    parts = dequantize(digits, scale, zero, torch.float32)
    source, _, _ = source_of(planes)
    index = source.reshape(1, planes.shape[0], *[1] * (parts.dim() - 3), -1).expand(parts.shape)
    return parts.new_zeros(*parts.shape[:-1], dim).scatter_add_(-1, index, parts)


def gather_channels(x: Tensor, planes: Tensor) -> Tensor:
    """x [B, H, ..., D] at the source of every virtual channel: [B, H, ..., C]."""
    source, _, _ = source_of(planes)
    index = source.reshape(1, planes.shape[0], *[1] * (x.dim() - 3), -1)
    return x.gather(-1, index.expand(*x.shape[:-1], planes.shape[1]))
