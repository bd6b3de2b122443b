"""How many examples a property is tried with.

A test decides, so by default everybody gets the same examples. ``KVP_EDGE_SEARCH=50 pytest ...``
looks for what they do not show: new ones at every run, fifty times as many. With
``KVP_EDGE_EXAMPLES=0.25`` it is a quarter of them, where each is dear.
"""

from __future__ import annotations

import math
import os

from hypothesis import HealthCheck, settings

SEARCH = int(os.environ.get("KVP_EDGE_SEARCH", "0"))
_FACTOR = max(SEARCH, 1) * float(os.environ.get("KVP_EDGE_EXAMPLES", "1"))

#: Without a deadline or health checks: a slow machine is no failure, and fixtures that hold models
#: are shared by the examples on purpose.
PROFILE = settings(
    deadline=None,
    derandomize=not SEARCH,
    max_examples=math.ceil(100 * _FACTOR),
    suppress_health_check=list(HealthCheck),
)


def examples(n: int) -> settings:
    """For a property whose examples are cheaper or dearer than most: n instead of 100."""
    return settings(PROFILE, max_examples=math.ceil(n * _FACTOR))
