"""Device functions of the quaternion kernels; imported on first use only.

All three products of a layer are products of quaternions whose components are matrices, w ⊗ x:

    (1)  y  = W ⊗ x      the output [M, 4·O], reduced over the inputs
    (2)  dx = W̄ ⊗ g      the gradient of x [M, 4·I], reduced over the outputs
    (3)  dW = g ⊗ x̄      the gradient of W, 4 · [I, O], reduced over the rows

so that one function, :func:`hamilton`, does all of them: 16 tile products for 4 output tiles. A
rotation has 9 products in its place, :func:`rotate`, with entries that are computed from the
weights where they are used; its inverse, for dx, is the rotation by the conjugate.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROTATION_EPS = tl.constexpr(1e-4)  # as in reference.py


@triton.jit
def hamilton(
    x,
    w,
    acc,
    CONJ_X: tl.constexpr,
    CONJ_W: tl.constexpr,
    IN_HALF: tl.constexpr,
    OUT_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate w ⊗ x, component by component, each a matrix product x_a @ w_b.

    Args:
        x, w, acc: the components r, i, j, k.
        CONJ_X, CONJ_W: conjugate x or w.
        IN_HALF: x has only the components j and k.
        OUT_HALF: only those of the result are needed.
    """
    x0, x1, x2, x3 = x
    w0, w1, w2, w3 = w
    acc0, acc1, acc2, acc3 = acc
    if not IN_HALF:
        vector0 = -x0 if CONJ_W else x0
        scalar1 = -x1 if CONJ_X else x1
        plus1 = x1 if CONJ_X == CONJ_W else -x1
        minus1 = -x1 if CONJ_X == CONJ_W else x1
        if not OUT_HALF:
            acc0 = tl.dot(x0, w0, acc0, input_precision=PRECISION)
            acc0 = tl.dot(minus1, w1, acc0, input_precision=PRECISION)
            acc1 = tl.dot(vector0, w1, acc1, input_precision=PRECISION)
            acc1 = tl.dot(scalar1, w0, acc1, input_precision=PRECISION)
        acc2 = tl.dot(vector0, w2, acc2, input_precision=PRECISION)
        acc2 = tl.dot(plus1, w3, acc2, input_precision=PRECISION)
        acc3 = tl.dot(vector0, w3, acc3, input_precision=PRECISION)
        acc3 = tl.dot(minus1, w2, acc3, input_precision=PRECISION)
    scalar2 = -x2 if CONJ_X else x2
    scalar3 = -x3 if CONJ_X else x3
    plus2 = x2 if CONJ_X == CONJ_W else -x2
    plus3 = x3 if CONJ_X == CONJ_W else -x3
    minus2 = -x2 if CONJ_X == CONJ_W else x2
    minus3 = -x3 if CONJ_X == CONJ_W else x3
    if not OUT_HALF:
        acc0 = tl.dot(minus2, w2, acc0, input_precision=PRECISION)
        acc0 = tl.dot(minus3, w3, acc0, input_precision=PRECISION)
        acc1 = tl.dot(minus2, w3, acc1, input_precision=PRECISION)
        acc1 = tl.dot(plus3, w2, acc1, input_precision=PRECISION)
    # Hopper's tensor cores read a negated operand from registers. Triton 3.6 lets the last product
    # run on after the loop, where those registers get other values: let it be one of x itself.
    if CONJ_X:
        acc3 = tl.dot(plus2, w1, acc3, input_precision=PRECISION)
        acc3 = tl.dot(scalar3, w0, acc3, input_precision=PRECISION)
        acc2 = tl.dot(scalar2, w0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(minus3, w1, acc2, input_precision=PRECISION)
    else:
        acc2 = tl.dot(scalar2, w0, acc2, input_precision=PRECISION)
        acc2 = tl.dot(minus3, w1, acc2, input_precision=PRECISION)
        acc3 = tl.dot(plus2, w1, acc3, input_precision=PRECISION)
        acc3 = tl.dot(scalar3, w0, acc3, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


@triton.jit
def operand(t, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Convert t to what the products take.

    TF32 is rounded to nearest: the tensor cores would truncate.
    """
    t = t.to(dtype)
    if dtype == tl.float32 and PRECISION == "tf32":
        rounded = ((t.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        t = tl.where(t == t, rounded, t)
    return t


@triton.jit
def unit_quaternion(r, i, j, k):
    """Normalize weights, and return one over their norm as well."""
    inverse = tl.div_rn(1.0, tl.sqrt_rn(r * r + i * i + j * j + k * k + ROTATION_EPS))
    return r * inverse, i * inverse, j * inverse, k * inverse, inverse


@triton.jit
def rotation_entries(r, i, j, k):
    """Build the 3 × 3 matrix of the rotation by a unit quaternion, row (input) by row."""
    return (
        1 - 2 * (j * j + k * k),
        2 * (i * j + r * k),
        2 * (i * k - r * j),
        2 * (i * j - r * k),
        1 - 2 * (i * i + k * k),
        2 * (j * k + r * i),
        2 * (i * k + r * j),
        2 * (j * k - r * i),
        1 - 2 * (i * i + j * j),
    )


@triton.jit
def rotate(
    x,
    w,
    scale,
    acc,
    dtype: tl.constexpr,
    BACK: tl.constexpr,
    SCALE: tl.constexpr,
    IN_HALF: tl.constexpr,
    OUT_HALF: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Accumulate x rotated by w, or back; the component r of the result is left alone."""
    _, x1, x2, x3 = x
    r, i, j, k, _ = unit_quaternion(w[0], w[1], w[2], w[3])
    if BACK:
        r = -r
    e11, e12, e13, e21, e22, e23, e31, e32, e33 = rotation_entries(r, i, j, k)
    if SCALE:
        e11, e12, e13 = e11 * scale, e12 * scale, e13 * scale
        e21, e22, e23 = e21 * scale, e22 * scale, e23 * scale
        e31, e32, e33 = e31 * scale, e32 * scale, e33 * scale
    acc0, acc1, acc2, acc3 = acc
    if not OUT_HALF:
        if not IN_HALF:
            acc1 = tl.dot(x1, operand(e11, dtype, PRECISION), acc1, input_precision=PRECISION)
        acc1 = tl.dot(x2, operand(e21, dtype, PRECISION), acc1, input_precision=PRECISION)
        acc1 = tl.dot(x3, operand(e31, dtype, PRECISION), acc1, input_precision=PRECISION)
    if not IN_HALF:
        acc2 = tl.dot(x1, operand(e12, dtype, PRECISION), acc2, input_precision=PRECISION)
        acc3 = tl.dot(x1, operand(e13, dtype, PRECISION), acc3, input_precision=PRECISION)
    acc2 = tl.dot(x2, operand(e22, dtype, PRECISION), acc2, input_precision=PRECISION)
    acc2 = tl.dot(x3, operand(e32, dtype, PRECISION), acc2, input_precision=PRECISION)
    acc3 = tl.dot(x2, operand(e23, dtype, PRECISION), acc3, input_precision=PRECISION)
    acc3 = tl.dot(x3, operand(e33, dtype, PRECISION), acc3, input_precision=PRECISION)
    return acc0, acc1, acc2, acc3


@triton.jit
def rotation_gradient(d, r, i, j, k, inverse):
    """Turn gradients of the 9 entries into those of the weights, before they were normalized."""
    d11, d12, d13, d21, d22, d23, d31, d32, d33 = d
    dr = 2 * (k * (d12 - d21) + j * (d31 - d13) + i * (d23 - d32))
    di = 2 * (j * (d21 + d12) + k * (d31 + d13) + r * (d23 - d32) - 2 * i * (d22 + d33))
    dj = 2 * (i * (d21 + d12) + k * (d32 + d23) + r * (d31 - d13) - 2 * j * (d11 + d33))
    dk = 2 * (i * (d31 + d13) + j * (d32 + d23) + r * (d12 - d21) - 2 * k * (d11 + d22))
    along = r * dr + i * di + j * dj + k * dk
    return (
        (dr - r * along) * inverse,
        (di - i * along) * inverse,
        (dj - j * along) * inverse,
        (dk - k * along) * inverse,
    )
