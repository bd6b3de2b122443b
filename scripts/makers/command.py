"""The ``kvp-edge`` command as a process of the package that is installed."""

from __future__ import annotations

import sys

# What the console script does. "-m" would put the current folder first on the path, where a
# checkout has the package without its compiled library.
COMMAND = [
    sys.executable,
    "-c",
    "import sys; sys.path.remove(''); from kvp_edge.cli import main; sys.exit(main())",
]
