"""Worker threads: what a run does, and what happens when something goes wrong. The awkward cases run in a child."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numba
import numpy as np
import pytest

from offload.errors import WorkerError
from offload.kernels.intrinsics import as_pointer, system_call
from offload.kernels.jit import DONE, compile_job
from offload.workers import Workers, barrier, claim

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


def test_ctrl_c_leaves_the_workers_usable() -> None:
    child = run_child(
        """
        import os, signal, threading
        from tests.unit.test_workers import refuse
        from offload.kernels.jit import compile_job
        from offload.workers import Workers
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
