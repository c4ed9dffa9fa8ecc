"""Attention over packed pages and exact tokens, split over the context (Flash-Decoding).

One program of one warp takes one kv head and a stretch of pages; the query heads that share the kv
head are the columns of its products S' = K Q' and O' = V' P', so packed codes are the left
operands: they go from shared memory into registers by LDSM, become float16 there (`codes`), and are
read once for all heads. A warp alone needs no barrier, and many of them hide each other's waiting.
A few more programs take the exact tokens (sinks and window). `merge` joins all by log-sum-exp.

Floor: the packed bytes, each read once, at the copy rate of the device; the partial results,
4 * (head_dim + 1) bytes a split and query head written and read, come on top.
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
EXACT = tl.constexpr(16)  # exact tokens that are read at once
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
    META, tile, first: tl.constexpr, lift, i: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Scale * lift and zero - scale * lift of slice i of a tile, over its [ROWS, WIDE] values.

    A tile of keys has tokens as rows and channels as lanes, a tile of values the other way round.
    """
    # extents of the slice in tokens and channels, and how many groups they cross
    tokens: tl.constexpr = ROWS if KEYS else WIDE
    channels: tl.constexpr = WIDE if KEYS else ROWS
    token0: tl.constexpr = first if KEYS else i * W
    channel0: tl.constexpr = i * W if KEYS else 0
    if PER_TOKEN:  # pages of [D / GROUP, PAGE]
        nt: tl.constexpr = tokens
        # a head of 96 channels is cut into slices of 48, which groups of 32 do not fit
        whole: tl.constexpr = not KEYS or W % GROUP == 0 or GROUP % W == 0
        few: tl.constexpr = channels // GROUP if channels > GROUP else 1
        nc: tl.constexpr = few if whole else channels
        t = token0 + tl.arange(0, nt)
        c = channel0 // GROUP + tl.arange(0, nc)
        if not whole:
            c = (channel0 + tl.arange(0, nc)) // GROUP
        there = c < D // GROUP
        at = META + tile * (D // GROUP * PAGE)
        c_step: tl.constexpr = PAGE
    else:  # lines of D channels, one for GROUP tokens; written so that equal lines look equal
        nt: tl.constexpr = tokens // GROUP if tokens > GROUP else 1
        nc: tl.constexpr = channels
        t = tl.arange(0, nt) * D
        c = channel0 + tl.arange(0, nc)
        there = tl.arange(0, nc) < (W if KEYS else D)
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
    bounded: tl.constexpr = WIDE != W if KEYS else ROWS != D
    if bounded:
        meta = tl.load(where, mask=there, other=0)
    else:
        meta = tl.load(where)
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
    LINES, HIGH, rows, META, tile, first: tl.constexpr, i: tl.constexpr, KEYS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Slice i of a tile as float16 values [ROWS, WIDE], in plain Triton."""
    j = tl.arange(0, WIDE)
    s, z = _metadata(
        META, tile, first, None, i, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE, False
    )
    ok = (j[None, :] < W) & (rows[:, None] < (PAGE if KEYS else D))
    low = LINES + rows[:, None] * W
    high = HIGH + rows[:, None] * (W // 2)
    x = portable_codes((low, high), j[None, :], i, BITS, W, ok) * s.to(tl.float32) + z.to(
        tl.float32
    )
    return tl.where(ok, x, 0.0).to(tl.float16)


@triton.jit
def _slices(
    LINES, HIGH, rows, lanes, META, tile, first: tl.constexpr, KEYS: tl.constexpr, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, WIDE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The 8 // BITS slices (four for 3 bits) of a packed tile, each as float16 [ROWS, WIDE];
    what a format has no use for repeats the first."""
    if not ASM:
        x0 = _slice(
            LINES, HIGH, rows, META, tile, first, 0, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE
        )  # fmt: skip
        x1 = x0
        x2 = x0
        x3 = x0
        if BITS < 8:
            x1 = _slice(
                LINES, HIGH, rows, META, tile, first, 1, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W,
                WIDE,
            )  # fmt: skip
        if BITS < 4:
            x2 = _slice(
                LINES, HIGH, rows, META, tile, first, 2, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W,
                WIDE,
            )  # fmt: skip
            x3 = _slice(
                LINES, HIGH, rows, META, tile, first, 3, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W,
                WIDE,
            )  # fmt: skip
    else:
        # codes of lanes 0, 1 of four lie two bits lower than those of lanes 2, 3
        lift = tl.where(lanes % 4 < 2, 4.0, 1.0).to(tl.float16) * (8.0 if BITS == 3 else 4.0)
        j = tl.arange(0, WIDE)
        where = LINES + rows[:, None] * W + j[None, :]
        bounded: tl.constexpr = WIDE != W or (ROWS != D and not KEYS)
        ok = (j[None, :] < W) & (rows[:, None] < (PAGE if KEYS else D))
        if bounded:
            word = tl.load(where, mask=ok, other=0)
        else:
            word = tl.load(where)
        s0, z0 = _metadata(
            META, tile, first, lift, 0, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE, True
        )
        if BITS < 8:
            s1, z1 = _metadata(
                META, tile, first, lift, 1, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE, True
            )
        if BITS < 4:
            s2, z2 = _metadata(
                META, tile, first, lift, 2, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE, True
            )
            s3, z3 = _metadata(
                META, tile, first, lift, 3, KEYS, BITS, GROUP, PER_TOKEN, D, ROWS, W, WIDE, True
            )
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
            if bounded:
                high = tl.load(where, mask=ok, other=0)
            else:
                high = tl.load(where)
            high = shifted_left(high, (1 - lanes // (W // 2))[None, :])
            x0, x1, x2, x3 = values_3(word, high, s0, z0, s1, z1, s2, z2, s3, z3)
    return x0, x1, x2, x3


@triton.jit
def _logits(
    KEYS, META, tile, u: tl.constexpr, q0, q1, q2, q3, lanes, seen, scale, BITS: tl.constexpr,
    GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr,
    W: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr, CAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Logits times log2(e), [ROWS, N], of the u-th ROWS keys of a page."""
    low: tl.constexpr = 2 if BITS == 3 else BITS
    page = KEYS + tile * (PAGE * D * BITS // 8)
    rows = u * ROWS + tl.arange(0, ROWS)
    k0, k1, k2, k3 = _slices(
        page, page + PAGE * D * low // 8, rows, lanes, META, tile, u * ROWS, True, BITS, GROUP, PER_TOKEN,
        D, ROWS, W, WIDE, ASM,
    )  # fmt: skip
    s = tl.dot(k0, q0)
    if BITS < 8:
        s = tl.dot(k1, q1, s)
    if BITS < 4:
        s = tl.dot(k2, q2, s)
        s = tl.dot(k3, q3, s)
    s = _capped(s, scale, CAP)
    if MASKED:
        s = tl.where((rows + tile * PAGE)[:, None] < seen[None, :], s, FAR)
    return s


@triton.jit
def _capped(s, scale, CAP: tl.constexpr):
    """s * scale, or the capped logits CAP * tanh(s * scale / CAP), times log2(e)."""
    LOG2E: tl.constexpr = 1.4426950408889634
    if CAP > 0:
        s = s * (scale * (2 * LOG2E / CAP))
        return (CAP * LOG2E) * (1 - 2 / (tl.exp2(s) + 1))
    return s * (scale * LOG2E)


@triton.jit
def _exact(
    q_row, used, position, due, EK, EV, known, start, part, splits, ring, shift, scale, top, total,
    acc, D: tl.constexpr, D2: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Goes on with this part's share of the exact tokens: the sinks, and the ring behind them."""
    channel = tl.arange(0, D2)
    q = tl.load(
        q_row[None, :] + channel[:, None], mask=(channel[:, None] < D) & used[None, :], other=0.0
    )
    if not ASM:
        q = q.to(tl.float32)
    sinks = tl.minimum(known, SINKS)
    live = known - start  # exact tokens: the sinks, then from `start` on
    for e0 in tl.range(part * EXACT, live, splits * EXACT, num_stages=1):
        e = e0 + tl.arange(0, EXACT)
        token = start + e - sinks  # after the sinks
        slot = tl.where(e < sinks, e, SINKS + (token - shift) % ring)
        ok = (e < live)[:, None] & (channel < D)[None, :]  # what lies elsewhere may be NaN
        k = tl.load(EK + slot[:, None] * D + channel[None, :], mask=ok, other=0.0)
        v = tl.load(EV + slot[:, None] * D + channel[None, :], mask=ok, other=0.0)
        if not ASM:  # the interpreter multiplies the bit patterns of bfloat16
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = _capped(tl.dot(k, q, input_precision="ieee"), scale, CAP)
        sees = tl.where(
            (e < sinks)[:, None],
            e[:, None] <= position[None, :],
            (token[:, None] >= due[None, :]) & (token[:, None] + sinks <= position[None, :]),
        )
        s = tl.where(sees & (e < live)[:, None], s, FAR)
        peak = tl.maximum(top, tl.max(s, 0))
        fade = tl.exp2(top - peak)
        top = peak
        p = tl.where(s > FAR, tl.exp2(s - top[None, :]), 0.0)
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    return top, total, acc


@triton.jit(do_not_specialize=["ring", "shift", "batch", "heads", "share", "count", "splits"])
def attend_split(
    Q, KC, KM, VC, VM, EK, EV, STATE, LANES, OUT, LSE, scale,
    q_b, q_h, q_m, kc_b, kc_h, km_b, km_h, vc_b, vc_h, vm_b, vm_h, ek_b, ek_h, ev_b, ev_h,
    ring, shift, batch, heads, share, count, splits,
    N: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr, CAP: tl.constexpr,
    STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head over one stretch of pages and some exact tokens.

    STATE [3, B] holds the tokens seen of each row, the paged tokens that all its queries read, and
    its paged tokens. Column c of a product is query head c // count at query c % count.
    """
    part = tl.program_id(0)
    bh = tl.program_id(1)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    column = tl.program_id(2) * N + tl.arange(0, N)
    used = column < share * count
    query = column % count
    known = tl.load(STATE + b)
    start = tl.load(STATE + batch + b)
    paged = tl.load(STATE + 2 * batch + b)
    position = known - count + query
    # what a query reads from pages depends on its position alone
    due = tl.maximum(position - (SINKS + RECENT), 0) // BLOCK * BLOCK
    due = tl.minimum(tl.maximum(due, start), paged)
    q_row = Q + b * q_b + (h * share + column // count) * q_h + query * q_m
    channel = tl.arange(0, D2)
    top = tl.full([N], FAR, tl.float32)
    total = tl.zeros([N], tl.float32)
    acc = tl.zeros([D2, N], tl.float32)
    KC += b * kc_b + h * kc_h
    KM += b * km_b + h * km_h
    VC += b * vc_b + h * vc_h
    VM += b * vm_b + h * vm_h
    V_LOW: tl.constexpr = 2 if V_BITS == 3 else V_BITS
    K_LOW: tl.constexpr = 2 if K_BITS == 3 else K_BITS
    W: tl.constexpr = D * K_LOW // 8
    WIDE: tl.constexpr = D2 * K_LOW // 8 if D2 * K_LOW // 8 > 16 else 16
    ROWS: tl.constexpr = PAGE * V_LOW // 8  # tokens of a slice of values
    lane = tl.arange(0, WIDE)
    ok = (lane[:, None] < W) & used[None, :]
    q0 = tl.load(q_row[None, :] + lane[:, None], mask=ok, other=0.0).to(tl.float16)
    q1 = q0
    q2 = q0
    q3 = q0
    if K_BITS < 8:
        q1 = tl.load(q_row[None, :] + W + lane[:, None], mask=ok, other=0.0).to(tl.float16)
    if K_BITS < 4:
        q2 = tl.load(q_row[None, :] + 2 * W + lane[:, None], mask=ok, other=0.0).to(tl.float16)
        q3 = tl.load(q_row[None, :] + 3 * W + lane[:, None], mask=ok, other=0.0).to(tl.float16)
    # loaded, not made: so they can follow the codes into the layout of an operand
    k_lanes = tl.load(LANES + lane)
    v_lanes = tl.load(LANES + tl.arange(0, ROWS))
    tiles = paged // PAGE
    stretch = (tiles + splits - 1) // splits
    begin = part * stretch
    for tile in tl.range(begin, tl.minimum(begin + stretch, tiles), num_stages=STAGES):
        s0 = _logits(
            KC, KM, tile, 0, q0, q1, q2, q3, k_lanes, due, scale, K_BITS, K_GROUP, K_PER_TOKEN,
            D, ROWS, W, WIDE, MASKED, CAP, ASM,
        )  # fmt: skip
        peak = tl.max(s0, 0)
        if V_BITS < 8:
            s1 = _logits(
                KC, KM, tile, 1, q0, q1, q2, q3, k_lanes, due, scale, K_BITS, K_GROUP, K_PER_TOKEN,
                D, ROWS, W, WIDE, MASKED, CAP, ASM,
            )  # fmt: skip
            peak = tl.max(tl.maximum(s0, s1), 0)
        if V_BITS < 4:
            s2 = _logits(
                KC, KM, tile, 2, q0, q1, q2, q3, k_lanes, due, scale, K_BITS, K_GROUP, K_PER_TOKEN,
                D, ROWS, W, WIDE, MASKED, CAP, ASM,
            )  # fmt: skip
            s3 = _logits(
                KC, KM, tile, 3, q0, q1, q2, q3, k_lanes, due, scale, K_BITS, K_GROUP, K_PER_TOKEN,
                D, ROWS, W, WIDE, MASKED, CAP, ASM,
            )  # fmt: skip
            peak = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
        peak = tl.maximum(top, peak)
        fade = tl.exp2(top - peak)
        top = peak
        page = VC + tile * (PAGE * D * V_BITS // 8)
        v0, v1, v2, v3 = _slices(
            page, page + PAGE * D * V_LOW // 8, channel, v_lanes, VM, tile, 0, False, V_BITS,
            V_GROUP, V_PER_TOKEN, D, D2, ROWS, ROWS, ASM,
        )  # fmt: skip
        p = tl.exp2(s0 - top[None, :])
        mass = p
        acc = tl.dot(v0, p.to(tl.float16), acc * fade[None, :])
        if V_BITS < 8:
            p = tl.exp2(s1 - top[None, :])
            mass += p
            acc = tl.dot(v1, p.to(tl.float16), acc)
        if V_BITS < 4:
            p = tl.exp2(s2 - top[None, :])
            mass += p
            acc = tl.dot(v2, p.to(tl.float16), acc)
            p = tl.exp2(s3 - top[None, :])
            mass += p
            acc = tl.dot(v3, p.to(tl.float16), acc)
        total = total * fade + tl.sum(mass, 0)
    top, total, acc = _exact(
        q_row, used, position, due, EK + b * ek_b + h * ek_h, EV + b * ev_b + h * ev_h, known,
        start, part, splits, ring, shift, scale, top, total, acc, D, D2, SINKS, CAP, ASM,
    )  # fmt: skip
    some = top > FAR
    total = tl.where(some, total, 1.0)
    place = (bh.to(tl.int64) * splits + part) * (share * count) + column
    tl.store(
        OUT + place[None, :] * D + channel[:, None],
        tl.where(some[None, :], acc / total[None, :], 0.0),
        mask=used[None, :] & (channel[:, None] < D),
    )
    tl.store(LSE + place, tl.where(some, top + tl.log2(total), FAR), mask=used)


@triton.jit(do_not_specialize=["batch", "heads", "share", "count", "splits"])
def merge(
    OUT, LSE, RESULT, STATE, NEXT, r_b, r_h, r_m, batch, heads, share, count, splits,
    ADVANCE: tl.constexpr, D: tl.constexpr, D2: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Joins partial results by log-sum-exp: one program for each query and query head.

    With ADVANCE the last step's state becomes the next one's, since no kernel reads the old one any
    more.
    """
    row = tl.program_id(0)
    bh = (row // (share * count)).to(tl.int64)
    column = row % (share * count)
    b = bh // heads
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, D2)
    there = part < splits
    place = (bh * splits + part) * (share * count) + column
    lse = tl.load(LSE + place, mask=there, other=FAR)
    weight = tl.where(there, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    weight = weight / tl.sum(weight, 0)
    out = tl.load(
        OUT + place[:, None] * D + channel[None, :],
        mask=there[:, None] & (channel < D)[None, :],
        other=0.0,
    )
    h = bh % heads * share + column // count
    where = RESULT + b * r_b + h * r_h + column % count * r_m + channel
    tl.store(where, tl.sum(out * weight[:, None], 0).to(RESULT.dtype.element_ty), mask=channel < D)
    if ADVANCE and row % (heads * share * count) == 0:
        for i in tl.static_range(3):
            tl.store(STATE + i * batch + b, tl.load(NEXT + i * batch + b))
