"""The on-disk cache of compiled kernels, and which kernels a CPU is given."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from offload import hardware
from offload.errors import UnsupportedMachine, UsageError
from offload.kernels import jit, levels

ROOT = Path(__file__).resolve().parents[2]
USE = """
from offload.kernels.jit import DONE, compile_job
from tests.unit.test_kernels_jit import answer
job = compile_job(answer)
assert job.ctypes(1, 0, 1, 0) == 42
print("hits", job.cache_hits)
"""


def answer(args: int, lane: int, lanes: int, control: int) -> int:
    return args + 41


def use(cache: Path) -> str:
    """A new process compiles and runs a job; what it prints."""
    child = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=ROOT,
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert child.returncode == 0, child
    return child.stdout.strip()


def entries(cache: Path, suffix: str) -> list[Path]:
    return sorted((cache / "hybrid" / "kernels").rglob(f"*answer*{suffix}"))


def test_the_second_process_loads_what_the_first_compiled(tmp_path: Path) -> None:
    assert use(tmp_path) == "hits 0"
    assert len(entries(tmp_path, ".nbc")) == 1
    assert use(tmp_path) == "hits 1"


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("left", [0, 100])
def test_a_damaged_entry_costs_only_time(tmp_path: Path, suffix: str, left: int) -> None:
    use(tmp_path)
    (entry,) = entries(tmp_path, suffix)
    entry.write_bytes(entry.read_bytes()[:left])
    assert use(tmp_path) == "hits 0"
    assert use(tmp_path) == "hits 1"


def test_an_unusable_cache_directory_costs_only_time(tmp_path: Path) -> None:
    (tmp_path / "hybrid").write_text("a file where the directory should be")
    assert use(tmp_path) == "hits 0"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def no_space(*_: object) -> None:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"x")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_data", no_space)
    assert jit.compile_job(answer).ctypes(1, 0, 1, 0) == 42


def test_other_sources_are_another_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jit.compile_job(answer)
    monkeypatch.setattr(jit, "SOURCE_HASH", "of other sources")
    assert jit.compile_job(answer).cache_hits == 0
    assert jit.compile_job(answer).cache_hits == 1
    shutil.rmtree(tmp_path / "hybrid")
    assert jit.compile_job(answer).cache_hits == 0


def with_cpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, flags: str) -> None:
    """Make /proc/cpuinfo say this."""
    file = tmp_path / "cpuinfo"
    file.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    monkeypatch.setattr(hardware, "CPUINFO", file)
    hardware._first_cpu.cache_clear()


@pytest.fixture(autouse=True)
def _fresh_cpu() -> Iterator[None]:
    """What one test says about the CPU is forgotten after it."""
    yield
    hardware._first_cpu.cache_clear()


AVX2 = "sse2 avx avx2 fma f16c"
AVX512 = f"{AVX2} avx512f avx512bw avx512vl avx512dq"


@pytest.mark.parametrize(
    ("vendor", "flags", "name", "codes"),
    [
        ("GenuineIntel", AVX2, "avx2", "offset"),
        ("AuthenticAMD", AVX2, "avx2", "shift"),
        ("GenuineIntel", AVX512, "avx512", "offset"),
        ("AuthenticAMD", AVX512, "avx512", "shift"),
        ("GenuineIntel", f"{AVX512} amx_tile amx_bf16", "amx", "offset"),
        ("GenuineIntel", f"{AVX512} amx_tile amx_int8", "avx512", "offset"),
        ("GenuineIntel", "sse2 avx avx512f", "portable", "half"),
    ],
)
def test_the_best_level_of_a_cpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, vendor: str, flags: str, name: str, codes: str
) -> None:
    with_cpu(monkeypatch, tmp_path, vendor, flags)
    monkeypatch.setattr(levels, "may_use_tiles", lambda: True)
    level = levels.choose_level()
    assert (level.name, level.codes) == (name, codes)


def test_no_tiles_where_linux_refuses_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cpu(monkeypatch, tmp_path, "GenuineIntel", f"{AVX512} amx_tile amx_bf16")
    monkeypatch.setattr(levels, "may_use_tiles", lambda: False)
    assert levels.choose_level().name == "avx512"
    with pytest.raises(UsageError, match=r"'amx'.*lacks amx_tile"):
        levels.choose_level("amx")


def test_a_level_that_the_cpu_lacks_is_refused_before_anything_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with_cpu(monkeypatch, tmp_path, "GenuineIntel", AVX2)
    with pytest.raises(UsageError, match=r"'avx512'.*lacks avx512f, avx512bw"):
        levels.choose_level("avx512")
    with pytest.raises(UsageError, match="no kernel level 'sse9'; choose one of amx, avx512, avx2, portable"):
        levels.choose_level("sse9")
    hardware.require_supported_machine()


def test_an_old_cpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with_cpu(monkeypatch, tmp_path, "GenuineIntel", "sse2 avx fma")
    with pytest.raises(UnsupportedMachine, match="this one lacks AVX2, F16C"):
        hardware.require_supported_machine()


def test_another_architecture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    with pytest.raises(UnsupportedMachine, match="aarch64"):
        hardware.require_supported_machine()


def test_physical_cores_are_within_the_affinity() -> None:
    allowed = os.sched_getaffinity(0)
    cores = hardware.physical_cores()
    assert set(cores) <= allowed
    assert cores == sorted(set(cores))
    one = {min(allowed)}
    os.sched_setaffinity(0, one)
    try:
        assert hardware.physical_cores() == sorted(one)
    finally:
        os.sched_setaffinity(0, allowed)


def test_siblings_of_one_core_count_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for cpu, core in enumerate((0, 1, 0, 1)):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text("0\n")
        (topology / "core_id").write_text(f"{core}\n")
    monkeypatch.setattr(hardware, "CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert hardware.physical_cores() == [0, 1]
