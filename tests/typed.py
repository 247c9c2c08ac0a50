"""python -m tests.typed: checks with `pyright --verifytypes` that every public name of the package has a type."""

import os
import subprocess
import sys
from pathlib import Path


def main():
    root = Path(__file__).parents[1]
    programs = Path(sys.executable).parent
    command = [programs / "pyright", "--ignoreexternal", "--verifytypes", "tclr_kernels"]
    # pyright does not follow an editable installation, so it runs elsewhere, with this folder on PYTHONPATH
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(root)}
    run = subprocess.run(command, cwd=root.anchor, env=environment, capture_output=True, text=True)
    print(run.stdout + run.stderr if run.returncode else "every public name has a known type")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
