"""Attention to kept tokens whose lengths differ by kv head, packed or in 16 bits, and exact ones.

A program takes a work item, a stretch of one head's pages (see `ragged.Plan`), and its share of the
head's exact tokens; there are as many items as all pages together need, whichever head has them.
Packed pages are read as in `paged`. Pages of 16 bits are operands as they lie, 64 tokens at a time.
`merge` joins the parts of each head, however many it has.

Floor: the stored bytes of all heads, each read once.
"""

import triton
import triton.language as tl

from kvtune_kernels.paged import exact_tokens, joined, leave, packed_tokens
from kvtune_kernels.ragged import FIELDS as _FIELDS
from kvtune_kernels.tiles import FAR, PAGE, capped

FIELDS = tl.constexpr(_FIELDS)


@triton.jit
def _item(ITEMS, heads):
    """This program's row, head, first pages, tokens, part of its head, and place for its answer."""
    item = ITEMS + tl.program_id(0) * FIELDS
    bh = tl.load(item)
    key_page = tl.load(item + 1).to(tl.int64)
    value_page = tl.load(item + 2).to(tl.int64)
    begin = tl.load(item + 3)
    tokens = tl.load(item + 4)
    part = tl.load(item + 5)
    parts = tl.load(item + 6)
    slot = tl.load(item + 7).to(tl.int64)
    b = (bh // heads).to(tl.int64)
    h = (bh % heads).to(tl.int64)
    return b, h, key_page, value_page, begin, tokens, part, parts, slot


@triton.jit
def _columns(Q, b, h, q_b, q_h, q_m, share, count, N: tl.constexpr):
    """Where each column's query lies, whether there is one, and which of its head's it is."""
    column = tl.program_id(1) * N + tl.arange(0, N)
    query = column % count
    q_row = Q + b * q_b + (h * share + column // count) * q_h + query * q_m
    return q_row, column, column < share * count, query


@triton.jit(do_not_specialize=["heads", "share", "count", "known"])
def attend_packed_items(
    Q, KC, KM, VC, VM, EK, EV, PLANES, ITEMS, KNOWN, LANES, OUT, LSE, scale,
    q_b, q_h, q_m, ek_b, ek_h, ev_b, ev_h, heads, share, count, known,
    N: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr, K_SYMMETRIC: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    V_SYMMETRIC: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Partial attention of one work item over packed pages and its share of exact tokens.

    KNOWN [B] counts the exact tokens of each row with COUNTED, else all rows have `known`.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # `merge` may come, and waits
    b, h, key_page, value_page, begin, tokens, part, parts, slot = _item(ITEMS, heads)
    if COUNTED:
        known = tl.load(KNOWN + b)
    q_row, column, used, query = _columns(Q, b, h, q_b, q_h, q_m, share, count, N)
    C: tl.constexpr = CHANNELS if CHANNELS > 0 else D
    KC += key_page * (PAGE * C * K_BITS // 8)
    VC += value_page * (PAGE * D * V_BITS // 8)
    # lines of a group of tokens, or pages of the groups of a token's channels
    if K_PER_TOKEN:
        KM += key_page * (D // K_GROUP * PAGE)
    else:
        KM += key_page * PAGE // K_GROUP * C
    if V_PER_TOKEN:
        VM += value_page * (D // V_GROUP * PAGE)
    else:
        VM += value_page * PAGE // V_GROUP * D
    due = column * 0 + tokens  # every query sees all that is kept
    bias = used.to(tl.float32)  # not read
    top, total, acc = packed_tokens(
        q_row, used, due, KC, KM, VC, VM, PLANES + h * C, LANES, begin,
        (tokens + PAGE - 1) // PAGE, scale, bias, N, MASKED, D, D2, K_BITS, K_GROUP, K_PER_TOKEN,
        CHANNELS, K_SYMMETRIC, V_BITS, V_GROUP, V_PER_TOKEN, V_SYMMETRIC, CAP, False, STAGES, ASM,
    )  # fmt: skip
    top, total, acc = exact_tokens(
        q_row, used, known - count + query, column * 0, EK + b * ek_b + h * ek_h,
        EV + b * ev_b + h * ev_h, known, 0, part, parts, known, 0, scale, bias, top, total, acc,
        D, D2, 0, CAP, False, ASM,
    )  # fmt: skip
    leave(OUT, LSE, slot * (share * count) + column, used, top, total, acc, D, D2)


@triton.jit(do_not_specialize=["heads", "share", "count", "known"])
def attend_items(
    Q, K, V, EK, EV, ITEMS, KNOWN, OUT, LSE, scale,
    q_b, q_h, q_m, ek_b, ek_h, ev_b, ev_h, heads, share, count, known,
    N: tl.constexpr, MASKED: tl.constexpr, COUNTED: tl.constexpr, D: tl.constexpr,
    D2: tl.constexpr, CAP: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """The same over pages of 16 bits, [PAGE, D] each."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # `merge` may come, and waits
    b, h, key_page, value_page, begin, tokens, part, parts, slot = _item(ITEMS, heads)
    if COUNTED:
        known = tl.load(KNOWN + b)
    q_row, column, used, query = _columns(Q, b, h, q_b, q_h, q_m, share, count, N)
    channel = tl.arange(0, D2)
    q = tl.load(
        q_row[None, :] + channel[:, None], mask=(channel[:, None] < D) & used[None, :], other=0.0
    )
    if not ASM:  # the interpreter multiplies the bit patterns of bfloat16
        q = q.to(tl.float32)
    bias = used.to(tl.float32)  # not read
    top = tl.full([N], FAR, tl.float32)
    total = tl.zeros([N], tl.float32)
    acc = tl.zeros([D2, N], tl.float32)
    K += key_page * (PAGE * D)
    V += value_page * (PAGE * D)
    line = tl.arange(0, PAGE)
    there = (line >= 0)[:, None] & (channel < D)[None, :]
    for tile in tl.range(begin, (tokens + PAGE - 1) // PAGE, num_stages=STAGES):
        place = line[:, None] * D + channel[None, :] + tile * (PAGE * D)
        if D == D2:
            k = tl.load(K + place)
            v = tl.load(V + place)
        else:
            k = tl.load(K + place, mask=there, other=0.0)
            v = tl.load(V + place, mask=there, other=0.0)
        if not ASM:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        s = capped(tl.dot(k, q, input_precision="ieee"), scale, bias, CAP, False)
        if MASKED:
            s = tl.where((line + tile * PAGE < tokens)[:, None], s, FAR)
        peak = tl.maximum(top, tl.max(s, 0))
        fade = tl.exp2(top - peak)
        top = peak
        p = tl.exp2(s - top[None, :])
        total = total * fade + tl.sum(p, 0)
        acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    top, total, acc = exact_tokens(
        q_row, used, known - count + query, column * 0, EK + b * ek_b + h * ek_h,
        EV + b * ev_b + h * ev_h, known, 0, part, parts, known, 0, scale, bias, top, total, acc,
        D, D2, 0, CAP, False, ASM,
    )  # fmt: skip
    leave(OUT, LSE, slot * (share * count) + column, used, top, total, acc, D, D2)


@triton.jit(do_not_specialize=["heads", "share", "count"])
def merge_items(
    OUT, LSE, RESULT, TOLD, FIRST, r_b, r_h, r_m, heads, share, count, TELL: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, PARTS: tl.constexpr, FEW: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Joins the parts of each head, from FIRST on: one program for each query and query head.

    With TELL, TOLD [B, Hq, M] gets the log-sum-exp of all logits, to the base e.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()  # launched while the parts are still on their way
    row = tl.program_id(0)
    bh = row // (share * count)
    column = row % (share * count)
    first = tl.load(FIRST + bh)
    parts = tl.load(FIRST + bh + 1) - first
    place = first.to(tl.int64) * (share * count) + column
    top, total, acc = joined(OUT, LSE, place, parts, share * count, D, D2, PARTS, FEW)
    b = (bh // heads).to(tl.int64)
    h = bh % heads * share + column // count
    channel = tl.arange(0, D2)
    where = RESULT + b * r_b + h * r_h + column % count * r_m + channel
    tl.store(where, (acc / total).to(RESULT.dtype.element_ty), mask=channel < D)
    if TELL:
        told = (top + tl.log2(total)) * 0.6931471805599453
        place = (b * heads * share + h) * count + column % count
        tl.store(TOLD + place, tl.where(top > FAR, told, -float("inf")))
