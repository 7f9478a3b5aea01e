"""The processor: model, instruction sets, caches; from /proc and /sys on Linux, from sysctl on macOS."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

#: Instruction sets that matrix kernels are written for, as Linux names them; others are not told.
ISA_X86 = (
    *("sse4_2", "avx", "f16c", "fma", "avx2", "avx_vnni", "avx512f", "avx512bw", "avx512vl", "avx512_vnni"),
    *("avx512_bf16", "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16"),
)
ISA_ARM = ("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "svei8mm", "svebf16", "sve2", "sme")

#: macOS: what sysctl calls the same.
_APPLE_ISA = {
    "hw.optional.AdvSIMD": "asimd",
    "hw.optional.arm.FEAT_FP16": "asimdhp",
    "hw.optional.arm.FEAT_DotProd": "asimddp",
    "hw.optional.arm.FEAT_I8MM": "i8mm",
    "hw.optional.arm.FEAT_BF16": "bf16",
    "hw.optional.arm.FEAT_SME": "sme",
}


@dataclass(frozen=True)
class Cpu:
    """A processor as far as its system tells.

    isa      instruction sets of :data:`ISA_X86` and :data:`ISA_ARM` that it has
    caches   ``l1d``, ``l2``, ``l3`` -> bytes, all instances that this process's CPUs use together
    """

    name: str | None = None
    isa: tuple[str, ...] = ()
    caches: Mapping[str, int] = field(default_factory=dict)
    max_mhz: int | None = None
    governor: str | None = None

    @property
    def last_level_bytes(self) -> int | None:
        """Size of the outermost cache."""
        return next((self.caches[level] for level in ("l3", "l2", "l1d") if level in self.caches), None)


def linux(cpus: Iterable[int], root: Path = Path("/")) -> Cpu:
    """The processor of a Linux system below ``root``, as far as these logical CPUs go."""
    cpus = sorted(cpus)
    name, isa = parse_cpuinfo(_read(root / "proc/cpuinfo"))
    folder = root / "sys/devices/system/cpu"
    frequency = folder / f"cpu{cpus[0] if cpus else 0}" / "cpufreq"
    most = _read(frequency / "cpuinfo_max_freq").strip()
    return Cpu(
        name,
        isa,
        linux_caches(cpus, folder),
        int(most) // 1000 if most.isdigit() else None,
        _read(frequency / "scaling_governor").strip() or None,
    )


def parse_cpuinfo(text: str) -> tuple[str | None, tuple[str, ...]]:
    """Model name and instruction sets from ``/proc/cpuinfo``, of x86 or ARM."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            fields.setdefault(key.strip(), value.strip())
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    known = ISA_X86 if "flags" in fields else ISA_ARM
    name = fields.get("model name") or fields.get("Hardware") or fields.get("Processor") or None
    return name, tuple(flag for flag in known if flag in flags)


def linux_caches(cpus: Iterable[int], folder: Path) -> dict[str, int]:
    """Level -> bytes of the data caches of these CPUs; one that several share counts once."""
    found: dict[tuple[str, str], int] = {}
    for cpu in cpus:
        for index in sorted(folder.glob(f"cpu{cpu}/cache/index*")):
            level, size = _read(index / "level").strip(), _size(_read(index / "size"))
            kind = _read(index / "type").strip()
            if kind == "Instruction" or not level or size is None:
                continue
            name = "l1d" if level == "1" else f"l{level}"
            shared = _read(index / "shared_cpu_list").strip() or str(cpu)
            found[name, shared] = size
    totals: dict[str, int] = {}
    for (name, _), size in sorted(found.items()):
        totals[name] = totals.get(name, 0) + size
    return totals


def parse_sysctl(text: str) -> Cpu:
    """The processor from ``sysctl hw machdep.cpu`` of macOS."""
    fields = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)

    def number(name: str) -> int:
        value = fields.get(name, "").strip()
        return int(value) if value.isdigit() else 0

    caches = {"l1d": 0, "l2": 0, "l3": number("hw.l3cachesize")}
    for level in range(number("hw.nperflevels")):
        at = f"hw.perflevel{level}."
        caches["l1d"] += number(at + "physicalcpu") * number(at + "l1dcachesize")
        shared = max(1, number(at + "cpusperl2"))
        caches["l2"] += -(-number(at + "physicalcpu") // shared) * number(at + "l2cachesize")
    caches["l1d"] = caches["l1d"] or number("hw.l1dcachesize")
    caches["l2"] = caches["l2"] or number("hw.l2cachesize")
    isa = [name for key, name in _APPLE_ISA.items() if fields.get(key) == "1"]
    isa += [name for name in ISA_X86 if name.upper().replace("_", ".") in _words(fields)]
    mhz = number("hw.cpufrequency_max") // 1_000_000
    return Cpu(
        fields.get("machdep.cpu.brand_string"),
        tuple(isa),
        {level: size for level, size in caches.items() if size},
        mhz or None,
    )


def _words(fields: Mapping[str, str]) -> set[str]:
    """Features of an Intel Mac, written as ``AVX2 FMA SSE4.2``; AVX is ``AVX1.0``."""
    text = " ".join(fields.get(f"machdep.cpu.{name}", "") for name in ("features", "leaf7_features"))
    return set(text.replace("AVX1.0", "AVX").split())


def _size(text: str) -> int | None:
    """``32K``, ``8192K``, ``32M`` -> bytes."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text.strip())
    return int(found[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[found[2]] if found else None


def _read(path: Path) -> str:
    """A file's text; empty where there is none: what is not told is not known."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
