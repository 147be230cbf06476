"""Queues by recursion: when each job starts, from when it is ready and how long it holds, compiled.

No event loop: where nothing but the order of arrival decides, the start of a job follows from the starts before it
(Kiefer and Wolfowitz, Trans. Am. Math. Soc. 78 (1955), for one server a job). Only the disciplines that let a job past
a waiting one replay the moments at which a GPU is freed. Everywhere: seconds; jobs in the order in which they are
ready; ends of jobs that fall together count in the order of their starts, as in `fleet`, whose rules of placement are
followed GPU by GPU.

The first call compiles, some three seconds once on a machine: what was compiled is kept beside this file, or in the
user's cache folder where that cannot be written, or in NUMBA_CACHE_DIR. Compiled functions go through arrays number by
number and leave the rest to their callers: every function of numpy that they call would be compiled with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar, cast

import numba
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

Ints = npt.NDArray[np.int64]

Nodes = tuple[Ints, Ints, Ints, Ints, Ints]
"""Free GPUs of each node; then buckets of nodes with the same number of free GPUs, each a list in order of entry: the
node after and before each node, the first and the last of each bucket; -1 ends a list."""

Heap = tuple[Floats, Ints, Ints]
"""A heap of times, the first first: time, key that decides between equal times, and what is at that time. Of running
jobs it has the end, the number in the order of starts, and node and GPUs in one number."""

NOTHING = 0
"""Multiplied by a variable it is a variable; for a bare constant the compiler would make a version of its own."""

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def compiled(function: FunctionT) -> FunctionT:
    """Compile a function, and keep the result on disk where there is a place for it."""
    try:
        done: Any = numba.njit(cache=True, nogil=True)(function)
    except RuntimeError:  # a read-only installation, and no folder of the user's own
        done = numba.njit(nogil=True)(function)
    return cast("FunctionT", done)


class JobArrays(NamedTuple):
    """The jobs of one queue, an array for each of their figures, and the arrays that their starts are written into.

    `turn` are positions in the other arrays, in order of readiness. `part` says which entry of `hold_s` (seconds) and
    `degree` (GPUs) is a job's own. `start_s` and `server` take its start and its node or device; those that never start
    keep what stands there.
    """

    turn: Ints
    ready_s: Floats
    part: Ints
    hold_s: Floats
    degree: Ints
    start_s: Floats
    server: Ints


class Owners(NamedTuple):
    """Whose request is which: those of owner `o` are `asks[first[o]:first[o + 1]]`, in order of arrival.

    `owner` is each request's own, `before` the request that the same user made before; -1 for none.
    """

    asks: Ints
    first: Ints
    owner: Ints
    before: Ints


def pool_queue(jobs: JobArrays, *, nodes: int, gpus_per_node: int, discipline: str, cold_start_s: float) -> None:
    """Start the jobs of a pool whose nodes serve from `cold_start_s` on; `discipline` is any but edf."""
    if nodes == 0 or not len(jobs.turn):
        return
    if gpus_per_node == 1:  # whoever waits needs the same: nobody can pass anybody
        one_gpu_queue(jobs, _idle(nodes, cold_start_s), 0)
        return
    # Buckets of nodes that are all free.
    after, before = np.arange(1, nodes + 1), np.arange(-1, nodes - 1)
    after[-1] = -1
    first, last = np.full(gpus_per_node + 1, -1), np.full(gpus_per_node + 1, -1)
    first[gpus_per_node], last[gpus_per_node] = 0, nodes - 1
    state: Nodes = (np.full(nodes, gpus_per_node), after, before, first, last)
    running = _idle(nodes * gpus_per_node)
    if discipline == "fifo" or len(np.unique(jobs.degree[jobs.part[jobs.turn]])) == 1:
        node_queue(jobs, state, running, cold_start_s)
    else:
        free_s = np.full((nodes, gpus_per_node), cold_start_s)
        reserving_queue(jobs, state, running, free_s, cold_start_s, int(discipline == "backfill"))


def shared_devices(requests: JobArrays, replicas: int) -> None:
    """Start requests on the devices of an edge fleet that anybody may use."""
    one_gpu_queue(requests, _idle(min(replicas, len(requests.turn))), 1)


def _idle(servers: int, open_s: float = 0.0) -> Heap:
    """A heap with room for as many as `servers`, or of servers that nobody has used and that are free from `open_s`."""
    return np.full(servers, open_s), np.arange(servers) - servers, np.arange(servers)


@compiled
def take_turns(class_index: Ints, first: Ints, shares: Floats) -> Ints:
    """The part of its class's mix that each request takes: the one furthest behind its share, as `policies.Planned`.

    The parts of class `c` are those from `first[c]` to `first[c + 1]`, never none.
    """
    behind = np.zeros(len(shares))
    part = np.empty(len(class_index), np.int64)
    for request in range(len(class_index)):
        begin, end = first[class_index[request]], first[class_index[request] + 1]
        taken = begin
        if end - begin > 1:
            for other in range(begin, end):
                behind[other] += shares[other]
                if behind[other] > behind[taken]:
                    taken = other
            behind[taken] -= 1.0
        part[request] = taken
    return part


@compiled
def _sink(free_s: Floats, key: Ints, which: Ints, size: int) -> None:
    """Let the first entry of a heap of (time, key) sink to its place."""
    time, name, what = free_s[0], key[0], which[0]
    hole, child = 0, 1
    while child < size:
        right = child + 1
        if right < size and (
            free_s[right] < free_s[child] or (free_s[right] == free_s[child] and key[right] < key[child])
        ):
            child = right
        if time < free_s[child] or (time == free_s[child] and name < key[child]):
            break
        free_s[hole], key[hole], which[hole] = free_s[child], key[child], which[child]
        hole, child = child, 2 * child + 1
    free_s[hole], key[hole], which[hole] = time, name, what


@compiled
def _rise(free_s: Floats, key: Ints, which: Ints, hole: int) -> None:
    """Let the last entry of a heap of (time, key) rise to its place; keys are younger than all that stand there."""
    time, name, what = free_s[hole], key[hole], which[hole]
    while hole > 0 and time < free_s[(hole - 1) // 2]:
        above = (hole - 1) // 2
        free_s[hole], key[hole], which[hole] = free_s[above], key[above], which[above]
        hole = above
    free_s[hole], key[hole], which[hole] = time, name, what


@compiled
def one_gpu_queue(jobs: JobArrays, servers: Heap, by_device: int) -> None:
    """Each job takes the server that has been free longest.

    Servers freed together are taken in the order of their last starts, or by number.
    """
    ready_s, part, hold_s, start_s, server = jobs.ready_s, jobs.part, jobs.hold_s, jobs.start_s, jobs.server
    free_s, key, which = servers
    for place in range(len(jobs.turn)):
        job = jobs.turn[place]
        start_s[job] = max(ready_s[job], free_s[0])
        server[job] = which[0]
        free_s[0] = start_s[job] + hold_s[part[job]]
        key[0] = which[0] if by_device else place
        _sink(free_s, key, which, len(free_s))


@compiled
def _move(state: Nodes, node: int, change: int) -> None:
    """Change a node's free GPUs: it leaves its bucket and enters another one last."""
    free, after, before, first, last = state
    old = free[node]
    if before[node] < 0:
        first[old] = after[node]
    else:
        after[before[node]] = after[node]
    if after[node] < 0:
        last[old] = before[node]
    else:
        before[after[node]] = before[node]
    new = free[node] = old + change
    before[node], after[node] = last[new], -1
    if last[new] < 0:
        first[new] = node
    else:
        after[last[new]] = node
    last[new] = node


