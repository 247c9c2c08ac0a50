"""Patches Triton's interpreter, so that it takes half the time and adds in the order of a GPU."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair():
    patch_once_a_launch()
    add_in_order()


def patch_once_a_launch():
    """The interpreter patches triton.language at every call of a device function, which takes 2 ms. The patch lasts
    until the launch ends, so patching once per launch is enough."""
    patch, patched = interpreter._patch_lang, set()

    def once(fn):
        modules = {id(x) for x in fn.__globals__.values() if x is tl or x is tl.core}
        if modules <= patched:
            return None
        patched.update(modules)
        scope = patch(fn)
        restore = scope.restore

        def restored():
            patched.clear()
            restore()

        scope.restore = restored
        return scope

    interpreter._patch_lang = once


def add_in_order():
    """Adds products in float32 one feature at a time, as a GPU does. Then <x, y> and <y, x> have the same bits in
    forward and backward. With numpy they differ, and the weights exp(S - neg) become wrong if S is in the hundreds."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *settings):
        if a.data.dtype not in (np.float16, np.float32) or b.data.dtype != a.data.dtype or d.data.dtype != np.float32:
            return multiply(self, a, b, d, *settings)
        total, left, right = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(left.shape[-1]):
            total = (total + left[..., :, k, None] * right[..., k, None, :]).astype(np.float32)  # fused multiply-add
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
