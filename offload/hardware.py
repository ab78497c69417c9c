"""What this machine is: CPU features, physical cores, NUMA nodes. Measures nothing and imports nothing heavy."""

import ctypes
import functools
import os
import platform
import sys
from pathlib import Path

from offload.errors import UnsupportedMachine

CPUINFO = Path("/proc/cpuinfo")
CPU_TOPOLOGY = Path("/sys/devices/system/cpu")
NUMA_NODES = Path("/sys/devices/system/node")
CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
REQUIRED_FEATURES = ("avx2", "fma", "f16c")


@functools.cache
def _first_cpu() -> dict[str, str]:
    """The first CPU's fields of /proc/cpuinfo; empty where it cannot be read."""
    try:
        text = CPUINFO.read_text(encoding="ascii", errors="replace")
    except OSError:
        return {}
    lines = text.split("\n\n", 1)[0].splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def cpu_features() -> frozenset[str]:
    """Feature flags as Linux spells them; what the kernel has not enabled is absent."""
    return frozenset(_first_cpu().get("flags", "").split())


def cpu_vendor() -> str:
    """ "GenuineIntel", "AuthenticAMD", or whatever the CPU calls itself."""
    return _first_cpu().get("vendor_id", "")


@functools.cache
def may_use_tiles() -> bool:
    """Ask Linux for AMX's tile registers (8 KB more to save for each thread that uses them); whether it agrees."""
    arch_prctl, request, tile_data = 158, 0x1023, 18  # the call, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    syscall = ctypes.CDLL(None).syscall
    return bool(syscall(ctypes.c_long(arch_prctl), ctypes.c_long(request), ctypes.c_long(tile_data)) == 0)


def require_supported_machine() -> None:
    """Check that this is Linux on x86-64 with AVX2, FMA and F16C.

    Raises:
        UnsupportedMachine: it is not; the message says what is missing.
    """
    system, machine = sys.platform, platform.machine()
    if system != "linux" or machine not in ("x86_64", "AMD64"):
        raise UnsupportedMachine(f"hybrid runs on Linux on x86-64; this machine is {system} on {machine}.")
    missing = [name.upper() for name in REQUIRED_FEATURES if name not in cpu_features()]
    if missing:
        raise UnsupportedMachine(
            f"hybrid needs a CPU with AVX2, FMA and F16C (Intel Haswell, AMD Zen or newer); this one lacks "
            f"{', '.join(missing)}. In a virtual machine, ask for the host's CPU model."
        )


def physical_cores() -> list[int]:
    """One logical CPU of each physical core that this process may run on, in ascending order; in a container
    that may use less CPU time than that, as many as its quota fills."""
    first_of_core: dict[tuple[str, str], int] = {}
    for cpu in sorted(os.sched_getaffinity(0)):
        topology = CPU_TOPOLOGY / f"cpu{cpu}" / "topology"
        try:
            core = ((topology / "physical_package_id").read_text(), (topology / "core_id").read_text())
        except OSError:
            core = ("", str(cpu))
        first_of_core.setdefault(core, cpu)
    return sorted(first_of_core.values())[: _quota()]


def _quota() -> int | None:
    """CPUs' worth of time this control group may use; None: no limit."""
    try:
        time, period = CPU_QUOTA.read_text().split()
        return None if time == "max" else max(1, -(-int(time) // int(period)))
    except (OSError, ValueError):
        return None


def numa_nodes() -> dict[int, int]:
    """The NUMA node of every CPU, as Linux numbers both; empty where it does not say."""
    found: dict[int, int] = {}
    for directory in NUMA_NODES.glob("node[0-9]*"):
        try:
            text = (directory / "cpulist").read_text().strip()
        except OSError:
            continue
        for part in filter(None, text.split(",")):  # "0-3,8-11"
            first, _, last = part.partition("-")
            found.update(dict.fromkeys(range(int(first), int(last or first) + 1), int(directory.name[4:])))
    return found