@compiled
def _fit(state: Nodes, degree: int) -> int:
    """The fullest node with room for so many GPUs, the one that has been so the longest; -1 if there is none."""
    first = state[3]
    for bucket in range(degree, len(first)):
        if first[bucket] >= 0:
            return int(first[bucket])
    return -1


@compiled
def _begin(state: Nodes, heap: Heap, size: int, number: int, node: int, gpus: int, stop: float) -> int:
    """Give the job that starts as the `number`-th its GPUs until `stop`; how many jobs run now."""
    stop_s, key, where = heap
    _move(state, node, -gpus)
    stop_s[size], key[size], where[size] = stop, number, node * len(state[3]) + gpus
    _rise(stop_s, key, where, size)
    return size + 1


@compiled
def _release(state: Nodes, heap: Heap, size: int) -> int:
    """Free the GPUs of the job that ends first; how many jobs run now."""
    stop_s, key, where = heap
    node, gpus = divmod(where[0], len(state[3]))
    _move(state, node, gpus)
    size -= 1
    stop_s[0], key[0], where[0] = stop_s[size], key[size], where[size]
    _sink(stop_s, key, where, size)
    return size


@compiled
def node_queue(jobs: JobArrays, state: Nodes, heap: Heap, open_s: float) -> None:
    """Worker groups in strict order: the head waits for its GPUs and everybody behind it waits too."""
    size, now = NOTHING * len(jobs.turn), open_s
    for place in range(len(jobs.turn)):
        job = jobs.turn[place]
        if jobs.ready_s[job] > now:
            now = jobs.ready_s[job]
            while size > 0 and heap[0][0] <= now:
                size = _release(state, heap, size)
        gpus = jobs.degree[jobs.part[job]]
        node = _fit(state, gpus)
        while node < 0 and size > 0:
            now = heap[0][0]
            size = _release(state, heap, size)
            node = _fit(state, gpus)
        if node < 0:  # larger than a node: it never starts, and nobody behind it does
            break
        jobs.start_s[job], jobs.server[job] = now, node
        size = _begin(state, heap, size, place, node, gpus, now + jobs.hold_s[jobs.part[job]])


