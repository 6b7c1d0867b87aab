"""Teach Triton's CPU interpreter bfloat16. Set TRITON_INTERPRET=1 before triton is imported.

    import bf16_interpreter; bf16_interpreter.install()

The interpreter keeps bfloat16 as the bits of a uint16 and computes with the bits: sums, products
and comparisons come out wrong, and a store cuts float32 short instead of rounding it. Here every
such operation goes through float32 and rounds to nearest even, as a GPU does. What is left wrong
is tl.sum and tl.cumsum of bfloat16 itself: kernels widen first, as accuracy wants anyway.
"""
import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def is_bf16(x) -> bool:
    return isinstance(x, TensorHandle) and x.dtype.scalar == tl.bfloat16


def up(x):
    """bfloat16 is the upper half of a float32; anything else passes."""
    if not is_bf16(x):
        return x
    return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


def down(x):
    """float32 -> bfloat16 bits, to the nearest, ties to even; NaN stays NaN."""
    bits = np.ascontiguousarray(x.data, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return TensorHandle(np.where(np.isnan(x.data), 0x7FC0, rounded).astype(np.uint16), tl.bfloat16)


def through_float32(method):
    def call(self, *args, **kwargs):
        if not any(is_bf16(a) for a in args):
            return method(self, *args, **kwargs)
        out = method(self, *map(up, args), **kwargs)
        # a comparison's answer is a bool and stays one
        is_float = out.data.dtype == np.float32 and out.dtype.scalar == tl.float32
        return down(out) if is_float else out
    return call


def install() -> None:
    """Patch the interpreter; a second call changes nothing."""
    builder = InterpreterBuilder
    if getattr(builder, "knows_bf16", False):
        return
    builder.knows_bf16 = True
    for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_fabs",
                 "create_clampf"):
        setattr(builder, name, through_float32(getattr(builder, name)))
    dot, cast, float_cast = builder.create_dot, builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self, source, target):
        if target.scalar == tl.bfloat16:
            return source if is_bf16(source) else down(cast(self, source, tl.float32))
        return cast(self, up(source), target)

    def create_fp_to_fp(self, source, target, rounding):
        if tl.bfloat16 in (source.dtype.scalar, target.scalar):
            return cast_impl(self, source, target)
        return float_cast(self, source, target, rounding)

    builder.create_dot = lambda self, a, b, c, *rest: dot(self, up(a), up(b), c, *rest)
    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp
