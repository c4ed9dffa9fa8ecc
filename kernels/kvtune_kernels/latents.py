"""Attention to low-rank keys: gather, reconstruct, RoPE, scores and values in one pass.

One program takes one kv head and a stretch of its tokens, and holds the head's part of `up` all the
while. Its channels are ordered so that those which turn together are neighbours: a thread then
holds both, turns them in registers, and hands them on as an operand of the product with the queries
that share the head. Keys are never written to memory. A rank is a power of two and a rest, each
with a product of its own. Heads run side by side, so that latents which they share come from L2.
`paged.merge` joins the stretches.

Without `up` the latents themselves are keys: the absorbed form, for models without RoPE, and plain
attention to selected 16-bit tokens.

Floor: latents and values of the tokens, each read once, at the copy rate of the device.
"""

import triton
import triton.language as tl

from kvtune_kernels.tiles import FAR

# k1 cos - k2 sin and k2 cos + k1 sin of neighbours k1 = $1, k2 = $2, rounded to float16
_TURN = """
        mul.f32 x, $2, s;
        mul.f32 y, $1, s;
        neg.f32 x, x;
        fma.rn.f32 x, $1, c, x;
        fma.rn.f32 y, $2, c, y;
        cvt.rn.f16x2.f32 $0, y, x;
    }
"""
# cosine and sine lie side by side in one word
TABLE_ASM = tl.constexpr(
    """{
        .reg .f32 c, s, x, y;
        .reg .f16 low, high;
        mov.b32 {low, high}, $3;
        cvt.f32.f16 c, low;
        cvt.f32.f16 s, high;
"""
    + _TURN
)
# of position $3 times frequency $5, less the nearest multiple of 2 pi; error 1e-6 up to 4e5 radians
ANGLE_ASM = tl.constexpr(
    """{
        .reg .f32 a, n, c, s, x, y;
        mul.rn.f32 a, $3, $5;
        fma.rn.f32 n, a, 0f3E22F983, 0f4B400000;
        add.rn.f32 n, n, 0fCB400000;
        fma.rn.f32 a, n, 0fC0C90FDB, a;
        fma.rn.f32 a, n, 0f343BBD2E, a;
        cos.approx.ftz.f32 c, a;
        sin.approx.ftz.f32 s, a;
"""
    + _TURN
)


# four int8 to float16: their bytes become the fraction of 1024 + 128 + x
INT8_ASM = tl.constexpr(
    """{
        .reg .b32 u, low, high, bias;
        xor.b32 u, $2, 0x80808080;
        mov.b32 bias, 0x64806480;
        prmt.b32 low, u, 0x64646464, 0x4140;
        prmt.b32 high, u, 0x64646464, 0x4342;
        sub.f16x2 $0, low, bias;
        sub.f16x2 $1, high, bias;
    }"""
)
LIFT = tl.constexpr(1024.0)  # keeps weights times scales of int8 values far from float16's smallest