@compiled
def reserving_queue(jobs: JobArrays, state: Nodes, heap: Heap, free_s: Floats, open_s: float, backfill: int) -> None:
    """Worker groups where a head that does not fit reserves the node it can have soonest.

    Those behind it use the other nodes, and with `backfill` also a reserved one that they leave in time. `free_s` is
    when each GPU of a node is free, the first first.
    """
    count, nodes = len(jobs.turn), len(free_s)
    queue, held, reserved_s = np.empty(count, np.int64), np.empty(nodes, np.int64), np.empty(nodes)
    size = head = tail = started = none = NOTHING * count
    while tail < count or (size > 0 and head < tail):
        if tail == count or (size > 0 and heap[0][0] <= jobs.ready_s[jobs.turn[tail]]):
            now = heap[0][0]
            size = _release(state, heap, size)
        else:
            now = max(jobs.ready_s[jobs.turn[tail]], open_s)
            queue[tail] = tail
            tail += 1
            if now == open_s and tail < count and jobs.ready_s[jobs.turn[tail]] < open_s:
                continue  # the pool opens with everybody who is there by then
        for node in range(nodes):
            reserved_s[node] = -1.0
        number, place, kept = none, head, head
        while place < tail and number < nodes:
            job = jobs.turn[queue[place]]
            gpus, stop_s = jobs.degree[jobs.part[job]], now + jobs.hold_s[jobs.part[job]]
            node = _fit_around(state, gpus, stop_s, reserved_s, held, number * backfill)
            if node >= 0:
                jobs.start_s[job], jobs.server[job] = now, node
                size = _begin(state, heap, size, started, node, gpus, stop_s)
                started += 1
                _occupy(free_s, node, gpus, stop_s)
            else:
                queue[kept] = queue[place]
                kept += 1
                held[number] = _reserve(free_s, gpus, now, reserved_s)
                number += 1
            place += 1
        for _ in range(kept - head):  # those who still wait stand where the search broke off
            kept, place = kept - 1, place - 1
            queue[place] = queue[kept]
        head = place


@compiled
def _fit_around(state: Nodes, degree: int, stop_s: float, reserved_s: Floats, held: Ints, count: int) -> int:
    """The fullest node with room that nobody has reserved; -1 if there is none.

    Without one, the first of `count` reserved nodes (`held`) that the job would have left before its reservation.
    """
    free, after, first = state[0], state[1], state[3]
    for bucket in range(degree, len(first)):
        node = first[bucket]
        while node >= 0:
            if reserved_s[node] < 0.0:
                return int(node)
            node = after[node]
    for place in range(count):
        node = held[place]
        if free[node] >= degree and stop_s <= reserved_s[node]:
            return int(node)
    return -1


@compiled
def _reserve(free_s: Floats, degree: int, now: float, reserved_s: Floats) -> int:
    """Reserve the node that will have room for so many GPUs soonest, the first of equals."""
    chosen, soonest = -1, np.inf
    for node in range(len(free_s)):
        when = max(now, free_s[node, degree - 1])
        if reserved_s[node] < 0.0 and (chosen < 0 or when < soonest):
            chosen, soonest = node, when
    reserved_s[chosen] = soonest
    return chosen


@compiled
def _occupy(free_s: Floats, node: int, degree: int, stop_s: float) -> None:
    """Take the first free GPUs of a node until `stop_s`; they stay in the order in which they are free."""
    place, gpus = 0, free_s.shape[1]
    while place + degree < gpus and free_s[node, place + degree] < stop_s:
        free_s[node, place] = free_s[node, place + degree]
        place += 1
    for gpu in range(place, place + degree):
        free_s[node, gpu] = stop_s


@compiled
def owned_devices(ready_s: Floats, part: Ints, edge_s: Floats, owners: Owners) -> Floats:
    """When each request starts on its user's own device; infinity for one that is never ready.

    Few users ask again while their device is busy, so that a look at each one's request before is enough for most; the
    requests of the others are put in the order in which they are ready, ties in order of arrival.
    """
    start_s, settled = ready_s.copy(), np.zeros(len(owners.first), np.bool_)
    queue_s, queue = np.empty(len(ready_s)), np.empty(len(ready_s), np.int64)
    for request in range(len(ready_s)):
        earlier, owner = owners.before[request], owners.owner[request]
        if earlier < 0 or ready_s[request] == np.inf or settled[owner]:
            continue
        if ready_s[earlier] + edge_s[part[earlier]] <= ready_s[request]:
            continue
        settled[owner] = True
        begin, free_s = owners.first[owner], 0.0
        count = owners.first[owner + 1] - begin
        for size in range(count):
            queue[size] = owners.asks[begin + size]
            queue_s[size] = ready_s[queue[size]]
            _rise(queue_s, queue, queue, size)
        for size in range(count - 1, -1, -1):
            mine = queue[0]
            start_s[mine] = max(ready_s[mine], free_s)
            free_s = start_s[mine] + edge_s[part[mine]]
            queue_s[0], queue[0] = queue_s[size], queue[size]
            _sink(queue_s, queue, queue, size)
    return start_s
