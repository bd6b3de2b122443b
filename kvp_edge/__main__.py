"""``python -m kvp_edge``: the same as the ``kvp-edge`` command."""

import sys

from kvp_edge.cli import main

if __name__ == "__main__":
    sys.exit(main())
