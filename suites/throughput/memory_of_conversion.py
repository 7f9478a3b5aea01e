"""How much memory a conversion needs.

    python -m suites.throughput.memory_of_conversion [--model 7b] [--stored f16] [ggml:FP16 ggml:Q4_0 fr:fp16 ...]

Writes a checkpoint of the real shape and type as a sparse file of zeros (what is read, converted and
written, and so the memory, does not depend on the values) and runs ``rwkv-bench convert`` on it in a child
process, once per format and scheme. Prints the peak of its resident memory against the bar: all of it
(``VmRSS``, the pages of the mapped file included, which are given back tensor by tensor), and the part
that belongs to no file (``RssAnon``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from reference import preset
from suites.throughput.memory_of_reference import write_sparse

BAR_GIB = 3.0
DEFAULT = ("ggml:FP16", "ggml:Q4_0", "safetensors:bf16", "fr:fp16")

_CHILD = """
import argparse, sys
from harness import command_convert
parser = argparse.ArgumentParser()
command_convert.options(parser)
sys.exit(command_convert.run(parser.parse_args(), lambda line: print(line, file=sys.stderr)))
"""


@dataclass(frozen=True)
class Peak:
    """Largest resident memory seen, in bytes, and how long the process ran."""

    resident: int
    anonymous: int
    seconds: float


def measured(command: list[str]) -> Peak:
    """Run a command, looking at its memory every 5 ms; raises CalledProcessError if it fails. Linux only."""
    start = time.perf_counter()
    resident = anonymous = 0
    with subprocess.Popen(command) as child:
        status = Path(f"/proc/{child.pid}/status")
        while child.poll() is None:
            sizes = [line.split() for line in status.read_text().splitlines() if line.startswith(("VmRSS", "RssAnon"))]
            kilobytes = {words[0]: int(words[1]) for words in sizes}  # empty once the process has ended
            resident = max(resident, 1024 * kilobytes.get("VmRSS:", 0))
            anonymous = max(anonymous, 1024 * kilobytes.get("RssAnon:", 0))
            time.sleep(0.005)
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Peak(resident, anonymous, time.perf_counter() - start)


def main() -> int:
    """Print the figures; status 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("conversions", nargs="*", default=DEFAULT, metavar="FORMAT:SCHEME")
    parser.add_argument("--model", default="7b")
    parser.add_argument("--stored", default="f16", choices=("f16", "bf16"))
    parser.add_argument("--folder", default=None, help="where the files go (default: temporary)")
    options = parser.parse_args()
    worst = 0.0
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        source, target = Path(folder) / "sparse.safetensors", Path(folder) / "converted"
        write_sparse(source, preset(options.model), options.stored)
        for conversion in options.conversions:
            format, _, scheme = conversion.partition(":")
            words = [str(source), str(target), "--to", format, *(["--quant", scheme] if scheme else [])]
            peak = measured([sys.executable, "-c", _CHILD, *words])
            size = target.stat().st_size / 2**30
            target.unlink()
            worst = max(worst, peak.resident / 2**30)
            print(
                f"{options.model} {options.stored} -> {format} {scheme}: {size:.1f} GiB in {peak.seconds:.0f} s, "
                f"peak resident {peak.resident / 2**30:.2f} GiB, of it anonymous {peak.anonymous / 2**30:.2f} GiB "
                f"(bar {BAR_GIB} GiB)",
                flush=True,
            )
    return 0 if worst <= BAR_GIB else 1


if __name__ == "__main__":
    sys.exit(main())
