"""The kernels of `backends/triton.py`. They are imported with the first call, and Triton with them.

epilogue.py   what both paths do elementwise: unit rows, terms, the gradients of neg and pos
small.py      many small groups: several of them in one tile, one launch each way
large.py      few large groups: the Gram matrix by tiles
wide.py       the gradient of rows of more than 512 features: its products by the vendor's library
rectangle.py  the general form: some rows against some columns, with labels; by tiles
tiles.py      the tiles of each kind of device, chosen by `python -m benchmarks.compile_triton`
"""
