"""Triton's interpreter in half the time: it patches triton.language, 2 ms, at every call of a device function.

Nothing undoes that patch before the launch ends, so once a launch is enough.
"""

import triton.language as tl
from triton.runtime import interpreter


def patch_once_a_launch():
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
