"""Packed codes become float16 operands of a matrix product, inside a kernel.

A 16-bit half of a packed word holds the codes of several slices (see `reference.pack`). One LOP3
puts a code of each half under the exponent of 1.0, where it reads 1 + code / 2**bits; one packed
FMA with scale * 2**bits and zero - scale * 2**bits makes two values of it. (Codes of 2 and 3 bits
in lanes 0, 1 of four lie two bits lower: there it is 2**(bits + 2).) The offset under a code is
thus at most 16 steps, 32 for 3 bits, and rounding it costs no more than rounding a bfloat16 does.
Bytes (8 bits) go under the exponent of 1024, and the offset is subtracted exactly.

Floor: instructions per value of a thread, 1.2 for 2 bits, 1.4 for 4, 1.5 for 8 and 1.9 for 3 bits,
against the 5.3 that an H100 can issue while 4-bit codes stream in at full bandwidth.

Inline PTX needs an NVIDIA GPU. Everywhere else, and in Triton's interpreter, the same values come
from plain Triton (`portable_codes`).
"""

import triton
import triton.language as tl


@triton.jit
def scale_and_zero(meta, ASM: tl.constexpr):
    """Splits uint32 metadata: float16 scale in the low half, float16 zero in the high half."""
    if ASM:
        scale, zero = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, $3, 0x5410; prmt.b32 $1, $2, $3, 0x7632;",
            "=&r,=r,r,r",
            [meta],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        scale = (meta & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
        zero = (meta >> 16).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale, zero


@triton.jit
def values_8(word, s, z):
    """One slice of values [*, W] from bytes [*, W] of 8-bit codes."""
    return tl.inline_asm_elementwise(
        """
    {
    .reg .b32 k, n, x, y;
    mov.b32 k, 0x64646464;
    mov.b32 n, 0xE400E400;
    prmt.b32 x, $2, k, 0x4140;
    prmt.b32 y, $2, k, 0x4342;
    add.rn.f16x2 x, x, n;
    add.rn.f16x2 y, y, n;
    fma.rn.f16x2 $0, x, $3, $5;
    fma.rn.f16x2 $1, y, $4, $6;
    }""",
        "=&r,=r,r,r,r,r,r",
        [word, s, z],
        dtype=tl.float16,
        is_pure=True,
        pack=4,
    )


@triton.jit
def values_4(word, s0, z0, s1, z1):
    """Two slices of values [*, W] from bytes [*, W] of 4-bit codes."""
    return tl.inline_asm_elementwise(
        """
    {
    .reg .b32 m, a, b, c, d;
    mov.b32 m, 0x3C003C00;
    shr.u32 b, $4, 4;
    prmt.b32 c, $4, 0, 0x2301;
    shl.b32 d, $4, 4;
    lop3.b32 a, $4, 0x03C003C0, m, 0xEA;
    lop3.b32 b, b, 0x03C003C0, m, 0xEA;
    lop3.b32 c, c, 0x03C003C0, m, 0xEA;
    lop3.b32 d, d, 0x03C003C0, m, 0xEA;
    fma.rn.f16x2 $0, a, $5, $7;
    fma.rn.f16x2 $1, b, $6, $8;
    fma.rn.f16x2 $2, c, $9, $11;
    fma.rn.f16x2 $3, d, $10, $12;
    }""",
        "=&r,=&r,=&r,=r,r,r,r,r,r,r,r,r,r",
        [word, s0, z0, s1, z1],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def values_2(word, s0, z0, s1, z1, s2, z2, s3, z3):
    """Four slices of values [*, W] from bytes [*, W] of 2-bit codes."""
    return tl.inline_asm_elementwise(
        """
    {
    .reg .b32 m, b, c, d, x, y;
    mov.b32 m, 0x3C003C00;
    shr.u32 b, $8, 4;
    prmt.b32 c, $8, 0, 0x2301;
    shl.b32 d, $8, 4;
    lop3.b32 x, $8, 0x00C000C0, m, 0xEA;
    lop3.b32 y, $8, 0x03000300, m, 0xEA;
    fma.rn.f16x2 $0, x, $9, $11;
    fma.rn.f16x2 $1, y, $10, $12;
    lop3.b32 x, b, 0x00C000C0, m, 0xEA;
    lop3.b32 y, b, 0x03000300, m, 0xEA;
    fma.rn.f16x2 $2, x, $13, $15;
    fma.rn.f16x2 $3, y, $14, $16;
    lop3.b32 x, c, 0x00C000C0, m, 0xEA;
    lop3.b32 y, c, 0x03000300, m, 0xEA;
    fma.rn.f16x2 $4, x, $17, $19;
    fma.rn.f16x2 $5, y, $18, $20;
    lop3.b32 x, d, 0x00C000C0, m, 0xEA;
    lop3.b32 y, d, 0x03000300, m, 0xEA;
    fma.rn.f16x2 $6, x, $21, $23;
    fma.rn.f16x2 $7, y, $22, $24;
    }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [word, s0, z0, s1, z1, s2, z2, s3, z3],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def values_3(word, high, s0, z0, s1, z1, s2, z2, s3, z3):
    """Four slices of values [*, W] from bytes [*, W] of the low two bits, and bytes [*, W] of the
    high bits, already shifted so that the high bit of each code lies behind its low bits."""
    return tl.inline_asm_elementwise(
        """
    {
    .reg .b32 m, b, c, d, g, h, i, x, y;
    mov.b32 m, 0x3C003C00;
    shr.u32 b, $8, 4;
    prmt.b32 c, $8, 0, 0x2301;
    shl.b32 d, $8, 4;
    shr.u32 g, $9, 4;
    prmt.b32 h, $9, 0, 0x2301;
    shl.b32 i, $9, 4;
    lop3.b32 x, $8, 0x00600060, m, 0xEA;
    lop3.b32 y, $8, 0x01800180, m, 0xEA;
    lop3.b32 x, $9, 0x00800080, x, 0xEA;
    lop3.b32 y, $9, 0x02000200, y, 0xEA;
    fma.rn.f16x2 $0, x, $10, $12;
    fma.rn.f16x2 $1, y, $11, $13;
    lop3.b32 x, b, 0x00600060, m, 0xEA;
    lop3.b32 y, b, 0x01800180, m, 0xEA;
    lop3.b32 x, g, 0x00800080, x, 0xEA;
    lop3.b32 y, g, 0x02000200, y, 0xEA;
    fma.rn.f16x2 $2, x, $14, $16;
    fma.rn.f16x2 $3, y, $15, $17;
    lop3.b32 x, c, 0x00600060, m, 0xEA;
    lop3.b32 y, c, 0x01800180, m, 0xEA;
    lop3.b32 x, h, 0x00800080, x, 0xEA;
    lop3.b32 y, h, 0x02000200, y, 0xEA;
    fma.rn.f16x2 $4, x, $18, $20;
    fma.rn.f16x2 $5, y, $19, $21;
    lop3.b32 x, d, 0x00600060, m, 0xEA;
    lop3.b32 y, d, 0x01800180, m, 0xEA;
    lop3.b32 x, i, 0x00800080, x, 0xEA;
    lop3.b32 y, i, 0x02000200, y, 0xEA;
    fma.rn.f16x2 $6, x, $22, $24;
    fma.rn.f16x2 $7, y, $23, $25;
    }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r,r",
        [word, high, s0, z0, s1, z1, s2, z2, s3, z3],
        dtype=(tl.float16, tl.float16, tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def shifted_left(word, times):
    """Each group of four bytes as one word, shifted left by `times` (0 or 1) bits."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 t; and.b32 t, $2, 1; shl.b32 $0, $1, t; }",
        "=r,r,r",
        [word, times],
        dtype=tl.uint8,
        is_pure=True,
        pack=4,
    )


@triton.jit
def portable_codes(rows, j, i: tl.constexpr, BITS: tl.constexpr, W: tl.constexpr, mask):
    """Codes of slice i at lanes j, as float32: plain loads from byte addresses `rows` of packed
    lines of W bytes (of the low plane, for 3 bits; then the high plane's lines start at `rows[1]`).
    """
    if BITS == 8:
        codes = tl.load(rows[0] + j, mask=mask, other=0).to(tl.int32)
    else:
        low: tl.constexpr = 2 if BITS == 3 else BITS
        turn: tl.constexpr = 5 if BITS == 3 else 6
        slot = 2 * i + (j % 4) // 2
        at = (j // 4) * 4 + (j % 2) * 2
        half = tl.load(rows[0] + at, mask=mask, other=0).to(tl.int32)
        half |= tl.load(rows[0] + at + 1, mask=mask, other=0).to(tl.int32) << 8
        half |= half << 16
        codes = (half >> ((slot * low + turn) % 16)) & ((1 << low) - 1)
        if BITS == 3:
            k = j % (W // 2)
            at = (k // 4) * 4 + (k % 2) * 2
            half = tl.load(rows[1] + at, mask=mask, other=0).to(tl.int32)
            half |= tl.load(rows[1] + at + 1, mask=mask, other=0).to(tl.int32) << 8
            place = (2 * slot + 7) % 16 - 1 + j // (W // 2)
            codes |= ((half >> place) & 1) << 2
    return codes.to(tl.float32)
