"""Turn a trained policy into what runs without PyTorch: a policy file (GGUF), and ONNX.

    python export/export_policy.py RUN [--outfile FILE] [--outtype f16] [--onnx] [--traces DIR]

It is ``kvp-edge export``; the work is done in kvp_edge/export.
"""

import sys

from kvp_edge.cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
