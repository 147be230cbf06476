"""Fans work out over local processes or a Ray cluster; the only module of the package that knows Ray.

`workers` gives a `map` that keeps the order, whatever stands behind it: the results are those of the built-in one. What
many items share (profiles of half a megabyte) travels once per worker. A process that is lost takes no result with it:
what it had not handed in is computed again, by new processes or by Ray's other workers; work that loses its process
time after time is given up with a `RunError`. That is what joblib and loky do not do: a killed worker ends their map.
"""

from __future__ import annotations

import io
import logging
import operator
import os
import pickle
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from hashlib import sha256
from itertools import islice
from multiprocessing import get_context, parent_process
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Self

from hybridsd_sim.errors import InputError, Problem, RunError
from hybridsd_sim.planning.evaluation_cache import program_digest
from hybridsd_sim.profiles import Profiles

if TYPE_CHECKING:
    from hybridsd_sim.planning.optimizer import Mapper


LOCAL = "local"

RESTARTS = 3
"""Times that the work behind one result may lose its worker before it is given up."""

AHEAD = 4
"""Tasks that each CPU of a Ray cluster is given ahead of the result that is waited for."""

LOST = f"a simulation lost its worker process {RESTARTS + 1} times; run fewer side by side, or see what ends them"

LOST_ALONE = (
    f"a simulation lost its worker process {RESTARTS + 1} times, at last with nothing beside it; see what ends it"
)

PATIENCE_S = 10.0
"""Seconds that a Ray cluster may take to accept a connection."""

PROFILES_MOST = 8
"""Profiles that a worker keeps for the work to come."""

Call = tuple[Callable[[Any], Any], Any]

_received: dict[str, Profiles] = {}
"""In a worker: the profiles that came last, by the hash of their content."""


@contextmanager
def workers(jobs: int, ray: str | None = None) -> Iterator[Mapper | None]:
    """An order-keeping `map` over `jobs` local processes or a Ray cluster; None for one process.

    `ray` is `local` for a cluster of `jobs` workers on this machine, started and stopped here, or the address of a
    running one. The map starts on its items when it is called and hands results out in their order as they come;
    whoever stops asking leaves undone what has not begun. Leaving the context ends every worker, in the middle of its
    work if need be. Ray prints what befalls its workers on standard output, in its own time. Raises `InputError` where
    Ray is not installed or its address does not answer.
    """
    if ray is not None:
        with _ray_workers(jobs, ray) as fan_out:
            yield fan_out
    elif jobs == 1:
        yield None
    else:
        with TemporaryDirectory(prefix="hybridsd-") as folder, _Processes(jobs, Path(folder)) as fan_out:
            yield fan_out


