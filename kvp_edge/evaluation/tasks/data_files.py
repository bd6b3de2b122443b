"""Files of a user's data folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(path: Path, collection: str) -> Iterator[None]:
    """Tells which file it is that cannot be read, and what it was taken for.

    Raises:
        ValueError: instead of what the code inside stumbles over.
    """
    stumbles = (AttributeError, EOFError, LookupError, OSError, TypeError)
    try:
        yield
    except (*stumbles, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a file of {collection}: {type(error).__name__}: {error}"
        ) from error
