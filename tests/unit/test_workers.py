"""Worker threads: what a run does, and what happens when something goes wrong. The awkward cases run in a child."""

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numba
import numpy as np
import pytest
import torch

from offload import hardware
from offload.errors import WorkerError
from offload.executor import ExpertExecutor
from offload.kernels.cpu import CpuKernels
from offload.kernels.intrinsics import as_pointer, system_call
from offload.kernels.jit import DONE, compile_job
from offload.store import MmapStore
from offload.workers import Workers, barrier, claim, claim_near

ROOT = Path(__file__).resolve().parents[2]


def fill(args: int, lane: int, lanes: int, control: int) -> int:
    """Adds 1 to each of n numbers, then after a barrier counts them in the word behind."""
    words = as_pointer(args, numba.int64)
    n = words[0]
    number = claim(control, 0)
    while number < n:
        words[2 + number] += 1
        number = claim(control, 0)
    if not barrier(control, lanes, 0):
        return 0
    if lane == lanes - 1:
        total = 0
        for i in range(n):
            total += words[2 + i]
        words[1] = total
    return DONE


def refuse(args: int, lane: int, lanes: int, control: int) -> int:
    return 17 if lane == args else DONE


def run_child(code: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_every_chunk_is_done_once_and_a_barrier_separates(threads: int) -> None:
    workers, job = Workers(threads), compile_job(fill)
    try:
        for n in (0, 1, 7, 1000):
            words = np.zeros(n + 2, np.int64)
            words[0] = n
            for turn in range(1, 30):
                workers.run(job.address, words.ctypes.data)
                assert words[1] == turn * n
            assert (words[2:] == 29).all()
    finally:
        workers.close()


@pytest.mark.parametrize("lane", [0, 1])
def test_a_lane_that_fails_is_reported_and_the_workers_go_on(lane: int) -> None:
    workers, job = Workers(2), compile_job(refuse)
    try:
        with pytest.raises(WorkerError, match="status 17"):
            workers.run(job.address, lane)
        workers.run(job.address, 5)
    finally:
        workers.close()


def test_closed_workers_say_so() -> None:
    workers = Workers(2)
    workers.close()
    workers.close()
    with pytest.raises(WorkerError, match="closed"):
        workers.run(compile_job(refuse).address, 5)


def test_no_threads_are_refused() -> None:
    with pytest.raises(WorkerError, match="at least 1"):
        Workers(0)


def test_idle_workers_use_no_cpu() -> None:
    workers = Workers(3)
    try:
        workers.run(compile_job(refuse).address, 5)
        time.sleep(0.5)
        before = time.process_time()
        time.sleep(3)
        assert time.process_time() - before < 0.05
        workers.run(compile_job(refuse).address, 5)
    finally:
        workers.close()


EXIT = 60  # the system call that ends the calling thread alone


def vanish(args: int, lane: int, lanes: int, control: int) -> int:
    if lane == 1:
        system_call(EXIT, 0, 0, 0, 0)
    if args == 1 and not barrier(control, lanes, 0):
        return 0
    return DONE


@pytest.mark.parametrize("at_barrier", [0, 1])
def test_a_worker_that_dies_is_an_error_and_not_a_hang(at_barrier: int) -> None:
    child = run_child(
        f"""
        from tests.unit.test_workers import vanish
        from offload.errors import WorkerError
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        workers = Workers(2)
        for _ in range(2):
            try:
                workers.run(compile_job(vanish).address, {at_barrier})
            except WorkerError as error:
                print(error)
        """
    )
    assert child.stdout.count("A worker thread died") == 2, child
    assert child.returncode == 0, child


def raise_it(args: int, lane: int, lanes: int, control: int) -> int:
    if lane == 1:
        raise ValueError("broken")
    return DONE


def test_an_exception_in_a_job_is_an_error() -> None:
    child = run_child(
        """
        from tests.unit.test_workers import raise_it
        from offload.errors import WorkerError
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        workers = Workers(2)
        try:
            workers.run(compile_job(raise_it).address, 0)
        except WorkerError as error:
            print(error)
        """
    )
    assert "A kernel job failed" in child.stdout, child


def test_a_forked_child_is_told_and_the_parent_goes_on() -> None:
    child = run_child(
        """
        import os
        from tests.unit.test_workers import refuse
        from offload.errors import WorkerError
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        workers, job = Workers(2), compile_job(refuse)
        workers.run(job.address, 5)
        if (pid := os.fork()) == 0:
            try:
                workers.run(job.address, 5)
            except WorkerError as error:
                print(error, flush=True)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == 0
        workers.run(job.address, 5)
        print("parent fine")
        """
    )
    assert "do not survive a fork" in child.stdout, child
    assert "parent fine" in child.stdout, child


def test_the_caller_may_run_anywhere_however_early_it_calls() -> None:
    before, job = os.sched_getaffinity(0), compile_job(refuse)
    for _ in range(150):  # a worker that has not begun yet cannot be moved out of the caller's way
        workers = Workers(2)
        workers.run(job.address, 5)
        workers.close()
        assert os.sched_getaffinity(0) == before


def test_ctrl_c_leaves_the_workers_usable() -> None:
    child = run_child(
        """
        import os, signal, threading
        from tests.unit.test_workers import refuse
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
        workers, job = Workers(2), compile_job(refuse)
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
        try:
            while True:
                workers.run(job.address, 5)
        except KeyboardInterrupt:
            workers.run(job.address, 5)
            print("usable")
        """
    )
    assert child.stdout.strip() == "usable", child
    assert child.returncode == 0, child


def test_a_process_ends_with_workers_left_open() -> None:
    child = run_child("from offload.workers import Workers; workers = Workers(3); print('end')", timeout=60)
    assert child.stdout.strip() == "end", child
    assert child.returncode == 0, child


def leave_early(args: int, lane: int, lanes: int, control: int) -> int:
    """Lane `args % 10` leaves before the barrier: by status, or if args >= 10 by raising."""
    if lane == args % 10:
        if args >= 10:
            raise ValueError("broken")
        return 17
    return DONE if barrier(control, lanes, 0) else 18


@pytest.mark.parametrize("args", [0, 1, 2, 10, 11])
def test_a_lane_that_leaves_before_a_barrier_does_not_hang_the_others(args: int) -> None:
    child = run_child(
        f"""
        from tests.unit.test_workers import leave_early, refuse
        from offload.errors import WorkerError
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        workers = Workers(3)
        for _ in range(20):
            try:
                workers.run(compile_job(leave_early).address, {args})
            except WorkerError as error:
                message = str(error)
        print(message)
        workers.run(compile_job(refuse).address, 5)
        """
    )
    assert "A kernel job failed" in child.stdout, child
    assert child.returncode == 0, child


def slow_or_gone(args: int, lane: int, lanes: int, control: int) -> int:
    """Lane 1 vanishes; lane 2 writes to the caller's memory only after a while."""
    if lane == 1:
        system_call(EXIT, 0, 0, 0, 0)
    if lane == 2:
        words = as_pointer(args, numba.int64)
        for i in range(30_000_000):
            words[1] = i
        words[0] = 1
    return DONE


def test_a_death_is_reported_only_when_the_living_have_left_the_callers_memory() -> None:
    child = run_child(
        """
        import numpy as np
        from tests.unit.test_workers import slow_or_gone
        from offload.errors import WorkerError
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
        workers, words = Workers(3), np.zeros(2, np.int64)
        try:
            workers.run(compile_job(slow_or_gone).address, words.ctypes.data)
        except WorkerError as error:
            print(error, words[0])
        """
    )
    assert "A worker thread died" in child.stdout, child
    assert child.stdout.strip().endswith(" 1"), child


def deal(args: int, lane: int, lanes: int, control: int) -> int:
    """Notes which lane took each of 6 x 20 chunks, and in which order."""
    taken = as_pointer(args, numba.int64)
    number, turn = claim_near(control, lane, 1, 6, 20, 0)
    while number < 120:
        taken[2 * number] = lane
        taken[2 * number + 1] = claim(control, 0)
        number, turn = claim_near(control, lane, 1, 6, 20, turn)
    return DONE


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_lanes_take_their_own_nodes_slices_first(monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    monkeypatch.setattr("offload.workers.physical_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr("offload.workers.numa_nodes", lambda: {0: 0, 1: 0, 2: 3, 3: 3})
    workers = Workers(threads)
    try:
        assert workers.nodes == [0, 3][:threads]
        for _ in range(20):
            taken = np.full((120, 2), -1)
            workers.run(compile_job(deal).address, taken.ctypes.data)
            assert sorted(taken[:, 1]) == list(range(120))  # each chunk once
            for lane in range(threads):
                mine = np.flatnonzero(taken[:, 0] == lane)
                mine = mine[np.argsort(taken[mine, 1])]
                home = (mine % 20 >= 10) == (lane % 2 == 1) if threads > 1 else np.ones(len(mine), bool)
                assert np.array_equal(home, np.sort(home)[::-1])  # others' only when its own are gone
    finally:
        workers.close()


def test_two_nodes_give_the_same_bits_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.test_kernels_exact import experts, routed

    weights, (x, ids, gates) = experts(6, 300, 260), routed(5, 300, 6, 3, seed=3)
    results = []
    for nodes in ({}, {0: 0, 1: 1}):
        monkeypatch.setattr("offload.workers.physical_cores", lambda: [0, 1])
        monkeypatch.setattr("offload.workers.numa_nodes", lambda nodes=nodes: nodes)
        kernels = CpuKernels(2)
        try:
            assert len(kernels.workers.nodes) == max(1, len(nodes))
            routed_part = ExpertExecutor(MmapStore({0: weights}), kernels).run(0, x, ids, gates)
            results.append((routed_part, kernels.linear(x, weights[0].gate)))
        finally:
            kernels.close()
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nodes_are_read_as_linux_lists_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for node, cpus in (("node0", "0-1,4\n"), ("node2", "2-3\n"), ("node5", "\n")):
        (tmp_path / node).mkdir()
        (tmp_path / node / "cpulist").write_text(cpus)
    monkeypatch.setattr(hardware, "NUMA_NODES", tmp_path)
    assert hardware.numa_nodes() == {0: 0, 1: 0, 4: 0, 2: 2, 3: 2}
    monkeypatch.setattr(hardware, "NUMA_NODES", tmp_path / "none")
    assert hardware.numa_nodes() == {}


@pytest.mark.parametrize(
    ("text", "most"), [("max 100000", 64), ("150000 100000", 2), ("50000 100000", 1), ("?", 64)]
)
def test_a_containers_quota_bounds_the_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, most: int
) -> None:
    (tmp_path / "cpu.max").write_text(text)
    monkeypatch.setattr(hardware, "CPU_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(hardware, "CPU_TOPOLOGY", tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    assert len(hardware.physical_cores()) == most
