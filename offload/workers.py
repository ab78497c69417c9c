"""Worker threads: pinned, asleep when idle, started by one word in memory.

Each worker is a Python thread that enters one compiled loop (no GIL) and stays there. It waits on an epoch
word: `SPINS` pauses, then a futex. `Workers.run(job, args)` writes the job's address, raises the epoch and
takes part itself as lane 0; a job is shared out among the lanes by atomic counters.

A job is a compiled function `status(args, lane, lanes, control)` (offload/kernels/jit.py):

    def scale_job(args, lane, lanes, control):          # y = 2 x, in chunks of 1024
        fields = carray(as_pointer(args, int64), 3)     # whatever the caller put there: addresses, sizes
        x, y = floats(fields[0], fields[2]), floats(fields[1], fields[2])
        while True:
            start = claim(control, 0) * 1024            # counters 0 to 3 start at zero in every run
            if start >= fields[2]:
                return DONE
            for i in range(start, min(start + 1024, fields[2])):
                y[i] = 2 * x[i]

    compiled = compile_job(scale_job)
    workers.run(compiled.address, fields.ctypes.data)

Where memory is on several NUMA nodes, lanes are spread evenly over them, and `claim_near` deals out work in
slices, a node's own to its own lanes first: node n of N has the n-th Nth of every matrix's rows, in every call.
offload/pages.py has the same slices read into that node's memory.

`barrier(control, lanes, number)` makes the lanes wait for each other; `number` is 0 for a run's first, 1 for
its second and so on. When it returns False another lane has failed or died and the job must return at once. Jobs
must not raise: an exception is printed by Numba, and the run reported as a WorkerError.
"""

import contextlib
import itertools
import os
import threading
import weakref
from typing import Any

import numpy as np
from numba import carray, types

from offload.errors import WorkerError
from offload.hardware import numa_nodes, physical_cores
from offload.kernels.intrinsics import (
    as_pointer,
    atomic_add,
    atomic_load,
    atomic_store,
    call_address,
    current_cpu,
    pause,
    system_call,
)
from offload.kernels.jit import DONE, compile_python, jit

SPINS = 20_000  # pauses before a waiting thread sleeps: about half a millisecond
NAP_NS = 20_000_000  # a waiting lane looks this often whether the others still live
DEAD = -2  # status of a run in which a worker thread vanished
MAX_CPUS = 1024
MAX_NODES = 8  # lanes of further nodes count among these

# The control block: int64 words; what different threads write lies on different cache lines.
EPOCH, JOB, ARGS, LANES, NODES = 0, 1, 2, 3, 4
ARRIVED = 8
PHASE = 16
SLEEPERS, NAPPERS = 24, 32
FAILURES = (
    39  # lanes that left this run with another status than DONE: those at a barrier must not wait for them
)
TIMEOUT = 40  # struct timespec
CPU_MASK = 48  # MAX_CPUS bits
COUNTERS = 64  # a line each: N_COUNTERS plain ones, then N_SHARES times one for each node
N_COUNTERS, N_SHARES = 4, 2
LANE = COUNTERS + 8 * (N_COUNTERS + N_SHARES * MAX_NODES)  # per lane from here: LANE + lane * LANE_WORDS
LANE_WORDS = 8
STATUS, THREAD, CPU, NODE = 0, 1, 2, 3

_SCHED_SETAFFINITY, _GETPID, _GETTID, _FUTEX, _TGKILL = 203, 39, 186, 202, 234
_FUTEX_WAIT, _FUTEX_WAKE = 128, 129  # of this process only


@jit
def _lane_word(control: int, lane: int, field: int) -> int:
    return control + 8 * (LANE + lane * LANE_WORDS + field)


@jit
def _wake(word: int) -> None:
    system_call(_FUTEX, word, _FUTEX_WAKE, MAX_CPUS, 0)


@jit
def claim(control: int, counter: int) -> int:
    """The next number, from 0, of one of this run's N_COUNTERS plain counters."""
    return atomic_add(control + 8 * (COUNTERS + 8 * counter), 1)


