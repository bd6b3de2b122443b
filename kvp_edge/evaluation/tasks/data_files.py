"""Files of a user's data folder."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def reading(path: Path, collection: str) -> Iterator[None]:
    """Turns errors in a data file into one that names the file and its expected contents.

    Raises:
        ValueError: instead of the error inside.
    """
    stumbles = (AttributeError, EOFError, LookupError, OSError, TypeError)
    try:
        yield
    except (*stumbles, ValueError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a file of {collection}: {type(error).__name__}: {error}"
        ) from error
