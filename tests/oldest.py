"""python tests/oldest.py: prints pip constraints for the oldest release of all dependencies in pyproject.toml."""

import re
import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
for line in {line for name in ("train", "test") for line in project["optional-dependencies"][name]}:
    name, bound = re.fullmatch(r"([\w-]+)(?:\[[\w,]+\])?>=([\w.]+)(?:;.*)?", line).groups()
    print(f"{name}=={bound}")
