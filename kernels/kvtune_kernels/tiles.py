"""Tiles of packed keys and values inside a kernel: their numbers, and the logits of keys.

A tile of keys has a line of channels for each token, a tile of values a line of tokens for each
channel. Lane j of a line holds a code of every slice (see `reference.pack`), so a tile of W lanes
becomes 8 / bits operands of W columns, which are contracted one after the other.
"""

import triton
import triton.language as tl

from kvtune_kernels.codes import (
    portable_codes,
    scale_and_zero,
    shifted_left,
    values_2,
    values_3,
    values_4,
    values_8,
)

PAGE = tl.constexpr(64)  # tokens of a page
FAR = tl.constexpr(-1.0e30)  # below every logit, and finite: exp2(FAR - FAR) is no NaN


@triton.jit
def _spread(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[r, c] -> [ROWS, COLS]: each element stands for a rectangle."""
    r: tl.constexpr = x.shape[0]
    c: tl.constexpr = x.shape[1]
    if r != 1 and r != ROWS:
        x = x[:, None, :].broadcast_to(r, ROWS // r, c).reshape(ROWS, c)
    if c != 1 and c != COLS:
        x = x[:, :, None].broadcast_to(x.shape[0], c, COLS // c).reshape(x.shape[0], COLS)
    return x


@triton.jit
def _metadata(
    META, tile, first: tl.constexpr, lane0: tl.constexpr, lanes, lift, i: tl.constexpr,
    KEYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    SYMMETRIC: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scale * lift and zero - scale * lift of slice i of a tile, over its [ROWS, WIDE] values.

    A tile of keys has tokens as rows and channels as lanes, a tile of values the other way round.
    """
    # extents of the slice in tokens and channels, and how many groups they cross
    tokens: tl.constexpr = ROWS if KEYS else WIDE
    channels: tl.constexpr = WIDE if KEYS else ROWS
    token0: tl.constexpr = first if KEYS else i * W
    channel0: tl.constexpr = i * W + lane0 if KEYS else 0
    if PER_TOKEN:  # pages of [D / GROUP, PAGE]
        nt: tl.constexpr = tokens
        # a head of 96 channels is cut into slices of 48, which groups of 32 do not fit
        whole: tl.constexpr = not KEYS or W % GROUP == 0 or GROUP % W == 0
        few: tl.constexpr = channels // GROUP if channels > GROUP else 1
        nc: tl.constexpr = few if whole else channels
        token = token0 + tl.arange(0, nt)
        # Scales of 32 tokens are read in words of two: less than four bytes a thread are not copied
        # ahead of their use. Of 16 tokens they are, and in words they took half as long again.
        pair: tl.constexpr = 2 if SYMMETRIC and ASM and not KEYS and BITS == 4 else 1
        if pair == 2:
            META = META.to(tl.pointer_type(tl.uint32))
        t = token // pair
        c = channel0 // GROUP + tl.arange(0, nc)
        if not whole:
            c = (channel0 + tl.arange(0, nc)) // GROUP
        there = c < D // GROUP
        at = META + tile * (D // GROUP * PAGE // pair)
        c_step: tl.constexpr = PAGE // pair
    else:  # lines of D channels, one for GROUP tokens; written so that equal lines look equal
        nt: tl.constexpr = tokens // GROUP if tokens > GROUP else 1
        nc: tl.constexpr = channels
        t = tl.arange(0, nt) * D
        c = channel0 + tl.arange(0, nc)
        there = tl.arange(0, nc) < (W - lane0 if KEYS else D)
        line = tile * PAGE // GROUP
        if GROUP < PAGE:
            line += token0 // GROUP
        at = META + line * D
        c_step: tl.constexpr = 1
    if KEYS:
        where = at + t[:, None] + c[None, :] * c_step
        there = there[None, :] & (t[:, None] >= 0)
    else:
        where = at + c[:, None] * c_step + t[None, :]
        there = there[:, None] & (t[None, :] >= 0)
    bounded: tl.constexpr = lane0 + WIDE > W if KEYS else ROWS != D
    meta = tl.load(where, mask=there, other=0) if bounded else tl.load(where)
    if SYMMETRIC:
        if pair == 2:
            meta >>= (lanes % 2 * 16).to(tl.uint32)[None, :]
        s = meta.to(tl.uint16).to(tl.float16, bitcast=True)
        z = s * (-0.5 * ((1 << BITS) - 1))
    else:
        s, z = scale_and_zero(meta, ASM)
    if ASM and BITS != 8:
        if BITS == 4:
            s = s * 16.0
        elif s.shape[1] == WIDE:
            s = s * lift[None, :]
        else:
            s = _spread(s, ROWS, WIDE) * lift[None, :]
            z = _spread(z, ROWS, WIDE)
        z = z - s
    return _spread(s, ROWS, WIDE), _spread(z, ROWS, WIDE)


@triton.jit
def _slice(
    LINES, HIGH, rows, META, tile, first: tl.constexpr, lane0: tl.constexpr, i: tl.constexpr,
    KEYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    SYMMETRIC: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """Slice i of a tile as float16 values [ROWS, WIDE], in plain Triton."""
    j = lane0 + tl.arange(0, WIDE)
    s, z = _metadata(
        META, tile, first, lane0, None, None, i, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC, D, ROWS,
        W, WIDE, False,
    )  # fmt: skip
    ok = (j[None, :] < W) & (rows[:, None] < (PAGE if KEYS else D))
    low = LINES + rows[:, None] * W
    high = HIGH + rows[:, None] * (W // 2)
    x = portable_codes((low, high), j[None, :], i, BITS, W, ok) * s.to(tl.float32) + z.to(
        tl.float32
    )
    return tl.where(ok, x, 0.0).to(tl.float16)


@triton.jit
def slices(
    LINES, HIGH, rows, lanes, META, tile, first: tl.constexpr, lane0: tl.constexpr,
    KEYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    SYMMETRIC: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The 8 // BITS slices (four for 3 bits) of a packed tile from lane0 on, each as float16
    [ROWS, WIDE]; what a format has no use for repeats the first."""
    if not ASM:
        x0 = _slice(
            LINES, HIGH, rows, META, tile, first, lane0, 0, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC,
            D, ROWS, W, WIDE,
        )  # fmt: skip
        x1 = x0
        x2 = x0
        x3 = x0
        if BITS < 8:
            x1 = _slice(
                LINES, HIGH, rows, META, tile, first, lane0, 1, KEYS, BITS, GROUP, PER_TOKEN,
                SYMMETRIC, D, ROWS, W, WIDE,
            )  # fmt: skip
        if BITS < 4:
            x2 = _slice(
                LINES, HIGH, rows, META, tile, first, lane0, 2, KEYS, BITS, GROUP, PER_TOKEN,
                SYMMETRIC, D, ROWS, W, WIDE,
            )  # fmt: skip
            x3 = _slice(
                LINES, HIGH, rows, META, tile, first, lane0, 3, KEYS, BITS, GROUP, PER_TOKEN,
                SYMMETRIC, D, ROWS, W, WIDE,
            )  # fmt: skip
    else:
        # codes of lanes 0, 1 of four lie two bits lower than those of lanes 2, 3
        lift = tl.where(lanes % 4 < 2, 4.0, 1.0).to(tl.float16) * (8.0 if BITS == 3 else 4.0)
        j = lane0 + tl.arange(0, WIDE)
        where = LINES + rows[:, None] * W + j[None, :]
        bounded: tl.constexpr = lane0 + WIDE > W or (ROWS != D and not KEYS)
        ok = (j[None, :] < W) & (rows[:, None] < (PAGE if KEYS else D))
        word = tl.load(where, mask=ok, other=0) if bounded else tl.load(where)
        s0, z0 = _metadata(
            META, tile, first, lane0, lanes, lift, 0, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC,
            D, ROWS, W, WIDE, True,
        )  # fmt: skip
        if BITS < 8:
            s1, z1 = _metadata(
                META, tile, first, lane0, lanes, lift, 1, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC,
                D, ROWS, W, WIDE, True,
            )  # fmt: skip
        if BITS < 4:
            s2, z2 = _metadata(
                META, tile, first, lane0, lanes, lift, 2, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC,
                D, ROWS, W, WIDE, True,
            )  # fmt: skip
            s3, z3 = _metadata(
                META, tile, first, lane0, lanes, lift, 3, KEYS, BITS, GROUP, PER_TOKEN, SYMMETRIC,
                D, ROWS, W, WIDE, True,
            )  # fmt: skip
        if BITS == 8:
            x0 = values_8(word, s0, z0)
            x1 = x0
            x2 = x0
            x3 = x0
        elif BITS == 4:
            x0, x1 = values_4(word, s0, z0, s1, z1)
            x2 = x0
            x3 = x0
        elif BITS == 2:
            x0, x1, x2, x3 = values_2(word, s0, z0, s1, z1, s2, z2, s3, z3)
        else:
            where = HIGH + rows[:, None] * (W // 2) + (j % (W // 2))[None, :]
            high = tl.load(where, mask=ok, other=0) if bounded else tl.load(where)
            high = shifted_left(high, (1 - lanes // (W // 2))[None, :])
            x0, x1, x2, x3 = values_3(word, high, s0, z0, s1, z1, s2, z2, s3, z3)
    return x0, x1, x2, x3


@triton.jit
def logits(
    KEYS, META, tile, u: tl.constexpr, q0, q1, q2, q3, lanes, r0, r1, r2, r3, r_lanes, seen, scale,
    bias, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    SYMMETRIC: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, REST: tl.constexpr, MASKED: tl.constexpr, CAP: tl.constexpr,
    BIASED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Logits times log2(e), [ROWS, N], of the u-th ROWS keys of a page; D is their channels'.

    Queries q meet the first WIDE lanes of each slice, r the REST behind them where there are some.
    """
    low: tl.constexpr = 2 if BITS == 3 else BITS
    page = KEYS + tile * (PAGE * D * BITS // 8)
    high = page + PAGE * D * low // 8
    rows = u * ROWS + tl.arange(0, ROWS)
    k0, k1, k2, k3 = slices(
        page, high, rows, lanes, META, tile, u * ROWS, 0, True, BITS, GROUP, PER_TOKEN, SYMMETRIC,
        D, ROWS, W, WIDE, ASM,
    )  # fmt: skip
    s = tl.dot(k0, q0)
    if BITS < 8:
        s = tl.dot(k1, q1, s)
    if BITS < 4:
        s = tl.dot(k2, q2, s)
        s = tl.dot(k3, q3, s)
    if REST > 0:
        k0, k1, k2, k3 = slices(
            page, high, rows, r_lanes, META, tile, u * ROWS, WIDE, True, BITS, GROUP, PER_TOKEN,
            SYMMETRIC, D, ROWS, W, REST, ASM,
        )  # fmt: skip
        s = tl.dot(k0, r0, s)
        s = tl.dot(k1, r1, s)
        s = tl.dot(k2, r2, s)
        s = tl.dot(k3, r3, s)
    s = capped(s, scale, bias, CAP, BIASED)
    if MASKED:
        s = tl.where((rows + tile * PAGE)[:, None] < seen[None, :], s, FAR)
    return s


@triton.jit
def capped(s, scale, bias, CAP: tl.constexpr, BIASED: tl.constexpr):
    """s * scale, or the capped logits CAP * tanh((s * scale + bias) / CAP), times log2(e).

    Without a cap no softmax sees the bias.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if CAP > 0:
        s = s * (scale * (2 * LOG2E / CAP))
        if BIASED:
            s += (bias * (2 * LOG2E / CAP))[None, :]
        return (CAP * LOG2E) * (1 - 2 / (tl.exp2(s) + 1))
    return s * (scale * LOG2E)
