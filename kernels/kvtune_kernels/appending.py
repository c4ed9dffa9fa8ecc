"""Append decoded tokens to the ring, and encode the block that has left the window on the way.

Floor: one token read and written, 4 * head_dim bytes for each head and side; a block that closes
costs what `packing` says, once in as many steps as it has tokens.
"""

import triton
import triton.language as tl

from kvtune_kernels.packing import encode_block


@triton.jit
def _append_side(
    NEW, EXACT, PLANES, CODES, META, known, closed, due, ring, shift, KEYS: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, PER_TOKEN: tl.constexpr, C: tl.constexpr,
    SYMMETRIC: tl.constexpr, PARTS: tl.constexpr, SINKS: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Stores one token and encodes what is due."""
    c = tl.arange(0, D2)
    slot = known if known < SINKS else SINKS + (known - SINKS - shift) % ring
    tl.store(EXACT + slot * D + c, tl.load(NEW + c, mask=c < D), mask=c < D)
    tail = EXACT + SINKS * D
    for block in tl.range(closed // BLOCK, due // BLOCK):  # mostly none
        for part in tl.range(0, PARTS):
            encode_block(
                tail, PLANES, CODES, META, D, shift, ring, block, part, KEYS, BITS, GROUP,
                PER_TOKEN, C, SYMMETRIC, BLOCK, D, D2, PARTS, True, ASM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["ring", "shift", "batch", "heads"])
def append(
    NK, NV, EK, EV, KC, KM, VC, VM, PLANES, STATE, NEXT,
    nk_b, nk_h, nv_b, nv_h, ek_b, ek_h, ev_b, ev_h, kc_b, kc_h, km_b, km_h, vc_b, vc_h, vm_b, vm_h,
    ring, shift, batch, heads,
    K_BITS: tl.constexpr, K_GROUP: tl.constexpr, K_PER_TOKEN: tl.constexpr, C: tl.constexpr,
    K_SYMMETRIC: tl.constexpr, K_PARTS: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr, V_PER_TOKEN: tl.constexpr,
    V_SYMMETRIC: tl.constexpr, SINKS: tl.constexpr, RECENT: tl.constexpr, BLOCK: tl.constexpr,
    D: tl.constexpr, D2: tl.constexpr, ASM: tl.constexpr,
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
            NK + b * nk_b + h * nk_h, EK + b * ek_b + h * ek_h, PLANES + h * C,
            KC + b * kc_b + h * kc_h, KM + b * km_b + h * km_h, known, closed, due, ring, shift,
            True, K_BITS, K_GROUP, K_PER_TOKEN, C, K_SYMMETRIC, K_PARTS, SINKS, BLOCK, D, D2, ASM,
        )  # fmt: skip
    else:
        _append_side(
            NV + b * nv_b + h * nv_h, EV + b * ev_b + h * ev_h, PLANES, VC + b * vc_b + h * vc_h,
            VM + b * vm_b + h * vm_h, known, closed, due, ring, shift, False, V_BITS, V_GROUP,
            V_PER_TOKEN, 0, V_SYMMETRIC, 1, SINKS, BLOCK, D, D2, ASM,
        )  # fmt: skip
    if side == 0 and h == 0:
        tl.store(NEXT + b, known + 1)
        tl.store(NEXT + batch + b, due)
        tl.store(NEXT + 2 * batch + b, due)
