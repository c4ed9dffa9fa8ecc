"""Groups to codes inside a kernel, to the last bit as `groups` says; but for the scale of symmetric
codes, whose sums may end on the next float16."""

import triton
import triton.language as tl

from kvtune_kernels import groups

LIMIT = tl.constexpr(65504.0)  # the largest float16
LARGEST = tl.constexpr(groups.LARGEST)
SMALLEST = tl.constexpr(groups.SMALLEST)
CLIP_2, CLIP_3, CLIP_4 = (tl.constexpr(groups.CLIP[bits]) for bits in (2, 3, 4))


@triton.jit
def chosen(low, high, part):
    """Float16 scale and zero, as uint32, of groups with these extremes; `part` is the reciprocal
    of their last code."""
    low = tl.minimum(tl.maximum(low, -LIMIT), LIMIT)
    high = tl.minimum(tl.maximum(high, -LIMIT), LIMIT)
    # The next float16 by its bits: of a product and a sum that should find it, a compiler may leave
    # out a rounding, and the scale is another one once in some thousand groups.
    zero = low.to(tl.float16)
    bits = zero.to(tl.uint16, bitcast=True).to(tl.int32)
    below = tl.where(bits == 0, 0x8001, tl.where(bits < 0x8000, bits - 1, bits + 1))
    bits = tl.where(zero.to(tl.float32) > low, below, bits)
    zero = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    step = (high - zero) * part
    scale = step.to(tl.float16)
    above = scale.to(tl.uint16, bitcast=True).to(tl.int32)
    above = tl.where(scale.to(tl.float32) < step, above + 1, above)
    above = tl.where(above == 0, 0x3C00, above)  # a constant group: one, and all codes are 0
    return above.to(tl.uint32) | bits.to(tl.uint32) << 16


@triton.jit
def numbers(meta):
    """Scale and zero as float32."""
    scale = (meta & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (meta >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return scale, zero


@triton.jit
def inverse(scale, ASM: tl.constexpr):
    """1 / scale, correctly rounded; scale is a float16, so one Newton step makes it so."""
    if ASM:
        near = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [scale], dtype=tl.float32, is_pure=True, pack=1
        )
        return tl.fma(tl.fma(-scale, near, 1.0), near, near)
    else:
        return tl.div_rn(1.0, scale)


@triton.jit
def rounded(x, last, ASM: tl.constexpr):
    """The nearest code up to `last`, even at ties; values beyond float16 lie beyond it."""
    if ASM:
        code = tl.inline_asm_elementwise(  # below zero becomes zero
            "cvt.rni.u32.f32 $0, $1;", "=r,r", [x], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        magic: tl.constexpr = 12582912.0  # 1.5 * 2**23; a compiler may fuse it with a product
        code = tl.minimum(tl.maximum(x, 0.0), 255.0)
        code = ((code + magic) - magic).to(tl.int32)
    return tl.minimum(code.to(tl.uint32), last).to(tl.int32)


@triton.jit
def quantised(
    x, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, SYMMETRIC: tl.constexpr,
    D: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes [R, D] and metadata, [R, D / GROUP] or [D], of R whole tokens x [R, D].

    Per channel, the R tokens are one group.
    """
    last: tl.constexpr = (1 << BITS) - 1
    if PER_TOKEN:
        grouped = x.reshape(x.shape[0], D // GROUP, GROUP)
        if SYMMETRIC:
            code, meta = _symmetric(grouped, BITS, ASM)
        else:
            meta = chosen(tl.min(grouped, 2), tl.max(grouped, 2), 1.0 / last)
            scale, zero = numbers(meta)
            times = inverse(scale, ASM)
            code = rounded((grouped - zero[:, :, None]) * times[:, :, None], last, ASM)
        code = code.reshape(x.shape[0], D)
    else:
        meta = chosen(tl.min(x, 0), tl.max(x, 0), 1.0 / last)
        scale, zero = numbers(meta)
        code = rounded((x - zero[None, :]) * inverse(scale, ASM)[None, :], last, ASM)
    return code, meta


@triton.jit
def _symmetric(x, BITS: tl.constexpr, ASM: tl.constexpr):
    """Codes [R, G, N] and float16 scales [R, G], as uint16, of groups x [R, G, N]."""
    last: tl.constexpr = (1 << BITS) - 1
    clip: tl.constexpr = CLIP_2 if BITS == 2 else (CLIP_3 if BITS == 3 else CLIP_4)
    x = tl.minimum(tl.maximum(x, -LIMIT), LIMIT)
    reach = tl.maximum(tl.max(tl.abs(x), 2), SMALLEST) * clip
    times = tl.div_rn(tl.full(reach.shape, 0.5 * last, tl.float32), reach)
    code = rounded((x + reach[:, :, None]) * times[:, :, None], last, ASM)
    along = tl.sum(x * (code.to(tl.float32) - 0.5 * last), 2)
    scale = tl.minimum(tl.sum(x * x, 2) / tl.where(along > 0, along, 1.0), LARGEST)
    scale = tl.where(along > 0, scale, 0.0).to(tl.float16)
    return code, scale.to(tl.uint16, bitcast=True)


@triton.jit
def planes_of(PLANES, c, mask):
    """Source channel, plane and count of planes of virtual channels c."""
    entry = tl.load(PLANES + c, mask=mask, other=1 << 24)
    return entry & 0xFFFF, (entry >> 16) & 0xFF, entry >> 24


@triton.jit
def digits(x, plane, count, ASM: tl.constexpr):
    """2-bit digits [R, N] and metadata [N] of a group of R tokens x [R, N] of the sources of
    virtual channels."""
    part = tl.where(count == 1, 1.0 / 3, tl.where(count == 2, 1.0 / 15, 1.0 / 63))
    part = tl.where(count == 4, 1.0 / 255, part)
    meta = chosen(tl.min(x, 0), tl.max(x, 0), part)
    scale, zero = numbers(meta)
    last = ((1 << (2 * count)) - 1).to(tl.uint32)
    code = rounded((x - zero[None, :]) * inverse(scale, ASM)[None, :], last[None, :], ASM)
    lifted = (scale * (1 << (2 * plane)).to(tl.float32)).to(tl.float16)
    lifted = lifted.to(tl.uint16, bitcast=True).to(tl.uint32)
    meta = lifted | tl.where(plane == 0, meta & 0xFFFF0000, 0)
    return (code >> (2 * plane)[None, :]) & 3, meta


@triton.jit
def halves(code, BITS: tl.constexpr):
    """Packs lines of codes [R, N] of up to 4 bits to 16-bit halves [R, N * BITS / 16], unturned."""
    LANES: tl.constexpr = code.shape[1]
    SLICES: tl.constexpr = 8 // BITS
    slots = code.reshape(code.shape[0], SLICES, LANES // SLICES // 4, 2, 2)
    i = tl.arange(0, SLICES)[None, :, None, None, None]
    k = tl.arange(0, 2)[None, None, None, :, None]
    slots = slots * (1 << (BITS * (2 * i + k)))  # a product, which is one instruction with the sum
    return tl.sum(tl.sum(slots, 3), 1).reshape(code.shape[0], LANES * BITS // 16)
