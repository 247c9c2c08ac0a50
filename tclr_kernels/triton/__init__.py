"""The kernels of `backends/triton.py`. The first call of an operator imports them, and with them Triton.

small.py      the operation of `symmetric.py` for many small groups: several groups in one tile, one launch each way
large.py      the same for few large groups, whose Gram matrices are computed by tiles
wide.py       the gradient of `large.py` for rows of more than 512 features, with matrix products by torch.bmm
rectangle.py  the operation of `general.py`: some rows against some columns, with labels
epilogue.py   the elementwise functions that they share: unit rows, terms, the gradients of neg and pos
sets.py       preparation of arguments, and the launches
tiles.py      the tile sizes for each class of devices, checked by `python -m benchmarks.compile_triton`
tuning.py     tile sizes by measurement, with TCLR_KERNELS_AUTOTUNE=1
"""
