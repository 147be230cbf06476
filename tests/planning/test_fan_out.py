"""Fanning out changes nothing: the same results in the same order, whoever computes them and whoever dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

import cluster_work
from hybridsd_sim.errors import IllegalPlanError, InputError, RunError
from hybridsd_sim.planning import Store, workers
from hybridsd_sim.planning.evaluation import Evaluator, evaluate
from waiting import alive, within_a_minute

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
RAY_OR_PROCESSES = ["processes", pytest.param("ray", marks=needs_ray)]


@pytest.fixture(scope="module")
def jobs(quickstart, profiles):
    """A few jobs of the quickstart, shortened."""
    return cluster_work.jobs_of(quickstart.with_overrides(cluster_work.SHORT), profiles)


@pytest.fixture(scope="module")
def answers(jobs):
    """What this process makes of the jobs."""
    return [repr(evaluate(job)) for job in jobs]


@pytest.fixture(scope="module")
def ray_map():
    """A local Ray of two workers, started once; they find the work of these tests by their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[1]), prepend=os.pathsep)
        with workers(2, "local") as fan_out:
            yield fan_out


@pytest.fixture(scope="module")
def process_map():
    """Two processes, started once."""
    with workers(2) as fan_out:
        yield fan_out


@pytest.fixture
def fan_out(request):
    """The map that the parameter names."""
    return request.getfixturevalue("ray_map" if request.param == "ray" else "process_map")


def pids(folder, count):
    """Process ids that workers left in a folder, once there are so many."""
    return within_a_minute(lambda: found if len(found := [int(p.name) for p in folder.iterdir()]) >= count else None)


def test_one_job_needs_no_workers():
    """With one process there is no map to pass on: the built-in one does it."""
    with workers(1) as fan_out:
        assert fan_out is None


@pytest.mark.parametrize("fan_out", RAY_OR_PROCESSES, indirect=True)
def test_the_same_bytes_whoever_evaluates(fan_out, jobs, answers):
    """Processes and Ray give what the built-in map gives, to the last bit and in the same order."""
    assert [repr(evaluation) for evaluation in fan_out(Evaluator(), jobs)] == answers


@pytest.mark.parametrize("fan_out", RAY_OR_PROCESSES, indirect=True)
def test_results_are_handed_out_in_order_as_they_come(fan_out):
    """The first result is there to be kept while others are still asked for; whoever stops asking gets no more."""
    results = fan_out(cluster_work.doubled, range(20))
    assert next(iter(results)) == 0
    assert list(results) == [2 * number for number in range(1, 20)]

    stopped = iter(fan_out(cluster_work.doubled, range(20)))
    assert next(stopped) == 0
    stopped.close()
    assert list(fan_out(cluster_work.doubled, [])) == []


@pytest.mark.parametrize("fan_out", RAY_OR_PROCESSES, indirect=True)
def test_an_error_comes_back_as_it_was_raised(fan_out):
    """Type and problems survive the way from a worker, so that the message is that of a run in one process."""
    with pytest.raises(IllegalPlanError) as refused:
        list(fan_out(cluster_work.refuse, [1]))
    assert refused.value.problems == cluster_work.PROBLEMS


@pytest.mark.parametrize("fan_out", RAY_OR_PROCESSES, indirect=True)
def test_profiles_travel_once_to_each_worker(fan_out, profiles):
    """Within one worker all items, of several calls too, hold the very same profiles."""
    seen = [pair for _ in range(2) for pair in fan_out(cluster_work.same_profiles, [(n, profiles) for n in range(8)])]
    assert len(set(seen)) == len({pid for pid, _ in seen}) <= 2


def test_what_a_dead_process_took_along_is_computed_again(process_map, tmp_path):
    """A worker that is killed in the middle loses no result, and the map goes on with new ones."""
    items = [(tmp_path, number) for number in range(6)]
    assert list(process_map(cluster_work.killed_once, items)) == [0, 2, 4, 6, 8, 10]
    assert (tmp_path / "killed").exists()


