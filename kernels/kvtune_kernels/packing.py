"""Quantise and pack whole blocks of tokens, and append decoded tokens, closing blocks on the way.

A program reads its block of one head once from memory to find scale and zero of every group, and
again from its cache to make codes of it: minimum subtracted in float32, zero rounded down and scale
up, as `reference.quantize` says, to the last bit. Codes are put together as 16-bit halves of words,
in the order of `reference.pack`.

Floor: 16 bits read and `bits` plus 32 / group bits written for each value.
"""

import triton
import triton.language as tl

PAGE = tl.constexpr(64)
LIMIT = tl.constexpr(65504.0)  # the largest float16
EPS = tl.constexpr(2.0**-10)  # between 1 and the next float16
LEAST = tl.constexpr(2.0**-24)  # the smallest float16


@triton.jit
def _scale_and_zero(low, high, BITS: tl.constexpr):
    """Float16 scale and zero, as uint32, of groups with these extremes."""
    zero = low.to(tl.float16)
    zero = tl.where(
        zero.to(tl.float32) > low, (low - tl.abs(low) * EPS - LEAST).to(tl.float16), zero
    )
    step = tl.div_rn(high - zero.to(tl.float32), (1 << BITS) - 1.0)
    scale = step.to(tl.float16)
    scale = tl.where(scale.to(tl.float32) < step, (step + step * EPS + LEAST).to(tl.float16), scale)
    scale = tl.where(scale.to(tl.float32) == 0.0, 1.0, scale.to(tl.float32)).to(tl.float16)
    bits = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
    return bits | zero.to(tl.uint16, bitcast=True).to(tl.uint32) << 16


