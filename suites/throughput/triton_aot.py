"""Compiles every kernel that the Triton backend launches to PTX and cubin, with no GPU: registers, spills, memory.

    python -m suites.throughput.triton_aot                    every scheme at the 7B shape for sm_80, sm_89, sm_90
    python -m suites.throughput.triton_aot --model 169m --quant q4f16_1 --arch 90 --format json

Exit status: 0; 1 if a kernel spills for sm_90; 2 for wrong usage; 3 without triton, or in its interpreter.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from backends.triton_cuda import INFO, machine
from reference.config import preset
from reference.errors import InputError

if TYPE_CHECKING:
    from suites.throughput.triton_launches import Launch

ARCHITECTURES = (80, 89, 90)
#: The card that the bars are for: there nothing may spill.
STRICT = 90
_INSTALL = "pip install '.[triton]'"

#: A fused product with packed weights in each of its tiles, and dequantize-then-cuBLAS.
PROMPTS = (16, 32, 64, 512)


@dataclass(frozen=True)
class Compiled:
    """What one kernel needs: registers of a thread, bytes that it spills, of shared memory, of the cubin."""

    kernel: str
    scheme: str
    what: str
    arch: int
    warps: int
    registers: int
    spills: int
    shared: int
    cubin: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; see the module."""
    asked = _parsed(arguments)
    lacking = [package for package in ("triton", "torch") if not machine.installed(package)]
    if lacking or machine.interpreted():
        why = f"{lacking[0]} is not installed" if lacking else "TRITON_INTERPRET is set, so nothing is compiled"
        print(f"{why}: {_INSTALL if lacking else 'unset it'}", file=sys.stderr)
        return 3
    try:
        config = preset(asked.model)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    from suites.throughput.triton_launches import launches

    rows = [
        compiled(launch, scheme, arch)
        for scheme in asked.quant
        for launch in launches(config, scheme, PROMPTS)
        for arch in asked.arch
    ]
    print(json.dumps([asdict(row) for row in rows], indent=1) if asked.format == "json" else table(rows))
    spilling = [row for row in rows if row.arch == STRICT and row.spills]
    if spilling:
        names = ", ".join(f"{row.kernel} of {row.scheme}" for row in spilling)
        print(f"spills for sm_{STRICT}: {names}", file=sys.stderr)
    return 1 if spilling else 0


def compiled(launch: Launch, scheme: str, arch: int) -> Compiled:
    """Compile a launch, and read what its code needs."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    attributes = {(i,): [["tt.divisibility", 16]] for i in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    registers, spills = _resources(built.asm["cubin"])
    return Compiled(
        kernel=launch.kernel.fn.__name__,
        scheme=scheme,
        what=launch.what,
        arch=arch,
        warps=built.metadata.num_warps,
        registers=registers,
        spills=spills,
        shared=built.metadata.shared,
        cubin=len(built.asm["cubin"]),
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, by the cuobjdump that Triton brings.

    No kernel has arrays that are indexed at run time, so what lies on the stack are spilled registers.
    """
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said)
    if found is None:
        raise RuntimeError(f"cuobjdump says nothing of registers and stack: {said.strip()}")
    return int(found[1]), int(found[2]) + int(found[3])


def table(rows: Sequence[Compiled]) -> str:
    """One line for each kernel and scheme, its architectures side by side: registers, and spilled bytes after a +."""
    archs = list(dict.fromkeys(row.arch for row in rows))
    lines = [f"{'kernel':17}{'scheme':9}{'launched in':15}{'warps':>6}{'shared':>8}"]
    lines[0] += "".join(f"{f'sm_{arch}':>8}" for arch in archs)
    # One launch is compiled for all architectures before the next, so its rows lie side by side.
    for first in range(0, len(rows), len(archs)):
        group = rows[first : first + len(archs)]
        row = group[-1]
        cells = "".join(f"{f'{r.registers}+{r.spills}' if r.spills else r.registers:>8}" for r in group)
        lines.append(f"{row.kernel:17}{row.scheme:9}{row.what:15}{row.warps:>6}{row.shared:>8}{cells}")
    return "\n".join(lines)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m suites.throughput.triton_aot", description=__doc__)
    parser.add_argument("--model", default="7b-world", help="a shape (default: 7b-world)")
    parser.add_argument("--quant", nargs="+", default=list(INFO.schemes), choices=list(INFO.schemes), metavar="SCHEME")
    parser.add_argument("--arch", nargs="+", type=int, default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--format", choices=("table", "json"), default="table")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