@triton.jit
def _channel(c, D: tl.constexpr, WIDTH: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The channel of column c: pairs that turn, WIDTH / 2 of them, then what stands still."""
    half: tl.constexpr = WIDTH // 2
    if INTERLEAVED:
        return c
    return tl.where(c < WIDTH, c // 2 + c % 2 * half, c)


@triton.jit
def _turned(
    k, position, c, TABLE, FREQUENCY, t_p, WIDTH: tl.constexpr, TABLED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Float16 keys [N, D2] after RoPE; columns 2 j and 2 j + 1 turn together."""
    if TABLED:
        at = TABLE + position.to(tl.int64)[:, None] * t_p + c[None, :]
        if k.shape[1] == WIDTH:
            table = tl.load(at)
        else:
            still = (1 - c % 2).to(tl.float16)[None, :].broadcast_to(k.shape)
            table = tl.load(at, mask=(c < WIDTH)[None, :], other=still)
    else:
        frequency = tl.load(FREQUENCY + c // 2, mask=c < WIDTH, other=0.0)[None, :]
        frequency = frequency.broadcast_to(k.shape)
        place = position.to(tl.float32)[:, None].broadcast_to(k.shape)
    if ASM and TABLED:
        out = tl.inline_asm_elementwise(
            TABLE_ASM, "=r,f,f,r", [k, table], dtype=tl.float16, is_pure=True, pack=2
        )
    elif ASM:
        out = tl.inline_asm_elementwise(
            ANGLE_ASM, "=r,f,f,f,f,f,f", [k, place, frequency], dtype=tl.float16, is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        k1, k2 = k.reshape(k.shape[0], k.shape[1] // 2, 2).split()
        if TABLED:
            cos, sin = table.to(tl.float32).reshape(k.shape[0], k.shape[1] // 2, 2).split()
        else:
            angle, _ = (place * frequency).reshape(k.shape[0], k.shape[1] // 2, 2).split()
            cos = tl.cos(angle)
            sin = tl.sin(angle)
        out = tl.join(k1 * cos - k2 * sin, k2 * cos + k1 * sin).reshape(k.shape).to(tl.float16)
    return out


@triton.jit
def _product(a, u, s, ASM: tl.constexpr):
    """a u + s; the interpreter would multiply the bit patterns of bfloat16."""
    if not ASM:
        a = a.to(tl.float32)
        u = u.to(tl.float32)
    return tl.dot(a, u, s, input_precision="ieee")


@triton.jit
def _columns(X, row, r, R: tl.constexpr, BOUNDED: tl.constexpr):
    """Columns r of the rows that pointers [N, 1] X + row name; behind R there are zeros."""
    if BOUNDED:
        return tl.load(X + row + r[None, :], mask=(r < R)[None, :], other=0)
    return tl.load(X + row + r[None, :])


@triton.jit
def _fetch(A, token, a_t, R: tl.constexpr):
    """Asks for rows of latents, line by line, so that they lie in L2 when they are copied."""
    lines: tl.constexpr = triton.next_power_of_2((2 * R + 127) // 128)
    row = (A + token.to(tl.int64) * a_t).to(tl.int64, bitcast=True)[:, None]
    line = tl.minimum(tl.arange(0, lines) * 128, 2 * R - 16)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [row + line], dtype=tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def _basis(
    U, r, c, D: tl.constexpr, D2: tl.constexpr, R: tl.constexpr, BOUNDED: tl.constexpr
):  # fmt: skip
    """Rows r of `up`, whose channels are in the order of columns: [len(r), D2]."""
    if BOUNDED or D < D2:
        there = (r < R)[:, None] & (c < D)[None, :]
        return tl.load(U + r[:, None] * D + c[None, :], mask=there, other=0.0)
    return tl.load(U + r[:, None] * D + c[None, :])


@triton.jit
def _tokens(INDEX, tile, tokens, N: tl.constexpr, INDEXED: tl.constexpr):
    """The tokens of a tile; behind the last one that one, read again rather than masked."""
    last = tl.maximum(tokens, 1) - 1  # without any, fetching ahead would read before the index
    token = tl.minimum(tile * N + tl.arange(0, N), last)
    if INDEXED:
        token = tl.load(INDEX + token)
    return token


@triton.jit(do_not_specialize=["heads", "share", "tokens", "splits", "group", "start"])
def attend_split(
    Q, A, U, MEAN, V, VS, INDEX, COUNTS, STARTS, TABLE, FREQUENCY, OUT, LSE, scale, factor,
    q_b, q_h, a_b, a_g, a_t, u_b, u_h, m_b, m_h, v_b, v_h, v_t, s_b, s_h, i_b, i_h, n_b, n_h, t_p,
    heads, share, tokens, splits, group, v_group, start,
    UP: tl.constexpr, MEANS: tl.constexpr, INDEXED: tl.constexpr, COUNTED: tl.constexpr,
    STARTED: tl.constexpr, SCALED: tl.constexpr, TURNS: tl.constexpr, TABLED: tl.constexpr,
    INTERLEAVED: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, D2: tl.constexpr,
    R: tl.constexpr, R1: tl.constexpr, R2: tl.constexpr, HELD: tl.constexpr, DV: tl.constexpr,
    DV2: tl.constexpr, C: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
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
    end = tl.minimum(begin + stretch, tiles)
    if AHEAD:  # two tiles
        _fetch(A, _tokens(INDEX, begin, tokens, N, INDEXED), a_t, R)
        _fetch(A, _tokens(INDEX, begin + 1, tokens, N, INDEXED), a_t, R)
        later = _tokens(INDEX, begin + 2, tokens, N, INDEXED)
    r1 = tl.arange(0, R1)
    r2 = R1 + tl.arange(0, R2)
    c = tl.arange(0, D2)
    if UP:
        channel = _channel(c, D, WIDTH, INTERLEAVED)
        q = tl.load(Q + channel[:, None], mask=(c < D)[:, None] & used[None, :], other=0.0)
        # what scales the embedding (YaRN) scales the channels that turn
        q = (q.to(tl.float32) * tl.where(c < WIDTH, factor, 1.0)[:, None]).to(tl.float16)
        if HELD:
            u1 = _basis(U, r1, c, D, D2, R, R < R1)
            if R > R1:
                u2 = _basis(U, r2, c, D, D2, R, R < R1 + R2)
        k0 = tl.zeros([1, D2], tl.float32)
        if MEANS:
            k0 = tl.load(MEAN + b * m_b + h * m_h + channel, mask=c < D, other=0.0)
            k0 = k0.to(tl.float32)[None, :]
    else:
        kind = A.dtype.element_ty
        q = tl.load(Q + r1[:, None], mask=(r1 < R)[:, None] & used[None, :], other=0.0).to(kind)
        if R > R1:
            q2 = tl.load(Q + r2[:, None], mask=(r2 < R)[:, None] & used[None, :], other=0.0)
            q2 = q2.to(kind)
    channel_v = tl.arange(0, DV2)
    top = tl.full([C], FAR, tl.float32)
    mass = tl.zeros([N, C], tl.float32)
    acc = tl.zeros([DV2, C], tl.float32)
    for tile in tl.range(begin, end, num_stages=STAGES):
        if AHEAD:
            _fetch(A, later, a_t, R)
            later = _tokens(INDEX, tile + 3, tokens, N, INDEXED)
        live = tile * N + tl.arange(0, N) < tokens
        token = _tokens(INDEX, tile, tokens, N, INDEXED)
        if DV > 0:
            v = _columns(V, token.to(tl.int64)[:, None] * v_t, channel_v, DV, DV < DV2)
        row = token.to(tl.int64)[:, None] * a_t
        if UP:
            k = k0.broadcast_to(N, D2)
            if HELD:
                k = _product(_columns(A, row, r1, R, R < R1), u1, k, ASM)
                if R > R1:
                    k = _product(_columns(A, row, r2, R, R < R1 + R2), u2, k, ASM)
            else:
                for r0 in tl.range(0, R, R1):
                    a = _columns(A, row, r0 + r1, R, True)
                    k = _product(a, _basis(U, r0 + r1, c, D, D2, R, True), k, ASM)
            if TURNS:
                k = _turned(k, start + token, c, TABLE, FREQUENCY, t_p, WIDTH, TABLED, ASM)
            s = tl.dot(k.to(tl.float16), q, input_precision="ieee")
        else:
            s = _product(_columns(A, row, r1, R, R < R1), q, tl.zeros([N, C], tl.float32), ASM)
            if R > R1:
                s = _product(_columns(A, row, r2, R, R < R1 + R2), q2, s, ASM)
        s = tl.where(live[:, None], s * (scale * 1.4426950408889634), FAR)
        peak = tl.maximum(top, tl.max(s, 0))
        fade = tl.exp2(top - peak)
        top = peak
        p = tl.exp2(s - top[None, :])
        mass = mass * fade[None, :] + p
        if DV > 0:
            if SCALED:
                p *= tl.load(VS + token).to(tl.float32)[:, None] * LIFT
                if ASM:
                    v = tl.inline_asm_elementwise(
                        INT8_ASM, "=r,=r,r", [v], dtype=tl.float16, is_pure=True, pack=4
                    )
            if not ASM:
                v = v.to(tl.float32)
            acc = tl.dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :], input_precision="ieee")
    some = top > FAR
    total = tl.where(some, tl.sum(mass, 0), 1.0)
    if SCALED:
        acc *= 1 / LIFT
    place = ((b * heads + h) * splits + part) * share + column
    if DV > 0:
        tl.store(
            OUT + place[None, :] * DV + channel_v[:, None],
            tl.where(some[None, :], acc / total[None, :], 0.0),
            mask=used[None, :] & (channel_v < DV)[:, None],
        )
    tl.store(LSE + place, tl.where(some, top + tl.log2(total), FAR), mask=used)
