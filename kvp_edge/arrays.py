"""Names for numpy arrays, by what their numbers mean; docs/glossary.md has the words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
