"""Losses with the names, arguments, shapes and defaults of other libraries, on the kernels of this one.

Each module stands for one library: a user changes the import and nothing else. No module imports the library that it
stands for. docs/drop-ins.md has a line before and after for each, and says what differs.
"""

from . import lightly, metric_learning, moco, open_clip, sentence_transformers, solo, sup_contrast

__all__ = ["lightly", "metric_learning", "moco", "open_clip", "sentence_transformers", "solo", "sup_contrast"]
