"""What is told of a machine: processors, devices and limits read from captured files and printed text."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness import hardware, listing
from harness.hardware import Hardware, describe, local_hardware
from harness.machine import cpu, facts, gpu
from harness.machine.cpu import Cpu
from harness.machine.facts import Facts
from harness.machine.gpu import Gpu
from harness.machine.limits import Limits, limits

XEON = """\
processor\t: 0
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz
flags\t\t: fpu sse4_2 avx f16c fma avx2 avx512f avx512_vnni amx_bf16 amx_tile amx_int8 hypervisor

processor\t: 1
model name\t: another one
flags\t\t: fpu
"""
GRAVITON = "processor\t: 0\nBogoMIPS\t: 243.75\nFeatures\t: fp asimd aes asimdhp asimddp sve i8mm bf16\n"
PHONE = "Processor\t: AArch64 rev 14\nFeatures\t: fp asimd asimdhp\nHardware\t: Qualcomm Technologies, Inc SM8250\n"
M2_PRO = """\
hw.memsize: 17179869184
hw.nperflevels: 2
hw.perflevel0.physicalcpu: 6
hw.perflevel0.l1dcachesize: 131072
hw.perflevel0.l2cachesize: 16777216
hw.perflevel0.cpusperl2: 4
hw.perflevel1.physicalcpu: 4
hw.perflevel1.l1dcachesize: 65536
hw.perflevel1.l2cachesize: 4194304
hw.perflevel1.cpusperl2: 4
hw.optional.AdvSIMD: 1
hw.optional.arm.FEAT_BF16: 1
hw.optional.arm.FEAT_SME: 0
machdep.cpu.brand_string: Apple M2 Pro
"""
INTEL_MAC = """\
hw.l1dcachesize: 32768
hw.l2cachesize: 262144
hw.l3cachesize: 12582912
hw.cpufrequency_max: 2600000000
machdep.cpu.features: FPU SSE4.2 FMA AVX1.0 F16C
machdep.cpu.leaf7_features: BMI1 AVX2
machdep.cpu.brand_string: Intel(R) Core(TM) i7-9750H CPU @ 2.60GHz
"""
SMI = """\
NVIDIA H100 80GB HBM3, 550.54.15, 81559, 1980, 2619, 700.00, 9.0
NVIDIA GeForce GT 710, 470.223.02, 978, [N/A], 800, [N/A], 3.5
"""
ROCM = json.dumps(
    {
        "card0": {
            "Card Series": "Radeon RX 7900 XTX",
            "VRAM Total Memory (B)": "25753026560",
            "Max Graphics Package Power (W)": "303.0",
            "GFX Version": "gfx1100",
        },
        "card1": {"Card series": "N/A", "Card model": "0x73bf", "VRAM Total Memory (B)": "17163091968"},
        "system": {"Driver version": "6.3.6"},
    }
)
DISPLAYS = json.dumps(
    {
        "SPDisplaysDataType": [
            {"sppci_model": "Apple M2 Pro", "sppci_cores": "16"},
            {"sppci_model": "Intel UHD Graphics 630"},
        ]
    }
)


def written(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "name", "isa"),
    [
        (XEON, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", {"avx512_vnni", "amx_bf16", "avx2"}),
        (GRAVITON, None, {"asimd", "sve", "i8mm", "bf16"}),
        (PHONE, "Qualcomm Technologies, Inc SM8250", {"asimd", "asimdhp"}),
        ("", None, set()),
        ("no colon at all\n", None, set()),
    ],
)
def test_cpuinfo_of_x86_and_arm(text: str, name: str | None, isa: set[str]) -> None:
    found, flags = cpu.parse_cpuinfo(text)
    assert found == name
    assert isa <= set(flags)
    assert "hypervisor" not in flags
    assert "aes" not in flags


def test_a_shared_cache_counts_once_and_instructions_not_at_all(tmp_path: Path) -> None:
    files: dict[str, str] = {}
    for number in range(4):
        at = f"cpu{number}/cache/index"
        files |= {f"{at}0/level": "1\n", f"{at}0/type": "Data\n", f"{at}0/size": "32K\n"}
        files |= {f"{at}0/shared_cpu_list": f"{number}\n"}
        files |= {f"{at}1/level": "1\n", f"{at}1/type": "Instruction\n", f"{at}1/size": "64K\n"}
        files |= {f"{at}2/level": "2\n", f"{at}2/type": "Unified\n", f"{at}2/size": "1024K\n"}
        files |= {f"{at}2/shared_cpu_list": "0-1\n" if number < 2 else "2-3\n"}
        files |= {f"{at}3/level": "3\n", f"{at}3/type": "Unified\n", f"{at}3/size": "32M\n"}
        files |= {f"{at}3/shared_cpu_list": "0-7\n"}
    folder = written(tmp_path, files)
    assert cpu.linux_caches(range(4), folder) == {"l1d": 4 << 15, "l2": 2 << 20, "l3": 32 << 20}
    assert cpu.linux_caches([3], folder) == {"l1d": 1 << 15, "l2": 1 << 20, "l3": 32 << 20}
    assert cpu.linux_caches([9], folder) == {}


def test_a_linux_processor_with_its_clock(tmp_path: Path) -> None:
    at = "sys/devices/system/cpu/cpu2/cpufreq/"
    root = written(
        tmp_path,
        {"proc/cpuinfo": XEON, at + "cpuinfo_max_freq": "3800000\n", at + "scaling_governor": "powersave\n"},
    )
    found = cpu.linux([2, 3], root)
    assert (found.max_mhz, found.governor, found.last_level_bytes) == (3800, "powersave", None)


def test_apple_caches_are_of_all_clusters() -> None:
    found = cpu.parse_sysctl(M2_PRO)
    assert found.name == "Apple M2 Pro"
    assert found.caches == {"l1d": 6 * 131072 + 4 * 65536, "l2": 2 * 16777216 + 4194304}
    assert found.isa == ("asimd", "bf16")
    assert found.last_level_bytes == 2 * 16777216 + 4194304


def test_an_intel_mac() -> None:
    found = cpu.parse_sysctl(INTEL_MAC)
    assert found.caches == {"l1d": 32768, "l2": 262144, "l3": 12582912}
    assert found.isa == ("sse4_2", "avx", "f16c", "fma", "avx2")
    assert found.max_mhz == 2600


def test_nvidia_devices_and_fields_that_a_card_has_not() -> None:
    h100, old = gpu.parse_nvidia(SMI)
    assert h100 == Gpu("NVIDIA H100 80GB HBM3", "NVIDIA", 81559 << 20, "550.54.15", 1980, 2619, 700.0, "9.0")
    assert (old.clock_mhz, old.power_limit_w, old.memory_bytes) == (None, None, 978 << 20)


@pytest.mark.parametrize("text", ["", "Failed to initialize NVML: Driver/library version mismatch", "No devices found"])
def test_a_driver_that_does_not_answer_has_no_devices(text: str) -> None:
    assert gpu.parse_nvidia(text) == []


def test_amd_devices_of_both_tools(tmp_path: Path) -> None:
    first, second = gpu.parse_rocm(ROCM)
    assert first == Gpu("Radeon RX 7900 XTX", "AMD", 25753026560, "6.3.6", power_limit_w=303.0, compute="gfx1100")
    assert second.name == "0x73bf"
    at = "sys/class/drm/card1/device/"
    root = written(
        tmp_path,
        {
            at + "vendor": "0x1002\n",
            at + "product_name": "Radeon RX 7900 XTX\n",
            at + "mem_info_vram_total": "25753026560\n",
            at + "hwmon/hwmon3/power1_cap": "303000000\n",
            "sys/class/drm/card0/device/vendor": "0x8086\n",
            "sys/class/drm/card1-DP-1/device/vendor": "0x1002\n",
        },
    )
    assert gpu.amd_sysfs(root) == [Gpu("Radeon RX 7900 XTX", "AMD", 25753026560, power_limit_w=303.0)]
    assert gpu.parse_rocm("WARNING: AMD GPU device(s) is/are in a low-power state") == []
    assert gpu.parse_rocm("[1]") == []


def test_apple_devices() -> None:
    assert gpu.parse_apple(DISPLAYS) == [Gpu("Apple M2 Pro", "Apple", compute="16 cores")]
    assert gpu.parse_apple("nonsense") == []


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, Limits()),
        (
            {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "150000 100000\n"},
            Limits(1.5),
        ),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/cpu.max": "max 100000\n",
                "sys/fs/cgroup/a/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "8589934592\n",
            },
            Limits(4, 8 << 30),
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "2147483648\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            Limits(2, 2 << 30),
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "1\n"}, Limits()),
    ],
)
def test_container_limits(tmp_path: Path, files: dict[str, str], expected: Limits) -> None:
    assert limits(written(tmp_path, files)) == expected


@given(st.text())
def test_no_text_breaks_a_reader(text: str) -> None:
    cpu.parse_cpuinfo(text)
    cpu.parse_sysctl(text)
    gpu.parse_nvidia(text)
    gpu.parse_rocm(text)
    gpu.parse_apple(text)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Facts:
    """A machine with two NVIDIA devices, in place of this one."""
    cards = gpu.parse_nvidia(SMI)
    found = Facts(Cpu("Some CPU", ("avx2",), {"l3": 1 << 25}), tuple(cards), Limits(1.5, 4 << 30), 8 << 30, "Linux")
    for module in (hardware, facts):
        monkeypatch.setattr(module, "machine_facts" if module is hardware else "facts", lambda: found)
    for cached in (hardware.local_hardware, hardware.cpu_name):
        cached.cache_clear()
    monkeypatch.setattr(facts, "limits", lambda: found.limits)
    return found


@pytest.fixture(autouse=True)
def _asked_anew() -> object:
    yield
    hardware.local_hardware.cache_clear()
    hardware.cpu_name.cache_clear()


@pytest.mark.usefixtures("machine")
def test_rows_tell_of_their_own_device() -> None:
    here = local_hardware()
    assert [(item.name, item.device) for item in here[:2]] == [("cpu", "cpu"), ("h100", "cuda:0")]
    on_cpu, on_gpu = describe(here[0]), describe(here[1])
    assert on_cpu["isa"] == "avx2"
    assert on_cpu["container_cpus"] == 1.5
    assert "driver" not in on_cpu
    assert on_gpu["driver"] == "550.54.15"
    assert on_gpu["power_limit_w"] == 700.0
    assert on_gpu["cpu"] == "Some CPU"
    assert "driver" not in describe(Hardware("mps", "mps", "mps"))


@pytest.mark.usefixtures("machine")
def test_a_quota_bounds_the_threads() -> None:
    assert hardware.usable_cpus() <= 2


def test_nothing_is_asked_at_import() -> None:
    code = (
        "import subprocess, sys, pathlib\n"
        "def refuse(*a, **k): raise SystemExit('asked at import')\n"
        "subprocess.run = subprocess.Popen = refuse\n"
        "import harness.hardware, harness.machine.probe, harness.machine.work, harness.machine.energy\n"
        "from harness.machine.facts import facts\n"
        "assert facts.cache_info().currsize == 0"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_list_shows_what_is_here_and_data_sheets_of_what_is_not(machine: Facts, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RWKV_BENCH_CACHE", str(tmp_path))
        patch.setattr("harness.listing.local_hardware", local_hardware)
        records = {record["name"]: record for record in listing.collect("hardware")["hardware"]}
    assert records["h100"]["here"]
    assert records["h100"]["memory"] == "85.5 GB"
    assert "power_limit_w=700.0" in records["h100"]["facts"]
    assert records["cpu"]["bandwidth"] is None
    assert not records["a800"]["here"]
    assert records["a800"]["bandwidth"] == "2039 GB/s"
    assert records["h200"]["matrix rate"] == "fp32 67, fp16 989, bf16 989, int8 1979 TFLOP/s"
    assert all(record["facts"][0].startswith("source=") for record in records.values() if not record["here"])
