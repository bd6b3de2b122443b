#!/usr/bin/env python3
"""Requests made up from the server's own /openapi.json, right ones and wrong ones.

    pip install schemathesis
    python scripts/fuzz_requests.py [--cases 4000] [--seed 0]

Schemathesis makes up to so many cases for each operation, of which three take a body, besides those
at the bounds of every field: over 28,000 in all, which takes 20 minutes. Every answer must be
one that the description names, in the form that it says: errors in OpenAI's, no status of 500, and
501 and 503 only where they are documented. In the end the server must have told of no error.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from stress_server import running

CHECKS = (
    *("status_code_conformance", "content_type_conformance", "response_schema_conformance"),
    *("response_headers_conformance", "unsupported_method"),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--cases", type=int, default=4000, help="of each operation")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    beside = Path(sys.executable).parent / "schemathesis"
    command = str(beside) if beside.exists() else shutil.which("schemathesis")
    if command is None:
        raise SystemExit("this needs schemathesis: pip install schemathesis")
    options = ("--longest-reply", "2", "--chats-limit", "64MiB")
    with tempfile.TemporaryDirectory() as folder, running(*options) as server:
        done = subprocess.run(
            [
                *(command, "run", f"{server.url}/openapi.json", "--checks", ",".join(CHECKS)),
                *("--phases", "coverage,fuzzing", "--max-examples", str(args.cases)),
                *("--seed", str(args.seed), "--continue-on-failure", "--warnings", "off"),
            ],
            cwd=folder,  # it leaves files
            check=False,
        )
        status = server.end()
    said = [line for line in server.said if not re.match(r"[\d:]+ read \d+ of", line)]
    wrong = status != 130 or re.search("Traceback|Error|Exception", "".join(said)) is not None
    if wrong:
        print(f"the server ended with status {status} and said:\n{''.join(said)}", file=sys.stderr)
    return 1 if wrong else done.returncode


if __name__ == "__main__":
    sys.exit(main())
