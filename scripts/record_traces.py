"""Records decode blocks on this machine, for the error rates of docs/verdicts.md.

    python scripts/record_traces.py FOLDER [--seconds 120] [--every 0] [--backend numpy,torch]

Writes one JSON file per backend: when, on what machine, by which command, and microseconds of every sample.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from datetime import datetime, timezone
from pathlib import Path

from harness.block_trace import record
from harness.hardware import describe, local_hardware


def main() -> None:
    """Record and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--most", type=int, default=1000)
    parser.add_argument("--every", type=float, default=0.0, help="seconds from one block to the next (default 0)")
    parser.add_argument("--backend", default="numpy,torch")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for backend in arguments.backend.split(","):
        trace = record(backend, "fp32", arguments.seconds, arguments.most, tell=print, every=arguments.every)
        about = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "machine": describe(local_hardware()[0]),
            "command": shlex.join(["python", "scripts/record_traces.py", *sys.argv[1:]]),
            "unit": "us",
        }
        found = trace.to_dict()
        found["blocks"] = [[round(ns / 1e3) for ns in block] for block in trace.blocks]
        file = arguments.folder / f"{backend}.json"
        file.write_text(json.dumps({**about, **found}, separators=(",", ":")) + "\n")
        print(f"{file}: {len(trace.blocks)} blocks, {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
