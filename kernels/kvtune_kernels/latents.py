"""Attention to low-rank keys: gather, reconstruct, RoPE, scores and values in one pass.

One program takes one kv head and a stretch of its tokens. It holds the head's two halves of `up`,
so that the channels which turn together lie in two tensors and RoPE needs no shuffle: K1 = A U1,
K2 = A U2, turned elementwise, then multiplied with the halves of the queries that share the head.
Keys are never written to memory. Rank = a power of two and a rest, each a product of its own. Heads
run side by side, so that latents which they share come from L2. `paged.merge` joins the stretches.

Without `up` the latents themselves are keys: the absorbed form, for models without RoPE, and plain
attention to selected 16-bit tokens.

Floor: latents and values of the tokens, each read once, at the copy rate of the device.
"""

import triton
import triton.language as tl

from kvtune_kernels.tiles import FAR

# 2 pi in three parts, so that multiples of the first up to 2**16 are exact
TURN = tl.constexpr(0.15915494309189535)
TURN_HIGH = tl.constexpr(6.28125)
TURN_MIDDLE = tl.constexpr(0.0019350051879882812)
TURN_LOW = tl.constexpr(3.0199159819567394e-07)


@triton.jit
def _channels(j, D: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both channels of pair j: WIDTH / 2 pairs that turn, then what stands still."""
    half: tl.constexpr = WIDTH // 2
    if INTERLEAVED:
        first = 2 * j
        other = 2 * j + 1
    else:
        first = j
        other = j + half
    still: tl.constexpr = half + (D - WIDTH) // 2
    return tl.where(j < half, first, j + half), tl.where(j < half, other, j + still)


@triton.jit
def _cos_sin(angle, ASM: tl.constexpr):
    """Cosine and sine of angles up to 4e5 radians, within 1e-6 with ASM."""
    if not ASM:
        return tl.cos(angle), tl.sin(angle)
    turns = tl.floor(tl.fma(angle, TURN, 0.5))
    angle = tl.fma(-turns, TURN_HIGH, angle)
    angle = tl.fma(-turns, TURN_MIDDLE, angle)
    angle = tl.fma(-turns, TURN_LOW, angle)
    cos = tl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    sin = tl.inline_asm_elementwise(
        "sin.approx.ftz.f32 $0, $1;", "=f,f", [angle], dtype=tl.float32, is_pure=True, pack=1
    )
    return cos, sin


@triton.jit
def _turned(
    k1, k2, position, j, COS, SIN, FREQUENCY, factor, c_p, WIDTH: tl.constexpr,
    TABLES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Halves of keys [N, H2] after RoPE."""
    turns = j < WIDTH // 2
    if TABLES:
        at = position.to(tl.int64)[:, None] * c_p + j[None, :]
        ok = turns[None, :] & (position >= 0)[:, None]
        cos = tl.load(COS + at, mask=ok, other=1.0).to(tl.float32)
        sin = tl.load(SIN + at, mask=ok, other=0.0).to(tl.float32)
    else:
        frequency = tl.load(FREQUENCY + j, mask=turns, other=0.0)
        gain = tl.where(turns, factor, 1.0)[None, :]
        cos, sin = _cos_sin(position.to(tl.float32)[:, None] * frequency[None, :], ASM)
        cos *= gain
        sin *= gain
    return k1 * cos - k2 * sin, k2 * cos + k1 * sin


@triton.jit
def _product(a, u, s, ASM: tl.constexpr):
    """a u + s; the interpreter would multiply the bit patterns of bfloat16."""
    if not ASM:
        a = a.to(tl.float32)
        u = u.to(tl.float32)
    return tl.dot(a, u, s, input_precision="ieee")


@triton.jit(do_not_specialize=["heads", "share", "tokens", "splits", "group", "start"])
def attend_split(
    Q, A, U, MEAN, V, VS, INDEX, COUNTS, STARTS, COS, SIN, FREQUENCY, OUT, LSE, scale, factor,
    q_b, q_h, a_b, a_g, a_t, u_b, u_h, m_b, m_h, v_b, v_h, v_t, s_b, s_h, i_b, i_h, n_b, n_h, c_p,
    heads, share, tokens, splits, group, v_group, start,
    UP: tl.constexpr, MEANS: tl.constexpr, INDEXED: tl.constexpr, COUNTED: tl.constexpr,
    STARTED: tl.constexpr, SCALED: tl.constexpr, TURNS: tl.constexpr, TABLES: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, H2: tl.constexpr,
    R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HELD: tl.constexpr, DV: tl.constexpr,
    DV2: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Partial attention of one kv head to one stretch of its tokens, one query a query head.

    Column c of a product is query head c of those that share the kv head. Without HELD the rank is
    walked through in pieces of R1, whose parts of `up` are read anew for each N tokens.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()  # `merge` may come, and waits
    h = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    if COUNTED:
        tokens = tl.load(COUNTS + b * n_b + h * n_h)
    if STARTED:
        start = tl.load(STARTS + b)
    tiles = (tokens + N - 1) // N
    stretch = (tiles + splits - 1) // splits
    begin = part * stretch
    column = tl.arange(0, C)
    used = column < share
    Q += b * q_b + (h * share + column[None, :]) * q_h
    A += b * a_b + h // group * a_g
    V += b * v_b + h // v_group * v_h
    VS += b * s_b + h // v_group * s_h
    INDEX += b * i_b + h * i_h
    U += b * u_b + h * u_h
    r1 = tl.arange(0, R1)
    r2 = R1 + tl.arange(0, R2)
    j = tl.arange(0, H2)
    if UP:
        first, other = _channels(j, D, WIDTH, INTERLEAVED)
        there = j < D // 2
        asked = there[:, None] & used[None, :]
        q1 = tl.load(Q + first[:, None], mask=asked, other=0.0).to(tl.float16)
        q2 = tl.load(Q + other[:, None], mask=asked, other=0.0).to(tl.float16)
        if HELD:
            some = (r1 < R)[:, None] & there[None, :]
            u1 = tl.load(U + r1[:, None] * D + first[None, :], mask=some, other=0.0)
            u2 = tl.load(U + r1[:, None] * D + other[None, :], mask=some, other=0.0)
            if R > R1:
                some = (r2 < R)[:, None] & there[None, :]
                w1 = tl.load(U + r2[:, None] * D + first[None, :], mask=some, other=0.0)
                w2 = tl.load(U + r2[:, None] * D + other[None, :], mask=some, other=0.0)
        if MEANS:
            MEAN += b * m_b + h * m_h
            m1 = tl.load(MEAN + first, mask=there, other=0.0).to(tl.float32)
            m2 = tl.load(MEAN + other, mask=there, other=0.0).to(tl.float32)
    else:
        kind = A.dtype.element_ty
        q1 = tl.load(Q + r1[:, None], mask=(r1 < R)[:, None] & used[None, :], other=0.0).to(kind)
        if R > R1:
            q2 = tl.load(Q + r2[:, None], mask=(r2 < R)[:, None] & used[None, :], other=0.0)
            q2 = q2.to(kind)
    channel = tl.arange(0, DV2)
    top = tl.full([C], FAR, tl.float32)
    mass = tl.zeros([N, C], tl.float32)
    acc = tl.zeros([DV2, C], tl.float32)
    nothing = tl.zeros([N, H2], tl.float32)
    for tile in tl.range(begin, tl.minimum(begin + stretch, tiles), num_stages=STAGES):
        t = tile * N + tl.arange(0, N)
        live = t < tokens
        token = tl.minimum(t, tokens - 1)  # read twice rather than masked: it is there
        if INDEXED:
            token = tl.load(INDEX + token)
        row = token.to(tl.int64)[:, None]
        k1 = nothing
        k2 = nothing
        if UP:
            if MEANS:
                k1 += m1[None, :]
                k2 += m2[None, :]
            if HELD:
                if R < R1:
                    a = tl.load(A + row * a_t + r1[None, :], mask=(r1 < R)[None, :], other=0.0)
                else:
                    a = tl.load(A + row * a_t + r1[None, :])
                k1 = _product(a, u1, k1, ASM)
                k2 = _product(a, u2, k2, ASM)
                if R > R1:
                    if R < R1 + R2:
                        a = tl.load(A + row * a_t + r2[None, :], mask=(r2 < R)[None, :], other=0.0)
                    else:
                        a = tl.load(A + row * a_t + r2[None, :])
                    k1 = _product(a, w1, k1, ASM)
                    k2 = _product(a, w2, k2, ASM)
            else:
                for r0 in tl.range(0, R, R1):
                    r = r0 + r1
                    some = (r < R)[:, None] & there[None, :]
                    a = tl.load(A + row * a_t + r[None, :], mask=(r < R)[None, :], other=0.0)
                    u1 = tl.load(U + r[:, None] * D + first[None, :], mask=some, other=0.0)
                    u2 = tl.load(U + r[:, None] * D + other[None, :], mask=some, other=0.0)
                    k1 = _product(a, u1, k1, ASM)
                    k2 = _product(a, u2, k2, ASM)
            if TURNS:
                k1, k2 = _turned(
                    k1, k2, start + token, j, COS, SIN, FREQUENCY, factor, c_p, WIDTH, TABLES, ASM
                )
            s = tl.dot(k1.to(tl.float16), q1, input_precision="ieee")
            s = tl.dot(k2.to(tl.float16), q2, s, input_precision="ieee")
        else:
            a = tl.load(A + row * a_t + r1[None, :], mask=(r1 < R)[None, :], other=0.0)
            s = _product(a, q1, tl.zeros([N, C], tl.float32), ASM)
            if R > R1:
                a = tl.load(A + row * a_t + r2[None, :], mask=(r2 < R)[None, :], other=0.0)
                s = _product(a, q2, s, ASM)
        s = tl.where(live[:, None], s * (scale * 1.4426950408889634), FAR)
        peak = tl.maximum(top, tl.max(s, 0))
        fade = tl.exp2(top - peak)
        top = peak
        p = tl.exp2(s - top[None, :])
        mass = mass * fade[None, :] + p
        if DV > 0:
            if DV < DV2:
                v = tl.load(V + row * v_t + channel[None, :], mask=(channel < DV)[None, :], other=0)
            else:
                v = tl.load(V + row * v_t + channel[None, :])
            if SCALED:
                p *= tl.load(VS + token).to(tl.float32)[:, None]
                v = v.to(tl.bfloat16)
            if not ASM:
                v = v.to(tl.float32)
            acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    some = top > FAR
    total = tl.where(some, tl.sum(mass, 0), 1.0)
    place = ((b * heads + h) * splits + part) * share + column
    if DV > 0:
        tl.store(
            OUT + place[None, :] * DV + channel[:, None],
            tl.where(some[None, :], acc / total[None, :], 0.0),
            mask=used[None, :] & (channel < DV)[:, None],
        )
    tl.store(LSE + place, tl.where(some, top + tl.log2(total), FAR), mask=used)
