"""Losses with the names, arguments, shapes and defaults of other libraries, on the kernels of this one.

Each module replaces one library: a user changes the import and nothing else. No module imports the library that it
replaces. docs/drop-ins.md shows the import before and after for each library, and says what differs.
"""

from . import lightly, metric_learning, moco, open_clip, sentence_transformers, solo, sup_contrast

__all__ = ["lightly", "metric_learning", "moco", "open_clip", "sentence_transformers", "solo", "sup_contrast"]
