"""Triton's interpreter, in half the time and with a GPU's order of additions."""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def repair():
    patch_once_a_launch()
    add_in_order()


def patch_once_a_launch():
    """It patches triton.language, 2 ms, at every call of a device function; nothing undoes that before the launch ends,
    so once a launch is enough."""
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
    """float32 products, a feature at a time, as a GPU adds them: <x, y> and <y, x> are the same bits, in the backward
    as in the forward. numpy's are not, and where S is 1,000 the weights exp(S - neg) show it."""
    multiply = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, *settings):
        if not a.data.dtype == b.data.dtype == d.data.dtype == np.float32:
            return multiply(self, a, b, d, *settings)
        total, left, right = d.data, a.data.astype(np.float64), b.data.astype(np.float64)
        for k in range(left.shape[-1]):
            total = (total + left[..., :, k, None] * right[..., k, None, :]).astype(np.float32)  # a fused one
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot
