"""python -m tests.typed: pyright finds a type for every name of the package, as `pyright --verifytypes` counts them."""

import subprocess
import sys
import sysconfig
from pathlib import Path


def main():
    root = Path(__file__).parents[1]
    command = [Path(sys.executable).with_name("pyright"), "--pythonpath", sys.executable]
    command += ["--ignoreexternal", "--verifytypes", "tclr_kernels"]
    # from elsewhere, since pyright does not follow an editable installation
    search = {"PYTHONPATH": f"{root}:{sysconfig.get_path('purelib')}"}
    run = subprocess.run(command, cwd=root.anchor, env=search, capture_output=True, text=True)
    print(run.stdout + run.stderr if run.returncode else "every public name has a known type")
    return run.returncode


if __name__ == "__main__":
    sys.exit(main())