def test_work_that_always_loses_its_process_is_given_up(process_map):
    """What was done before it is handed out; then the run fails with the reason, and the map is good for other work."""
    results = process_map(cluster_work.always_killed, range(6))
    assert [next(results), next(results)] == [0, 2]
    with pytest.raises(RunError, match="lost its worker process"):
        next(results)
    assert list(process_map(cluster_work.doubled, [1, 2])) == [2, 4]


def test_the_deaths_of_others_are_not_counted_against_work(process_map):
    """An item that every death beside it takes along is finished all the same; only the deadly one is given up."""
    results = process_map(cluster_work.slow_beside_death, range(2))
    assert next(results) == 0
    with pytest.raises(RunError, match="lost its worker process"):
        next(results)


@needs_ray
def test_a_ray_worker_that_is_killed_loses_no_result(ray_map, jobs, answers, tmp_path):
    """Every worker is killed with SIGKILL in the middle of its work; the answers are those of a quiet run."""
    mine = [(tmp_path, job) for job in jobs[::3]]
    results = ray_map(cluster_work.wait_until_killed_once, mine)
    killer = threading.Thread(target=_kill_whoever_says_its_name, args=(tmp_path, len(mine)))
    killer.start()
    found = [repr(evaluation) for evaluation in results]
    killer.join()
    assert found == answers[::3]


def _kill_whoever_says_its_name(folder, count):
    for index in range(count):
        left = within_a_minute(lambda i=index: p if len(p := sorted(folder.glob("*.pid"), key=_age)) > i else None)
        os.kill(int(left[index].read_text()), signal.SIGKILL)


def _age(path):
    return path.stat().st_mtime_ns


@needs_ray
def test_ray_gives_up_work_that_always_loses_its_worker(ray_map):
    """As with processes, the run fails with the reason."""
    with pytest.raises(RunError, match="lost its worker process"):
        list(ray_map(cluster_work.always_killed, range(2, 3)))


def test_without_ray_the_message_says_what_to_install(monkeypatch):
    """The extra is named, and nothing was started."""
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"pip install 'hybridsd-sim\[ray\]'"), workers(2, "local"):
        pytest.fail("there is nothing to fan out over")


def test_leaving_ends_the_workers_whatever_they_do(tmp_path):
    """Ctrl-C in the caller leaves no process behind, although both are in the middle of something."""
    started = []

    def interrupted():
        with workers(2) as fan_out:
            fan_out(cluster_work.say_and_wait, [tmp_path] * 2)
            started.extend(pids(tmp_path, 2))
            assert all(alive(pid) for pid in started)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(alive(pid) for pid in started)


def test_workers_end_with_a_parent_that_is_killed(tmp_path):
    """A search that is killed with SIGKILL leaves no process behind either."""
    parent = subprocess.Popen([sys.executable, cluster_work.__file__, "wait_with_workers", str(tmp_path)])
    started = pids(tmp_path, 2)
    parent.kill()
    parent.wait()
    within_a_minute(lambda: not any(alive(pid) for pid in started))


def test_a_search_that_is_killed_continues_where_it_was(tmp_path, jobs, answers, monkeypatch):
    """After SIGKILL the same search gives the same answers, and simulates only what had not been finished."""
    command = [sys.executable, cluster_work.__file__, "search", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as first:
        done = [first.stdout.readline() for _ in range(3)]
        first.kill()
    assert [line.rstrip("\n") for line in done] == answers[:3]

    from hybridsd_sim.planning import evaluation as evaluations

    simulated, run = [], evaluations.simulate
    monkeypatch.setattr(
        evaluations, "simulate", lambda *args, **more: simulated.append(more["plan"]) or run(*args, **more)
    )
    assert [repr(evaluation) for evaluation in map(Evaluator(Store(tmp_path)), jobs)] == answers
    assert not any(job.deployment in simulated for job in jobs[:3])
    assert len(simulated) > 0
