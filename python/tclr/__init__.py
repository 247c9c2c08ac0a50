"""The reference trainer of `tclr_kernels`: pretraining by TCLR, the paper's evaluations, the demo, the ablation."""

from importlib.util import find_spec

_missing = [
    name
    for name in ("av", "jsonargparse", "matplotlib", "numpy", "rich", "safetensors", "tensorboard")
    if find_spec(name) is None
]
if _missing:
    raise ModuleNotFoundError(
        f"the trainer needs {', '.join(_missing)}: pip install 'tclr-kernels[train]'", name=_missing[0]
    )