@jit
def claim_near(control: int, lane: int, share: int, outer: int, inner: int, turn: int) -> tuple[int, int]:
    """The lane's next chunk of `outer` times `inner` ones (say, matrices and chunks of their rows).

    Args:
        share: which of this run's N_SHARES; every lane must use it with the same `outer` and `inner`.
        turn: what the last call gave back; 0 at first.

    Returns:
        (o * inner + i, turn): the chunk o, i; outer * inner or more when there is none left.
    """
    nodes = atomic_load(control + 8 * NODES)
    while turn < nodes:
        node = (atomic_load(_lane_word(control, lane, NODE)) + turn) % nodes
        low, high = inner * node // nodes, inner * (node + 1) // nodes
        number = claim(control, N_COUNTERS + share * MAX_NODES + node)
        if number < outer * (high - low):
            return number // (high - low) * inner + low + number % (high - low), turn
        turn += 1
    return outer * inner, turn


@jit
def _dead_lanes(control: int, lanes: int) -> int:
    """How many workers have vanished."""
    process, dead = system_call(_GETPID, 0, 0, 0, 0), 0
    for lane in range(1, lanes):
        thread = atomic_load(_lane_word(control, lane, THREAD))
        if thread != 0 and system_call(_TGKILL, process, thread, 0, 0) != 0:  # 0: not begun yet
            dead += 1
    return dead


@jit
def _arrive(control: int, word: int) -> None:
    atomic_add(word, 1)
    if atomic_load(control + 8 * NAPPERS) > 0:
        _wake(word)


@jit
def _await(control: int, word: int, count: int, lanes: int, at_barrier: bool) -> bool:
    """Wait until the word is `count`; False if a worker died. At a barrier, also if one failed, and at once; else
    only when all that live have come, since what they work on is the caller's."""
    spins, failures = 0, control + 8 * FAILURES
    while True:
        seen = atomic_load(word)
        if seen >= count:
            return True
        if at_barrier and atomic_load(failures) > 0:
            return False
        if spins < SPINS:
            spins += 1
            pause()
            continue
        atomic_add(control + 8 * NAPPERS, 1)
        system_call(_FUTEX, word, _FUTEX_WAIT, seen, control + 8 * TIMEOUT)
        atomic_add(control + 8 * NAPPERS, -1)
        dead = _dead_lanes(control, lanes)
        if dead > 0:
            atomic_add(failures, 1)
            if at_barrier or atomic_load(word) + dead >= count:
                return False


@jit
def barrier(control: int, lanes: int, number: int) -> bool:
    """Wait for all lanes to come here, `number` barriers into the run; False if one failed or died."""
    if lanes == 1:
        return True
    _arrive(control, control + 8 * PHASE)
    return _await(control, control + 8 * PHASE, (number + 1) * lanes, lanes, True)


@jit
def _note_failure(control: int, status: int) -> None:
    """Let lanes that wait at a barrier know that this one will not come."""
    if status != DONE:
        atomic_add(control + 8 * FAILURES, 1)
        if atomic_load(control + 8 * NAPPERS) > 0:
            _wake(control + 8 * PHASE)


def _work(control: int, lane: int) -> None:
    """A worker's life: wait for the epoch to move, run the job, say so; a job of 0 ends it."""
    epoch, seen = control + 8 * EPOCH, 0
    atomic_store(_lane_word(control, lane, THREAD), system_call(_GETTID, 0, 0, 0, 0))
    while True:
        spins = 0
        while atomic_load(epoch) == seen:
            if spins < SPINS:
                spins += 1
                pause()
            else:
                atomic_add(control + 8 * SLEEPERS, 1)
                system_call(_FUTEX, epoch, _FUTEX_WAIT, seen, 0)
                atomic_add(control + 8 * SLEEPERS, -1)
        seen += 1
        words = carray(as_pointer(control, types.int64), LANE)
        if words[JOB] == 0:
            return
        status = call_address(words[JOB], (words[ARGS], lane, words[LANES], control))
        _note_failure(control, status)
        atomic_store(_lane_word(control, lane, STATUS), status)
        _arrive(control, control + 8 * ARRIVED)


