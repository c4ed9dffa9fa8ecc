"""Quantise and pack whole blocks of tokens: prompts, and what has left the window.

A program reads its block of one head once, finds scale and zero of every group and makes codes of
it in registers: minimum subtracted in float32, zero rounded down and scale up, as
`groups.quantize` says, to the last bit. Codes are put together as 16-bit halves of words, in the
order of `reference.pack`. A head_dim that is no power of two, and values per channel, are read
twice, the second time from the cache.

Floor: 16 bits read and `bits` plus 32 / group bits written for each value.
"""

import triton
import triton.language as tl

from kvtune_kernels.quantising import (
    chosen,
    digits,
    halves,
    inverse,
    numbers,
    planes_of,
    quantised,
    rounded,
)

PAGE = tl.constexpr(64)


@triton.jit
def _row(token, shift, ring, RING: tl.constexpr):
    return (token - shift) % ring if RING else token - shift


@triton.jit
def _key_lines(
    X, CODES, META, x_t, shift, ring, token0, part, PARTS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, SYMMETRIC: tl.constexpr, D: tl.constexpr,
    RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Encodes one group of keys per channel, or a page of keys per token, in one go.

    Of PARTS parts of the lanes, this does one: the channels of a part are neighbours in each slice.
    """
    ROWS: tl.constexpr = PAGE if PER_TOKEN else GROUP
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    W: tl.constexpr = D * LOW // 8
    LANES: tl.constexpr = W // PARTS
    N: tl.constexpr = D // PARTS
    t = token0 + tl.arange(0, ROWS)
    n = tl.arange(0, N)
    c = n // LANES * W + part * LANES + n % LANES
    x = tl.load(X + _row(t, shift, ring, RING)[:, None] * x_t + c[None, :]).to(tl.float32)
    code, meta = quantised(x, BITS, GROUP, PER_TOKEN, SYMMETRIC, D, ASM)
    if PER_TOKEN:
        g = tl.arange(0, D // GROUP)
        page = token0 // PAGE * (D // GROUP * PAGE)
        tl.store(META + page + g[None, :] * PAGE + (t % PAGE)[:, None], meta)
    else:
        tl.store(META + token0 // GROUP * D + c, meta)
    page = CODES + (t // PAGE * (PAGE * D * BITS // 16))[:, None]
    line = (t % PAGE)[:, None]
    u = part * (LANES // 2) + tl.arange(0, LANES // 2)[None, :]
    if BITS == 8:
        pair = code.reshape(ROWS, N // 2, 2) << (tl.arange(0, 2) * 8)[None, None, :]
        half = tl.sum(pair, 2)
    else:
        TURN: tl.constexpr = 5 if BITS == 3 else 6
        half = halves(code & ((1 << LOW) - 1), LOW)
        half = half << TURN | half >> (16 - TURN)
    tl.store(page + line * (W // 2) + u, half.to(tl.uint16))
    if BITS == 3:
        slots = (code >> 2).reshape(ROWS, 4, 2, W // 8, 2, 2)
        i = tl.arange(0, 4)[None, :, None, None, None, None]
        upper = tl.arange(0, 2)[None, None, :, None, None, None]
        k = tl.arange(0, 2)[None, None, None, None, :, None]
        slots = slots << ((4 * i + 2 * k + 6 + upper) % 16)
        half = tl.sum(tl.sum(tl.sum(slots, 4), 2), 1).reshape(ROWS, W // 4)
        u = tl.arange(0, W // 4)[None, :]
        tl.store(page + PAGE * W // 2 + line * (W // 4) + u, half.to(tl.uint16))


@triton.jit
def _key_planes(
    X, PLANES, CODES, META, x_t, shift, ring, token0, part, PARTS: tl.constexpr,
    GROUP: tl.constexpr, C: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Encodes one group of keys as the digits of C virtual channels, or a part of their lanes.

    C is any multiple of 16, so lanes are cut into whole words, and some of the last part are none.
    """
    W: tl.constexpr = C // 4
    LANES: tl.constexpr = triton.next_power_of_2(W) // PARTS
    n = tl.arange(0, 4 * LANES)
    lane = part * LANES + n % LANES
    c = n // LANES * W + lane
    source, plane, count = planes_of(PLANES, c, lane < W)
    t = token0 + tl.arange(0, GROUP)
    x = tl.load(X + _row(t, shift, ring, RING)[:, None] * x_t + source[None, :]).to(tl.float32)
    code, meta = digits(x, plane, count, ASM)
    tl.store(META + token0 // GROUP * C + c, meta, mask=lane < W)
    half = halves(code, 2)
    half = half << 6 | half >> 10
    u = part * (LANES // 2) + tl.arange(0, LANES // 2)
    where = (t // PAGE * (PAGE * C // 8) + t % PAGE * (W // 2))[:, None] + u[None, :]
    tl.store(CODES + where, half.to(tl.uint16), mask=(u < W // 2)[None, :] & (t >= 0)[:, None])


@triton.jit
def _value_columns(
    X, CODES, META, x_t, shift, ring, page, UPPER: tl.constexpr, COUNT: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, SYMMETRIC: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Halves [COUNT, D] of a page of values per token, or of its plane of high bits (UPPER).

    The tokens of one slot at a time are whole tokens, so their scale and zero are found here.
    Symmetric codes allow for a head_dim that is no power of two: zeros change no scale of theirs.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    W: tl.constexpr = PAGE * LOW // 8
    SPAN: tl.constexpr = D2 if GROUP == D else GROUP
    u = tl.arange(0, COUNT)
    c = tl.arange(0, D2)
    g = tl.arange(0, D2 // SPAN)
    ok = (c < D)[None, :] & (u >= 0)[:, None]
    half = tl.zeros([COUNT, D2], tl.int32)
    for i in tl.static_range(8 // LOW):
        for k in tl.static_range(2):
            for upper in tl.static_range(2 if UPPER else 1):
                j = u * 2 + k if BITS == 8 else u // 2 * 4 + u % 2 + (2 * k + upper * (W // 2))
                t = j + i * W
                row = _row(t + page * PAGE, shift, ring, RING)
                x = tl.load(X + row[:, None] * x_t + c[None, :], mask=ok, other=0.0).to(tl.float32)
                code, meta = quantised(x, BITS, SPAN, True, SYMMETRIC, D2, ASM)
                if UPPER:
                    half |= (code >> 2) << ((4 * i + 2 * k + 6 + upper) % 16)
                else:
                    half |= (code & ((1 << LOW) - 1)) << (LOW * (2 * i + k))
                    where = META + page * (D // GROUP * PAGE) + g[None, :] * PAGE + t[:, None]
                    tl.store(where, meta, mask=(g < D // GROUP)[None, :] & (t >= 0)[:, None])
    if BITS != 8 and not UPPER:
        TURN: tl.constexpr = 5 if BITS == 3 else 6
        half = half << TURN | half >> (16 - TURN)
    tl.store(CODES + c[None, :] * COUNT + u[:, None], half.to(tl.uint16), mask=ok)


@triton.jit
def _write_meta(
    X, META, x_t, shift, ring, block, BITS: tl.constexpr, GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    RING: tl.constexpr,
):  # fmt: skip
    """Writes scale and zero of every group of a block."""
    c = tl.arange(0, D2)
    tokens: tl.constexpr = PAGE if PER_TOKEN else GROUP
    for piece in tl.static_range(BLOCK // tokens):
        t = tl.arange(0, tokens)
        row = _row(block * BLOCK + piece * tokens + t, shift, ring, RING)
        ok = (c < D)[None, :] & (t >= 0)[:, None]
        x = tl.load(X + row[:, None] * x_t + c[None, :], mask=ok, other=0.0).to(tl.float32)
        line = block * (BLOCK // tokens) + piece
        if not PER_TOKEN:
            packed = chosen(tl.min(x, 0), tl.max(x, 0), 1.0 / ((1 << BITS) - 1))
            tl.store(META + line * D + c, packed, mask=c < D)
        elif GROUP == D:
            low = tl.min(tl.where(ok, x, float("inf")), 1)
            high = tl.max(tl.where(ok, x, float("-inf")), 1)
            tl.store(META + line * PAGE + t, chosen(low, high, 1.0 / ((1 << BITS) - 1)))
        else:
            x = x.reshape(PAGE, D2 // GROUP, GROUP)
            packed = chosen(tl.min(x, 2), tl.max(x, 2), 1.0 / ((1 << BITS) - 1))
            g = tl.arange(0, D2 // GROUP)
            where = META + line * (D // GROUP * PAGE) + g[None, :] * PAGE + t[:, None]
            tl.store(where, packed, mask=(g < D // GROUP)[None, :] & (t >= 0)[:, None])


@triton.jit
def _codes(
    X, META, x_t, shift, ring, page, row0, rows, lanes, ok, KEYS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr,
    ALIKE: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Codes of a page at rows (tokens of keys, channels of values) and lanes, as int32.

    ALIKE: all rows belong to the same group, so metadata is read once for all of them.
    """
    if KEYS:
        t = rows[:, None]
        c = lanes[None, :]
    else:
        t = lanes[None, :]
        c = rows[:, None]
    token = _row(page * PAGE + t, shift, ring, RING)
    x = tl.load(X + token * x_t + c, mask=ok, other=0.0).to(tl.float32)
    if ALIKE and KEYS:
        t = row0
    if ALIKE and not KEYS:
        c = row0
    if PER_TOKEN:
        at = page * (D // GROUP * PAGE) + c // GROUP * PAGE + t
    else:
        at = (page * PAGE + t) // GROUP * D + c
    # metadata of this block was written by the same program
    there = ok if not ALIKE else (lanes < (D if KEYS else PAGE))[None, :]
    meta = tl.load(META + at, mask=there, other=1)
    scale, zero = numbers(meta)
    return rounded((x - zero) * inverse(scale, ASM), (1 << BITS) - 1, ASM)


@triton.jit
def _write_codes(
    X, CODES, META, x_t, shift, ring, page, row0, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    ALIKE: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Writes lines row0 to row0 + ROWS - 1 of a page. CODES holds uint16 halves of words."""
    LANES: tl.constexpr = D if KEYS else PAGE
    LINES: tl.constexpr = PAGE if KEYS else D
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    W: tl.constexpr = LANES * LOW // 8
    SLICES: tl.constexpr = 8 // LOW
    WIDE: tl.constexpr = triton.next_power_of_2(W // 2)
    CODES += page * (PAGE * D * BITS // 16)
    rows = row0 + tl.arange(0, ROWS)
    u = tl.arange(0, WIDE)
    ok = (u < W // 2)[None, :] & (rows < LINES)[:, None]
    half = tl.zeros([ROWS, WIDE], tl.int32)
    for i in tl.static_range(SLICES):
        for k in tl.static_range(2):
            j = 2 * u + k if BITS == 8 else u // 2 * 4 + 2 * k + u % 2
            code = _codes(
                X, META, x_t, shift, ring, page, row0, rows, j + i * W, ok, KEYS, BITS, GROUP,
                PER_TOKEN, D, ALIKE, RING, ASM,
            )  # fmt: skip
            half |= (code & ((1 << LOW) - 1)) << (LOW * (2 * i + k))
    if BITS != 8:
        TURN: tl.constexpr = 5 if BITS == 3 else 6
        half = half << TURN | half >> (16 - TURN)
    tl.store(CODES + rows[:, None] * (W // 2) + u[None, :], half.to(tl.uint16), mask=ok)
    if BITS == 3:
        HIGH: tl.constexpr = triton.next_power_of_2(W // 4)
        u = tl.arange(0, HIGH)
        ok = (u < W // 4)[None, :] & (rows < LINES)[:, None]
        half = tl.zeros([ROWS, HIGH], tl.int32)
        for i in tl.static_range(SLICES):
            for k in tl.static_range(2):
                for upper in tl.static_range(2):
                    j = upper * (W // 2) + u // 2 * 4 + 2 * k + u % 2
                    code = _codes(
                        X, META, x_t, shift, ring, page, row0, rows, j + i * W, ok, KEYS, BITS,
                        GROUP, PER_TOKEN, D, ALIKE, RING, ASM,
                    )  # fmt: skip
                    half |= (code >> 2) << ((4 * i + 2 * k + 6 + upper) % 16)
        where = CODES + LINES * W // 2 + rows[:, None] * (W // 4) + u[None, :]
        tl.store(where, half.to(tl.uint16), mask=ok)


@triton.jit
def encode_block(
    X, PLANES, CODES, META, x_t, shift, ring, block, part, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, C: tl.constexpr, SYMMETRIC: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PARTS: tl.constexpr,
    RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Encodes one block of one head, or a part of its lanes; `block` counts blocks of BLOCK tokens.

    C > 0: as many virtual channels, which PLANES tells.
    """
    if C > 0:
        for piece in tl.static_range(BLOCK // GROUP):
            _key_planes(
                X, PLANES, CODES, META, x_t, shift, ring, block * BLOCK + piece * GROUP, part,
                PARTS, GROUP, C, RING, ASM,
            )  # fmt: skip
    elif D == D2 and D > 32 and KEYS:
        rows: tl.constexpr = PAGE if PER_TOKEN else GROUP
        for piece in tl.static_range(BLOCK // rows):
            _key_lines(
                X, CODES, META, x_t, shift, ring, block * BLOCK + piece * rows, part, PARTS, BITS,
                GROUP, PER_TOKEN, SYMMETRIC, D, RING, ASM,
            )  # fmt: skip
    elif (D == D2 or SYMMETRIC) and PER_TOKEN and not KEYS:
        LOW: tl.constexpr = 2 if BITS == 3 else BITS
        for piece in tl.static_range(BLOCK // PAGE):
            page = block * (BLOCK // PAGE) + piece
            codes = CODES + page * (PAGE * D * BITS // 16)
            _value_columns(
                X, codes, META, x_t, shift, ring, page, False, PAGE * LOW // 16, BITS, GROUP,
                SYMMETRIC, D, D2, RING, ASM,
            )  # fmt: skip
            if BITS == 3:
                _value_columns(
                    X, codes + PAGE * D // 8, META, x_t, shift, ring, page, True, PAGE // 16,
                    BITS, GROUP, SYMMETRIC, D, D2, RING, ASM,
                )  # fmt: skip
    else:
        tl.static_assert(not SYMMETRIC, "keys with symmetric codes need head_dim 64, 128 or 256")
        _encode_piecewise(
            X, CODES, META, x_t, shift, ring, block, KEYS, BITS, GROUP, PER_TOKEN, BLOCK, D, D2,
            RING, ASM,
        )  # fmt: skip


@triton.jit
def _encode_piecewise(
    X, CODES, META, x_t, shift, ring, block, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The same for any head_dim and axis: metadata first, then codes of what is read again."""
    _write_meta(X, META, x_t, shift, ring, block, BITS, GROUP, PER_TOKEN, BLOCK, D, D2, RING)
    tl.debug_barrier()  # other threads of this program wrote the metadata that is read now
    if KEYS:
        ROWS: tl.constexpr = 32
        LINES: tl.constexpr = PAGE
        ALIKE: tl.constexpr = not PER_TOKEN
    else:
        ROWS: tl.constexpr = (D2 if GROUP == D else GROUP) if PER_TOKEN else 32
        LINES: tl.constexpr = D
        ALIKE: tl.constexpr = PER_TOKEN
    for piece in tl.static_range(BLOCK // PAGE):
        for row0 in tl.range(0, LINES, ROWS):
            _write_codes(
                X, CODES, META, x_t, shift, ring, block * (BLOCK // PAGE) + piece, row0, KEYS,
                BITS, GROUP, PER_TOKEN, D, ROWS, ALIKE, RING, ASM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "shift", "ring", "heads"])
def encode(
    X, PLANES, CODES, META, x_b, x_h, x_t, c_b, c_h, m_b, m_h, first, shift, ring, heads,
    KEYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    C: tl.constexpr, SYMMETRIC: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, PARTS: tl.constexpr, RING: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One block of one head a program, or a part of its lanes, from block `first` on.

    Token t lies in row t - shift of X, modulo `ring` with RING.
    """
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    encode_block(
        X + b * x_b + h * x_h, PLANES + h * C, CODES + b * c_b + h * c_h, META + b * m_b + h * m_h,
        x_t, shift, ring, first + tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, KEYS, BITS,
        GROUP, PER_TOKEN, C, SYMMETRIC, BLOCK, D, D2, PARTS, RING, ASM,
    )  # fmt: skip