class _CallPickler(pickle.Pickler):
    """Pickles calls without the profiles inside them; each of those is passed on once, as the bytes of its own."""

    def __init__(self, file: io.BytesIO, names: dict[int, str], share: Callable[[str, bytes], None]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._names, self._share = names, share

    def persistent_id(self, obj: Any) -> str | None:
        if not isinstance(obj, Profiles):
            return None
        if id(obj) not in self._names:
            content = pickle.dumps(obj, pickle.HIGHEST_PROTOCOL)
            self._names[id(obj)] = name = sha256(content).hexdigest()
            self._share(name, content)
        return self._names[id(obj)]


class _CallUnpickler(pickle.Unpickler):
    """Puts profiles back in place: the very same object for every call, so that what is remembered of it holds."""

    def __init__(self, packed: bytes, fetch: Callable[[str], bytes]) -> None:
        super().__init__(io.BytesIO(packed))
        self._fetch = fetch

    def persistent_load(self, name: str) -> Profiles:
        if name not in _received:
            if len(_received) >= PROFILES_MOST:
                del _received[next(iter(_received))]
            _received[name] = pickle.loads(self._fetch(name))  # noqa: S301 -- this very program packed it
        return _received[name]


def _pickle_calls(calls: Sequence[Call], share: Callable[[str, bytes], None]) -> list[bytes]:
    """Each call as bytes; `share` gets every profiles in them once."""
    names: dict[int, str] = {}
    found = []
    for call in calls:
        _CallPickler(file := io.BytesIO(), names, share).dump(call)
        found.append(file.getvalue())
    return found


def _call(packed: bytes, fetch: Callable[[str], bytes]) -> Any:
    """In a worker: make the call."""
    function, item = _CallUnpickler(packed, fetch).load()
    return function(item)


class _Processes:
    """A map over spawned processes that starts new ones where they died."""

    def __init__(self, jobs: int, folder: Path) -> None:
        self._jobs, self._folder = jobs, folder
        self._pool = self._new_pool()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the workers now, whatever they are doing."""
        started = list((self._pool._processes or {}).values())  # noqa: SLF001 -- no public way before Python 3.14
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.terminate()
        for process in started:
            process.join()

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        calls = _pickle_calls([(function, item) for item in items], self._share)
        return self._results(calls, [self._submit(call) for call in calls])

    def _new_pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self._jobs, mp_context=get_context("spawn"), initializer=_live_with_parent)

    def _share(self, name: str, content: bytes) -> None:
        if not (self._folder / name).exists():
            (self._folder / name).write_bytes(content)

    def _submit(self, call: bytes) -> Future[Any]:
        try:
            return self._pool.submit(_call_from_folder, call, self._folder)
        except BrokenProcessPool as error:
            lost: Future[Any] = Future()
            lost.set_exception(error)
            return lost

    def _results(self, calls: Sequence[bytes], futures: list[Future[Any]]) -> Iterator[Any]:
        """Results in order; those that a dead process took along are computed again."""
        index = losses = 0
        pool = self._pool
        try:
            while index < len(calls):
                try:
                    result = futures[index].result()
                except BrokenProcessPool:
                    losses += 1
                    if losses > RESTARTS:
                        raise RunError(LOST_ALONE) from None
                    if self._pool is pool:  # else another map of the same workers has seen to it
                        pool.shutdown(wait=False, cancel_futures=True)
                        self._pool = self._new_pool()
                    pool = self._pool
                    # Alone, so that nobody else's death is counted against it.
                    futures[index] = self._submit(calls[index])
                else:
                    if losses:
                        for at, future in enumerate(futures):
                            if future.cancelled() or (
                                future.done() and isinstance(future.exception(), BrokenProcessPool)
                            ):
                                futures[at] = self._submit(calls[at])
                    yield result
                    index, losses = index + 1, 0
        finally:
            for future in futures:
                future.cancel()


def _call_from_folder(packed: bytes, folder: Path) -> Any:
    return _call(packed, lambda name: (folder / name).read_bytes())


def _live_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def end_with_parent() -> None:
        if parent := parent_process():
            parent.join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _ray_workers(jobs: int, address: str) -> Iterator[_RayMap]:
    """A map over Ray. A connection that stood before is used as it is, and left standing."""
    # Before the import: no report of usage to anybody, and Ray's coming habit with accelerators, of which it warns.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ImportError:
        rule, remedy = "needs Ray, which is not installed", "pip install 'hybridsd-sim[ray]'"
        raise InputError(Problem("--ray", "given", rule, remedy)) from None
    mine = not ray.is_initialized()
    try:
        if mine:
            _connect(ray, jobs, address)
        fan_out = _RayMap(ray)
        if address != LOCAL and list(fan_out(operator.call, [program_digest])) != [program_digest()]:
            rule = "runs another hybridsd_sim than this machine"
            raise InputError(Problem("--ray", address, rule, "Install the same one on every node."))
        yield fan_out
    finally:
        if mine:
            ray.shutdown()


def _connect(ray: Any, jobs: int, address: str) -> None:
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if address == LOCAL:
            ray.init(address=LOCAL, num_cpus=jobs, include_dashboard=False, **quiet)
        else:
            host, _, port = address.removeprefix("ray://").rpartition(":")
            if host and port.isdigit():  # where nobody answers, Ray itself goes on trying for minutes
                socket.create_connection((host, int(port)), timeout=PATIENCE_S).close()
            ray.init(address=address, **quiet)
    except (OSError, RuntimeError, ValueError) as error:
        rule = f"no Ray cluster can be used there: {error}"
        raise InputError(Problem("--ray", address, rule, "Give local, or the address of a running cluster.")) from error


class _RayMap:
    """A map over Ray's workers; Ray itself repeats the tasks of those that die.

    Tasks are handed to Ray a few ahead of the result that is waited for, and never called off: a cancellation that
    meets the end of its task stops the whole program (Check failed in task_manager.cc, seen with Ray 2.60).
    """

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self._task = ray.remote(max_retries=RESTARTS, num_cpus=1)(_call_from_refs)
        self._ahead = AHEAD * max(1, int(ray.cluster_resources().get("CPU", 1)))

    def __call__(self, function: Callable[[Any], Any], items: Iterable[Any], /) -> Iterator[Any]:
        shared: dict[str, Any] = {}
        calls = _pickle_calls([(function, item) for item in items], lambda n, c: shared.update({n: self._ray.put(c)}))
        begun = deque(self._task.remote(call, shared) for call in calls[: self._ahead])
        return self._results(begun, calls[self._ahead :], shared)

    def _results(self, begun: deque[Any], waiting: Sequence[bytes], shared: Mapping[str, Any]) -> Iterator[Any]:
        rest, errors = iter(waiting), self._ray.exceptions
        while begun:
            try:
                result = self._ray.get(begun.popleft())
            except errors.RayTaskError as error:
                raise error.cause from None
            except errors.RayError as error:
                raise RunError(f"{LOST}: {error}") from None
            yield result
            begun.extend(self._task.remote(call, shared) for call in islice(rest, 1))


def _call_from_refs(packed: bytes, shared: dict[str, Any]) -> Any:
    import ray

    return _call(packed, lambda name: ray.get(shared[name]))