@jit
def _make_room(control: int, lanes: int) -> None:
    """If the caller runs on a worker's CPU, give that worker the caller's former one."""
    cpu = current_cpu()
    mine = _lane_word(control, 0, CPU)
    if cpu < 0 or cpu == atomic_load(mine):
        return
    for lane in range(1, lanes):
        its = _lane_word(control, lane, CPU)
        thread = atomic_load(_lane_word(control, lane, THREAD))
        if atomic_load(its) == cpu and thread > 0:  # 0: not begun yet, and to the system the caller itself
            free = atomic_load(mine)
            atomic_store(its, free)
            atomic_store(mine, cpu)
            mask = carray(as_pointer(control + 8 * CPU_MASK, types.uint8), MAX_CPUS // 8)
            mask[:] = 0
            mask[free // 8] = 1 << (free % 8)
            system_call(_SCHED_SETAFFINITY, thread, MAX_CPUS // 8, control + 8 * CPU_MASK, 0)
            return


@jit
def _start(control: int, lanes: int, job: Any, args: int) -> None:
    """Publish a job and wake the workers."""
    words = carray(as_pointer(control, types.int64), LANE)
    words[JOB], words[ARGS], words[LANES] = job, args, lanes
    words[ARRIVED] = words[PHASE] = words[FAILURES] = 0
    for counter in range(N_COUNTERS):
        words[COUNTERS + 8 * counter] = 0
    for share in range(N_SHARES):
        for node in range(words[NODES]):
            words[COUNTERS + 8 * (N_COUNTERS + share * MAX_NODES + node)] = 0
    atomic_add(control + 8 * EPOCH, 1)
    if atomic_load(control + 8 * SLEEPERS) > 0:
        _wake(control + 8 * EPOCH)


def _dispatch(control: int, lanes: int, job: int, args: int) -> int:
    """Run a job over all lanes, the caller being lane 0: DONE, DEAD, or the first other status."""
    if lanes > 1:
        _make_room(control, lanes)
    _start(control, lanes, job, args)
    first: int = call_address(job, (args, 0, lanes, control))
    _note_failure(control, first)
    if lanes > 1 and not _await(control, control + 8 * ARRIVED, lanes - 1, lanes, False):
        return DEAD
    for lane in range(1, lanes):
        status = atomic_load(_lane_word(control, lane, STATUS))
        if first == DONE:
            first = status
    return first


def _stop(control: int, lanes: int) -> None:
    _start(control, lanes, 0, 0)


class Workers:
    """A caller and `threads - 1` pinned worker threads that run jobs together.

    Args:
        threads: lanes, the caller's included; None: as many as physical cores this process may use.

    Raises:
        WorkerError: the threads cannot be started.
    """

    def __init__(self, threads: int | None = None) -> None:
        cores = physical_cores()
        self.threads = len(cores) if threads is None else threads
        if self.threads < 1:
            raise WorkerError(f"{self.threads} threads were asked for; at least 1 is needed.")
        i64 = types.int64
        work = compile_python(_work, types.void(i64, i64))
        self._dispatch = compile_python(_dispatch, i64(i64, i64, i64, i64))
        stop = compile_python(_stop, types.void(i64, i64))
        self._lock = threading.Lock()
        self._problem = ""
        words = LANE + self.threads * LANE_WORDS
        self._block = np.zeros(words + 8, np.int64)  # private memory: a forked child has its own
        self.control = (self._block.ctypes.data + 63) // 64 * 64
        block = self._block[(self.control - self._block.ctypes.data) // 8 :]
        block[TIMEOUT : TIMEOUT + 2] = 0, NAP_NS
        lane_cpus, lane_nodes = _spread(cores, numa_nodes(), self.threads)
        self.nodes = sorted(set(lane_nodes))  # as Linux numbers them
        block[NODES] = min(len(self.nodes), MAX_NODES)
        for lane, (cpu, node) in enumerate(zip(lane_cpus, lane_nodes, strict=True)):
            place = LANE + lane * LANE_WORDS
            block[place + CPU], block[place + NODE] = cpu, self.nodes.index(node) % MAX_NODES
        workers: list[threading.Thread] = []
        self._finalizer = weakref.finalize(self, _shut_down, stop, self._block, self.control, workers)
        try:
            for lane in range(1, self.threads):
                thread = threading.Thread(
                    target=_live, args=(work, self._block, self.control, lane, lane_cpus[lane]), daemon=True,
                    name=f"hybrid-worker-{lane}",
                )  # fmt: skip
                thread.start()
                workers.append(thread)
        except RuntimeError as error:
            self.close()
            raise WorkerError(
                f"Worker thread {lane} of {self.threads - 1} could not be started: {error}."
            ) from error
        _pools.add(self)

    def run(self, job: int, args: int) -> None:
        """Run the job at address `job` on all lanes; returns when all have finished.

        Args:
            job: `compile_job(...).address`.
            args: handed to the job: the address of its arguments, which must stay valid meanwhile.

        Raises:
            WorkerError: a lane failed or died, or the workers are closed or were left behind by a fork.
        """
        with self._lock:
            if self._problem:
                raise WorkerError(self._problem)
            status = self._dispatch(self.control, self.threads, job, args)
            if status == DEAD:
                self._problem = (
                    "A worker thread died; the kernels cannot be used any more. Restart the program."
                )
                raise WorkerError(self._problem)
        if status != DONE:
            raise WorkerError(f"A kernel job failed with status {status}; what it computed is not valid.")

    def close(self) -> None:
        """Stop and join the threads; `run` fails from now on. Again is harmless."""
        with self._lock:
            self._problem = self._problem or "The worker threads are closed."
        self._finalizer()


def _spread(cores: list[int], node_of: dict[int, int], threads: int) -> tuple[list[int], list[int]]:
    """A CPU for each lane and its node: nodes in turn, so that any number of lanes draws on every node's memory."""
    by_node: dict[int, list[int]] = {}
    for cpu in cores:
        by_node.setdefault(node_of.get(cpu, 0), []).append(cpu)
    turns = itertools.zip_longest(
        *(zip(cpus, itertools.repeat(node)) for node, cpus in sorted(by_node.items()))
    )
    placed = [place for turn in turns for place in turn if place is not None]
    lanes = [placed[lane % len(placed)] for lane in range(threads)]
    return [cpu for cpu, _ in lanes], [node for _, node in lanes]


def _live(work: Any, block: Any, control: int, lane: int, cpu: int) -> None:
    """A worker thread's target; holds the control block so that it outlives the pool."""
    with contextlib.suppress(OSError):  # the affinity was narrowed since: run wherever allowed
        os.sched_setaffinity(0, {cpu})
    try:
        work(control, lane)
    finally:
        at = (control - block.ctypes.data) // 8 + LANE + lane * LANE_WORDS + THREAD
        block[at] = -1  # no thread has this number: the others see that this one is gone


def _shut_down(stop: Any, block: Any, control: int, workers: list[threading.Thread]) -> None:
    """Ask all workers to leave and wait briefly: one that died never answers."""
    stop(control, len(workers) + 1)
    for thread in workers:
        thread.join(timeout=1.0)
    del block


_pools: "weakref.WeakSet[Workers]" = weakref.WeakSet()


def _forget_workers_in_child() -> None:
    """A forked child has no worker threads: its pools must say so instead of waiting for them."""
    for pool in _pools:
        pool._lock = threading.Lock()
        pool._problem = "Worker threads do not survive a fork: load the model in the process that uses it."
        pool._finalizer.detach()


os.register_at_fork(after_in_child=_forget_workers_in_child)
