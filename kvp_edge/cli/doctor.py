"""``kvp-edge doctor``: does all of it work on this machine, and what to do if not."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

from kvp_edge.cli.parameters import argument, option
from kvp_edge.cli.shown import say
from kvp_edge.cli.subcommands import Command
from kvp_edge.cli.tables import named
from kvp_edge.doctor.examination import Finding, examine

_EPILOG = """\
Exit status: 0 everything needed works; 1 a fault was found; 2 the file does not exist.

examples:
  kvp-edge doctor
  kvp-edge doctor model.gguf  also what the model is, and whether its cache can
                              be bounded
  kvp-edge doctor --json"""


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str | None = argument(None, metavar="MODEL.gguf", help="also check this file")
    json: bool = option(False, help="print one JSON object")


def _main(args: Options) -> int:
    if args.model is not None and not os.path.isfile(args.model):
        raise FileNotFoundError(f"model file '{args.model}' not found")
    findings = []
    section = ""
    for finding in examine(args.model):
        findings.append(finding)
        if args.json:
            continue
        if finding.section != section:
            section = finding.section
            say(section)
        say(named(finding.name, finding.text, 17, indent=2))
    faults = [finding for finding in findings if finding.fault]
    say(_json(findings) if args.json else _told(faults))
    return 1 if faults else 0


def _told(faults: list[Finding]) -> str:
    if not faults:
        return "\nNo fault was found."
    lines = [f"\n{len(faults)} fault{'s' if len(faults) > 1 else ''} found:"]
    lines += [f"- {one.fault.rstrip('.')}.\n  {one.advice.rstrip('.')}." for one in faults]
    return "\n".join(lines)


def _json(findings: list[Finding]) -> str:
    found: dict[str, dict[str, Any]] = {}
    for one in findings:
        found.setdefault(one.section, {})[one.name] = one.value
    faults = [
        {"section": one.section, "name": one.name, "fault": one.fault, "advice": one.advice}
        for one in findings
        if one.fault
    ]
    result = {"ok": not faults, "found": found, "faults": faults}
    return json.dumps(result, ensure_ascii=False, indent=2)


COMMAND = Command(
    _main,
    Options,
    "Check the installation and this machine, in one to ten seconds. Whatever could crash runs in "
    "a process of its own. Nothing is changed but the stored results about this processor.",
    _EPILOG,
)