@triton.jit
def _clamped(where, mask):
    x = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _write_meta(
    X, META, x_t, shift, ring, block, BITS: tl.constexpr, GROUP: tl.constexpr,
    PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """Writes scale and zero of every group of a block."""
    c = tl.arange(0, D2)
    tokens: tl.constexpr = PAGE if PER_TOKEN else GROUP
    for piece in tl.static_range(BLOCK // tokens):
        t = tl.arange(0, tokens)
        row = (block * BLOCK + piece * tokens + t - shift) % ring
        ok = (c < D)[None, :] & (t >= 0)[:, None]
        x = _clamped(X + row[:, None] * x_t + c[None, :], ok)
        line = block * (BLOCK // tokens) + piece
        if not PER_TOKEN:
            packed = _scale_and_zero(tl.min(x, 0), tl.max(x, 0), BITS)
            tl.store(META + line * D + c, packed, mask=c < D)
        elif GROUP == D:
            low = tl.min(tl.where(ok, x, LIMIT), 1)
            high = tl.max(tl.where(ok, x, -LIMIT), 1)
            tl.store(META + line * PAGE + t, _scale_and_zero(low, high, BITS))
        else:
            x = x.reshape(PAGE, D2 // GROUP, GROUP)
            packed = _scale_and_zero(tl.min(x, 2), tl.max(x, 2), BITS)
            g = tl.arange(0, D2 // GROUP)
            where = META + line * (D // GROUP * PAGE) + g[None, :] * PAGE + t[:, None]
            tl.store(where, packed, mask=(g < D // GROUP)[None, :] & (t >= 0)[:, None])


@triton.jit
def _codes(
    X, META, x_t, shift, ring, page, row0, rows, lanes, ok, KEYS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr,
    ALIKE: tl.constexpr,
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
    token = (page * PAGE + t - shift) % ring
    x = _clamped(X + token * x_t + c, ok)
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
    scale = (meta & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    zero = (meta >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    magic: tl.constexpr = 12582912.0  # 1.5 * 2**23: adding it rounds to an even integer
    code = ((x - zero) * tl.div_rn(1.0, scale) + magic) - magic
    return tl.minimum(tl.maximum(code, 0.0), (1 << BITS) - 1.0).to(tl.int32)


@triton.jit
def _write_codes(
    X, CODES, META, x_t, shift, ring, page, row0, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    ALIKE: tl.constexpr,
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
                PER_TOKEN, D, ALIKE,
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
                        GROUP, PER_TOKEN, D, ALIKE,
                    )  # fmt: skip
                    half |= (code >> 2) << ((4 * i + 2 * k + 6 + upper) % 16)
        where = CODES + LINES * W // 2 + rows[:, None] * (W // 4) + u[None, :]
        tl.store(where, half.to(tl.uint16), mask=ok)


@triton.jit
def _encode_block(
    X, CODES, META, x_t, shift, ring, block, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr,
):  # fmt: skip
    """Encodes one block of one head; `block` counts blocks of BLOCK tokens."""
    _write_meta(X, META, x_t, shift, ring, block, BITS, GROUP, PER_TOKEN, BLOCK, D, D2)
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
                BITS, GROUP, PER_TOKEN, D, ROWS, ALIKE,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first", "shift", "ring", "heads"])
def encode(
    X, CODES, META, x_b, x_h, x_t, c_b, c_h, m_b, m_h, first, shift, ring, heads,
    KEYS: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    """One block of one head a program, from block `first` on; token t lies in row (t - shift) %
    ring of X."""
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    _encode_block(
        X + b * x_b + h * x_h, CODES + b * c_b + h * c_h, META + b * m_b + h * m_h, x_t, shift,
        ring, first + tl.program_id(0), KEYS, BITS, GROUP, PER_TOKEN, BLOCK, D, D2,
    )  # fmt: skip


@triton.jit
def _append_side(
    NEW, EXACT, CODES, META, known, closed, due, ring, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr,
):  # fmt: skip
    c = tl.arange(0, D2)
    slot = known if known < SINKS else SINKS + (known - SINKS) % ring
    tl.store(EXACT + slot * D + c, tl.load(NEW + c, mask=c < D), mask=c < D)
    tail = EXACT + SINKS * D
    for block in tl.range(closed // BLOCK, due // BLOCK):  # mostly none
        _encode_block(
            tail, CODES, META, D, 0, ring, block, KEYS, BITS, GROUP, PER_TOKEN, BLOCK, D, D2
        )


@triton.jit(do_not_specialize=["ring", "batch", "heads"])
def append(
    NK, NV, EK, EV, KC, KM, VC, VM, STATE, NEXT, nk_b, nk_h, nv_b, nv_h, ek_b, ek_h, ev_b, ev_h,
    kc_b, kc_h, km_b, km_h, vc_b, vc_h, vm_b, vm_h, ring, batch, heads,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr,
):  # fmt: skip
    """Puts one token of one head and side into the ring and encodes the block that has left the
    window, if one has. STATE [3, B] is read, NEXT is what attention reads and `merge` makes STATE.
    """
    side = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    known = tl.load(STATE + b)
    closed = tl.load(STATE + 2 * batch + b)
    due = tl.maximum(tl.maximum(known - (SINKS + RECENT), 0) // BLOCK * BLOCK, closed)
    if side == 0:
        _append_side(
            NK + b * nk_b + h * nk_h, EK + b * ek_b + h * ek_h, KC + b * kc_b + h * kc_h,
            KM + b * km_b + h * km_h, known, closed, due, ring, True, K_BITS, K_GROUP,
            K_PER_TOKEN, SINKS, BLOCK, D, D2,
        )  # fmt: skip
    else:
        _append_side(
            NV + b * nv_b + h * nv_h, EV + b * ev_b + h * ev_h, VC + b * vc_b + h * vc_h,
            VM + b * vm_b + h * vm_h, known, closed, due, ring, False, V_BITS, V_GROUP,
            V_PER_TOKEN, SINKS, BLOCK, D, D2,
        )  # fmt: skip
    if side == 0 and h == 0:
        tl.store(NEXT + b, known + 1)
        tl.store(NEXT + batch + b, due)
        tl.store(NEXT + 2 * batch + b, due)
