"""python -m tests.typed: pyright finds a type for every name of the package, as `pyright --verifytypes` counts them."""

import os
import subprocess
import sys
from pathlib import Path


def main():
    root = Path(__file__).parents[1]
    programs = Path(sys.executable).parent
    command = [programs / "pyright", "--ignoreexternal", "--verifytypes", "tclr_kernels"]
    # from elsewhere, since pyright does not follow an editable installation; with the packages of the python in PATH
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=root.anchor, env=environment, capture_output=True, text=True)
    print(run.stdout + run.stderr if run.returncode else "every public name has a known type")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
