"""Attention over packed pages and exact tokens, split over the context (Flash-Decoding).

One program of one warp takes one kv head and a stretch of pages; the query heads that share the kv
head are the columns of its products S' = K Q' and O' = V' P', so packed codes are the left
operands: they go from shared memory into registers by LDSM, become float16 there (`codes`), and are
read once for all heads. A warp alone needs no barrier, and many of them hide each other's waiting.
The exact tokens (sinks and window) are shared out among the programs, or get some of their own.
`merge` joins the partial results by log-sum-exp. (Joining them in the last program of a head to end
saves a launch and was slower: 15.1 us against 12.8 for 2,048 tokens, one warp against many.)

Floor: the packed bytes, each read once, at the copy rate of the device; the partial results,
4 * (head_dim + 1) bytes a split and query head written and read, come on top.
"""

import triton
import triton.language as tl

from kvtune_kernels.tiles import FAR, PAGE, capped, logits, slices

EXACT = tl.constexpr(16)  # exact tokens that are read at once


@triton.jit
def exact_tokens(
    q_row, used, position, due, EK, EV, known, start, part, parts, ring, shift, scale, bias, top,
    total, acc, D: tl.constexpr, D2: tl.constexpr, SINKS: tl.constexpr, CAP: tl.constexpr,
    BIASED: tl.constexpr, ASM: tl.constexpr,
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
    begin = tl.where(part < 0, live, part * EXACT)
    for e0 in tl.range(begin, live, parts * EXACT, num_stages=1):
        e = e0 + tl.arange(0, EXACT)
        token = start + e - sinks  # after the sinks
        slot = tl.where(e < sinks, e, SINKS + (token - shift) % ring)
        ok = (e < live)[:, None] & (channel < D)[None, :]  # what lies elsewhere may be NaN
        k = tl.load(EK + slot[:, None] * D + channel[None, :], mask=ok, other=0.0)
        v = tl.load(EV + slot[:, None] * D + channel[None, :], mask=ok, other=0.0)
        if not ASM:  # the interpreter multiplies the bit patterns of bfloat16
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = capped(tl.dot(k, q, input_precision="ieee"), scale, bias, CAP, BIASED)
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


@triton.jit
def _asked(q_row, used, PLANES, lane, i: tl.constexpr, CHANNELS: tl.constexpr, W: tl.constexpr):
    """Queries [WIDE, N] at the channels of slice i; with planes, at those of their sources."""
    channel = i * W + lane
    if CHANNELS > 0:
        channel = tl.load(PLANES + channel, mask=lane < W, other=0) & 0xFFFF
    ok = (lane[:, None] < W) & used[None, :]
    return tl.load(q_row[None, :] + channel[:, None], mask=ok, other=0.0).to(tl.float16)


@triton.jit
def packed_tokens(
    q_row, used, due, KC, KM, VC, VM, PLANES, LANES, begin, end, scale, bias,
    N: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr, K_SYMMETRIC: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    V_SYMMETRIC: tl.constexpr, CAP: tl.constexpr, BIASED: tl.constexpr, STAGES: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Attention of N columns to the pages `begin` to `end` of one kv head, of which a column sees
    the tokens below its `due` (MASKED): running maximum, sum of weights [N], and sums [D2, N]."""
    channel = tl.arange(0, D2)
    top = tl.full([N], FAR, tl.float32)
    total = tl.zeros([N], tl.float32)
    acc = tl.zeros([D2, N], tl.float32)
    V_LOW: tl.constexpr = 2 if V_BITS == 3 else V_BITS
    K_LOW: tl.constexpr = 2 if K_BITS == 3 else K_BITS
    C: tl.constexpr = CHANNELS if CHANNELS > 0 else D
    W: tl.constexpr = C * K_LOW // 8
    ALL: tl.constexpr = triton.next_power_of_2(W) if W > 16 else 16
    # what lies behind a power of two, as of planes of 2.25 to 3 bits, is read on its own where that
    # is less than padding all to the next one
    HALF: tl.constexpr = ALL // 2
    BEHIND: tl.constexpr = triton.next_power_of_2(W - HALF) if W - HALF > 16 else 16
    REST: tl.constexpr = BEHIND if CHANNELS > 0 and HALF + BEHIND < ALL else 0
    WIDE: tl.constexpr = HALF if REST > 0 else ALL
    ROWS: tl.constexpr = PAGE * V_LOW // 8  # tokens of a slice of values
    lane = tl.arange(0, WIDE)
    q0 = _asked(q_row, used, PLANES, lane, 0, CHANNELS, W)
    q1 = q0
    q2 = q0
    q3 = q0
    if K_BITS < 8:
        q1 = _asked(q_row, used, PLANES, lane, 1, CHANNELS, W)
    if K_BITS < 4:
        q2 = _asked(q_row, used, PLANES, lane, 2, CHANNELS, W)
        q3 = _asked(q_row, used, PLANES, lane, 3, CHANNELS, W)
    r0 = q0
    r1 = q1
    r2 = q2
    r3 = q3
    if REST > 0:
        behind = WIDE + tl.arange(0, REST)
        r0 = _asked(q_row, used, PLANES, behind, 0, CHANNELS, W)
        r1 = _asked(q_row, used, PLANES, behind, 1, CHANNELS, W)
        r2 = _asked(q_row, used, PLANES, behind, 2, CHANNELS, W)
        r3 = _asked(q_row, used, PLANES, behind, 3, CHANNELS, W)
    # loaded, not made: so they can follow the codes into the layout of an operand
    k_lanes = tl.load(LANES + lane)
    r_lanes = tl.load(LANES + tl.arange(0, REST if REST > 0 else 16))
    v_lanes = tl.load(LANES + tl.arange(0, ROWS))
    for tile in tl.range(begin, end, num_stages=STAGES):
        s0 = logits(
            KC, KM, tile, 0, q0, q1, q2, q3, k_lanes, r0, r1, r2, r3, r_lanes, due, scale,
            bias, K_BITS, K_GROUP, K_PER_TOKEN, K_SYMMETRIC, C, ROWS, W, WIDE, REST,
            MASKED, CAP, BIASED, ASM,
        )  # fmt: skip
        peak = tl.max(s0, 0)
        if V_BITS < 8:
            s1 = logits(
                KC, KM, tile, 1, q0, q1, q2, q3, k_lanes, r0, r1, r2, r3, r_lanes, due, scale,
            bias, K_BITS, K_GROUP, K_PER_TOKEN, K_SYMMETRIC, C, ROWS, W, WIDE, REST,
                MASKED, CAP, BIASED, ASM,
            )  # fmt: skip
            peak = tl.max(tl.maximum(s0, s1), 0)
        if V_BITS < 4:
            s2 = logits(
                KC, KM, tile, 2, q0, q1, q2, q3, k_lanes, r0, r1, r2, r3, r_lanes, due, scale,
            bias, K_BITS, K_GROUP, K_PER_TOKEN, K_SYMMETRIC, C, ROWS, W, WIDE, REST,
                MASKED, CAP, BIASED, ASM,
            )  # fmt: skip
            s3 = logits(
                KC, KM, tile, 3, q0, q1, q2, q3, k_lanes, r0, r1, r2, r3, r_lanes, due, scale,
            bias, K_BITS, K_GROUP, K_PER_TOKEN, K_SYMMETRIC, C, ROWS, W, WIDE, REST,
                MASKED, CAP, BIASED, ASM,
            )  # fmt: skip
            peak = tl.max(tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3)), 0)
        peak = tl.maximum(top, peak)
        fade = tl.exp2(top - peak)
        top = peak
        page = VC + tile * (PAGE * D * V_BITS // 8)
        v0, v1, v2, v3 = slices(
            page, page + PAGE * D * V_LOW // 8, channel, v_lanes, VM, tile, 0, 0, False, V_BITS,
            V_GROUP, V_PER_TOKEN, V_SYMMETRIC, D, D2, ROWS, ROWS, ASM,
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
    return top, total, acc


@triton.jit(
    do_not_specialize=["ring", "shift", "batch", "heads", "share", "count", "splits", "exact"]
)
def attend_split(
    Q, KC, KM, VC, VM, EK, EV, PLANES, BIAS, STATE, LANES, OUT, LSE, scale,
    q_b, q_h, q_m, kc_b, kc_h, km_b, km_h, vc_b, vc_h, vm_b, vm_h, ek_b, ek_h, ev_b, ev_h,
    ring, shift, batch, heads, share, count, splits, exact,
    N: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr, K_SYMMETRIC: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    V_SYMMETRIC: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
    CAP: tl.constexpr, BIASED: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head over one stretch of pages and some exact tokens.

    STATE [3, B] holds the tokens seen of each row, the paged tokens that all its queries read, and
    its paged tokens. Column c of a product is query head c // count at query c % count. Parts from
    `exact` on take the exact tokens: all parts where programs are scarce, else some of their own.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # `merge` may come, and waits
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
    bias = used.to(tl.float32)  # not read unless BIASED
    if BIASED:
        at = (b * heads + h) * share * count + column
        bias = tl.load(BIAS + at, mask=used, other=0.0)
    KC += b * kc_b + h * kc_h
    KM += b * km_b + h * km_h
    VC += b * vc_b + h * vc_h
    VM += b * vm_b + h * vm_h
    PLANES += h * (CHANNELS if CHANNELS > 0 else D)
    tiles = paged // PAGE
    stretch = (tiles + splits - 1) // splits
    begin = part * stretch
    top, total, acc = packed_tokens(
        q_row, used, due, KC, KM, VC, VM, PLANES, LANES, begin,
        tl.minimum(begin + stretch, tiles), scale, bias, N, MASKED, D, D2, K_BITS, K_GROUP,
        K_PER_TOKEN, CHANNELS, K_SYMMETRIC, V_BITS, V_GROUP, V_PER_TOKEN, V_SYMMETRIC, CAP,
        BIASED, STAGES, ASM,
    )  # fmt: skip
    top, total, acc = exact_tokens(
        q_row, used, position, due, EK + b * ek_b + h * ek_h, EV + b * ev_b + h * ev_h, known,
        start, part - exact, tl.num_programs(0) - exact, ring, shift, scale, bias, top, total,
        acc, D, D2, SINKS, CAP, BIASED, ASM,
    )  # fmt: skip
    place = (bh.to(tl.int64) * tl.num_programs(0) + part) * (share * count) + column
    leave(OUT, LSE, place, used, top, total, acc, D, D2)


@triton.jit
def leave(OUT, LSE, place, used, top, total, acc, D: tl.constexpr, D2: tl.constexpr):
    """Stores what a program found of its columns for `joined`; of no tokens it is nothing."""
    channel = tl.arange(0, D2)
    some = top > FAR
    total = tl.where(some, total, 1.0)
    tl.store(
        OUT + place[None, :] * D + channel[:, None],
        tl.where(some[None, :], acc / total[None, :], 0.0),
        mask=used[None, :] & (channel[:, None] < D),
    )
    tl.store(LSE + place, tl.where(some, top + tl.log2(total), FAR), mask=used)


@triton.jit
def _some_parts(
    OUT, LSE, place, first, parts, step, D: tl.constexpr, D2: tl.constexpr, FEW: tl.constexpr
):
    """Log-sum-exp [FEW] and outputs [FEW, D2] of parts from `first` on; none weighs nothing."""
    channel = tl.arange(0, D2)
    part = first + tl.arange(0, FEW)
    at = place + part * step
    there = (part < parts)[:, None] & (channel < D)[None, :]
    lse = tl.load(LSE + at, mask=part < parts, other=2 * FAR)
    return lse, tl.load(OUT + at[:, None] * D + channel[None, :], mask=there, other=0.0)


@triton.jit
def joined(
    OUT, LSE, place, parts, step, D: tl.constexpr, D2: tl.constexpr, PARTS: tl.constexpr,
    FEW: tl.constexpr,
):  # fmt: skip
    """The parts from `place` on, `step` apart: log-sum-exp to the base 2 as top + log2(total), and
    sums [D2] that are still to be divided by the total."""
    if FEW == PARTS:
        lse, out = _some_parts(OUT, LSE, place, 0, parts, step, D, D2, FEW)
        top = tl.max(lse, 0)
        weight = tl.exp2(lse - top)
        total = tl.sum(weight, 0)
        acc = tl.sum(out * weight[:, None], 0)
    else:
        part = tl.arange(0, PARTS)
        lse = tl.load(LSE + place + part * step, mask=part < parts, other=2 * FAR)
        top = tl.max(lse, 0)
        total = tl.sum(tl.exp2(lse - top), 0)
        acc = tl.zeros([D2], tl.float32)
        for first in tl.range(0, parts, FEW):
            some, out = _some_parts(OUT, LSE, place, first, parts, step, D, D2, FEW)
            acc += tl.sum(out * tl.exp2(some - top)[:, None], 0)
    return top, total, acc


@triton.jit(do_not_specialize=["batch", "heads", "share", "count", "parts"])
def merge(
    OUT, LSE, RESULT, TOLD, BEFORE, STATE, r_b, r_h, r_m, batch, heads, share, count, parts,
    ADVANCE: tl.constexpr, TELL: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    PARTS: tl.constexpr, FEW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Joins partial results by log-sum-exp: one program for each query and query head.

    With ADVANCE, STATE becomes the next step's: no kernel reads BEFORE any more. With TELL, TOLD
    [B, Hq, M] gets the log-sum-exp of all logits, to the base e.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # launched while the parts are still on their way
    row = tl.program_id(0)
    bh = (row // (share * count)).to(tl.int64)
    column = row % (share * count)
    b = bh // heads
    channel = tl.arange(0, D2)
    place = bh * parts * (share * count) + column
    top, total, acc = joined(OUT, LSE, place, parts, share * count, D, D2, PARTS, FEW)
    h = bh % heads * share + column // count
    where = RESULT + b * r_b + h * r_h + column % count * r_m + channel
    tl.store(where, (acc / total).to(RESULT.dtype.element_ty), mask=channel < D)
    if TELL:
        told = (top + tl.log2(total)) * 0.6931471805599453
        place = (b * heads * share + h) * count + column % count
        tl.store(TOLD + place, tl.where(top > FAR, told, -float("inf")))
    if ADVANCE and row % (heads * share * count) == 0:
        for i in tl.static_range(3):
            tl.store(BEFORE + i * batch + b, tl.load(STATE + i * batch + b))
