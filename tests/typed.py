"""python -m tests.typed: pyright finds a type for everything that the package exports, its members and its parameters.

`pyright --verifytypes` counts every module that has no underscore, the kernels too; public is what `__all__` names.
"""

import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import tclr_kernels


def main():
    root = Path(__file__).parents[1]
    command = [Path(sys.executable).with_name("pyright"), "--pythonpath", sys.executable, "--outputjson"]
    command += ["--ignoreexternal", "--verifytypes", "tclr_kernels"]
    # from elsewhere, since pyright does not follow an editable installation
    run = subprocess.run(
        command,
        cwd=root.anchor,
        env={"PYTHONPATH": f"{root}:{sysconfig.get_path('purelib')}"},
        capture_output=True,
        text=True,
    )
    symbols = json.loads(run.stdout)["typeCompleteness"]["symbols"]
    public = [getattr(tclr_kernels, name) for name in tclr_kernels.__all__]
    names = {f"{x.__module__}.{x.__qualname__}" for x in public} | {
        f"{base.__module__}.{base.__qualname__}"
        for x in public
        if isinstance(x, type)
        for base in x.__mro__
        if base.__module__.startswith("tclr_kernels")
    }
    due = [s for s in symbols if any(s["name"] == name or s["name"].startswith(f"{name}.") for name in names)]
    assert {s["name"] for s in due} >= {f"{x.__module__}.{x.__qualname__}" for x in public}, "pyright missed a name"
    untyped = [s["name"] for s in due if not s["isTypeKnown"]]
    print(f"{len(due) - len(untyped)} of {len(due)} public symbols have a known type", *untyped, sep="\n")
    return bool(untyped)


if __name__ == "__main__":
    sys.exit(main())
