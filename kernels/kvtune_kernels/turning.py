"""Linear maps of heads inside one kernel: keys, values and queries of a step, turned in one launch.

A step turns few rows by matrices [D, D], one for each kv head, so a launch costs more than the work
does: it comes before what it waits for has ended. Products are as exact as float32's own (three of
TF32 each). Floor: the matrices, 2 or 4 * D * D bytes a kv head and map, each read once.
"""

import triton
import triton.language as tl


@triton.jit
def _turn_rows(
    X, Y, MATRIX, OFFSET, x_b, x_h, x_m, y_b, y_h, y_m, h, share, count, first, rows, column0,
    D: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Some columns of y = x @ matrix + offset, of ROWS rows of the heads that share kv head h."""
    row = first + tl.arange(0, ROWS)
    b = (row // (share * count)).to(tl.int64)
    head = h * share + row % (share * count) // count
    m = row % count
    column = column0 + tl.arange(0, COLUMNS)
    k = tl.arange(0, D2)
    ok = (k < D)[:, None] & (column < D)[None, :]
    matrix = tl.load(MATRIX + (h * D + k)[:, None] * D + column[None, :], mask=ok, other=0.0)
    matrix = matrix.to(tl.float32)
    offset = tl.load(OFFSET + h * D + column, mask=column < D, other=0.0).to(tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_wait()  # the matrix is on its way while x is still being made
    x_row = X + b * x_b + head * x_h + m * x_m
    ok = (row < rows)[:, None] & (k < D)[None, :]
    x = tl.load(x_row[:, None] + k[None, :], mask=ok, other=0.0).to(tl.float32)
    y = tl.dot(x, matrix, input_precision="tf32x3" if ASM else "ieee") + offset[None, :]
    where = Y + b * y_b + head * y_h + m * y_m
    ok = (row < rows)[:, None] & (column < D)[None, :]
    tl.store(where[:, None] + column[None, :], y.to(Y.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["rows0", "rows1", "rows2", "share0", "share1", "share2", "count"])
def turn(
    X0, Y0, MATRIX0, OFFSET0, x0_b, x0_h, x0_m, y0_b, y0_h, y0_m, rows0, share0,
    X1, Y1, MATRIX1, OFFSET1, x1_b, x1_h, x1_m, y1_b, y1_h, y1_m, rows1, share1,
    X2, Y2, MATRIX2, OFFSET2, x2_b, x2_h, x2_m, y2_b, y2_h, y2_m, rows2, share2,
    count, D: tl.constexpr, D2: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    EARLY: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Up to three tensors, each with matrices and offsets of its own; `rows` are those of a kv
    head, and 0 of a tensor that is not there."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    block = tl.program_id(0)
    column0 = tl.program_id(1) * COLUMNS
    h = tl.program_id(2)
    blocks0 = (rows0 + ROWS - 1) // ROWS
    blocks1 = (rows1 + ROWS - 1) // ROWS
    if block < blocks0:
        _turn_rows(
            X0, Y0, MATRIX0, OFFSET0, x0_b, x0_h, x0_m, y0_b, y0_h, y0_m, h, share0, count,
            block * ROWS, rows0, column0, D, D2, ROWS, COLUMNS, EARLY, ASM,
        )  # fmt: skip
    elif block < blocks0 + blocks1:
        _turn_rows(
            X1, Y1, MATRIX1, OFFSET1, x1_b, x1_h, x1_m, y1_b, y1_h, y1_m, h, share1, count,
            (block - blocks0) * ROWS, rows1, column0, D, D2, ROWS, COLUMNS, EARLY, ASM,
        )  # fmt: skip
    else:
        _turn_rows(
            X2, Y2, MATRIX2, OFFSET2, x2_b, x2_h, x2_m, y2_b, y2_h, y2_m, h, share2, count,
            (block - blocks0 - blocks1) * ROWS, rows2, column0, D, D2, ROWS, COLUMNS, EARLY, ASM,
        )  # fmt: skip
