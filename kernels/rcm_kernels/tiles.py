"""Device functions that the Triton kernels share."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_rows(base, stride, rows, num_rows, num_cols, BLOCK: tl.constexpr, MASK_COLS: tl.constexpr):
    """Rows `rows` of base [num_rows, num_cols] as [rows, BLOCK], 0 outside: padding may hold NaN and is not read."""
    cols = tl.arange(0, BLOCK)
    pointers = base + rows[:, None] * stride + cols[None, :]
    if MASK_COLS:
        return tl.load(pointers, mask=(rows < num_rows)[:, None] & (cols < num_cols)[None, :], other=0.0)
    else:
        return tl.load(pointers, mask=(rows < num_rows)[:, None], other=0.0)


@triton.jit
def round_factor(x, P_TYPE: tl.constexpr, DOT_TYPE: tl.constexpr):
    """`x` rounded to P_TYPE, as DOT_TYPE. They differ (bf16, fp32) in the interpreter alone, whose own cast truncates."""
    if P_TYPE == DOT_TYPE:
        return x.to(P_TYPE)
    else:
        big = x * 65537.0  # Veltkamp's splitting: the upper 8 of 24 bits, rounded to nearest
        return big - (big - x)
