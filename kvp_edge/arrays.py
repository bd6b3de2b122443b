"""Names for numpy arrays, by what their numbers mean; docs/glossary.md has the words."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]
HalfArray = npt.NDArray[np.float16]
IntArray = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]

# The numbers of a token, all int32. native/kvp_edge.h has them under the same names.
#: Entries of the model's vocabulary.
TokenIds = IntArray
#: Places in the conversation, from 0.
TokenIndices = IntArray
#: llama_pos: what llama.cpp's cell table says.
LlamaPositions = IntArray
#: Positions that cached keys are rotated to.
RopePositions = IntArray
#: Row r of a cache has the r-th smallest llama.cpp position.
Rows = IntArray
