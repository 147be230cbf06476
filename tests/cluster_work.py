"""What workers do in the tests of fanning out; importable by processes that others start."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from hybridsd_sim import load_profiles, load_scenario
from hybridsd_sim.errors import IllegalPlanError, Problem
from hybridsd_sim.plan import Deployment, Share
from hybridsd_sim.planning import Store, workers
from hybridsd_sim.planning.evaluation import EvaluationJob, Evaluator
from hybridsd_sim.pricing import find_candidates

SHORT = {"horizon_s": 150.0, "warmup_s": 20.0, "replications": 2, "search.replications_max": 4}
PROBLEMS = (Problem("plan.stages", "()", "a plan needs a stage", "Add one."), Problem("plan.vae", "x", "unknown"))


def jobs_of(scenario, profiles, nodes=(2, 3, 4)):
    """Jobs of a small search: two hand-overs of the quickstart and a mix of them, each on several numbers of nodes."""
    options = find_candidates(scenario, profiles).by_class["picture"]
    handed = [option for option in options if option.pool_index == 0 and option.edge_steps and option.keeps_limits][:2]
    mix = tuple(Share(share, option.plan) for share, option in zip((0.7, 0.3), handed, strict=True))
    mixes = [(Share(1.0, option.plan),) for option in handed] + [mix]
    return [
        EvaluationJob(scenario, profiles, Deployment({"a100": n}, {"picture": plans})) for n in nodes for plans in mixes
    ]


def search(folder):
    """A search in a process of its own: the evaluations of every job, kept in a store, each told when it is done."""
    jobs = jobs_of(load_scenario("quickstart").with_overrides(SHORT), load_profiles())
    for evaluation in map(Evaluator(Store(Path(folder))), jobs):
        sys.stdout.write(f"{evaluation!r}\n")
        sys.stdout.flush()


def doubled(number):
    """A result that says what it was asked for."""
    return 2 * number


def refuse(_):
    """Work that its input makes impossible, for two reasons."""
    raise IllegalPlanError(PROBLEMS)


def same_profiles(item):
    """The identity that the profiles of an item have in this worker."""
    _, profiles = item
    return os.getpid(), id(profiles)


def killed_once(item):
    """Lose the worker process the first time that this is tried, and say so the second time."""
    folder, number = item
    if number == 2 and not (folder / "killed").exists():
        (folder / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def always_killed(number):
    """Lose the worker process at one item, whenever it is tried."""
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 2 * number


def slow_beside_death(number):
    """Take long, beside an item that loses its process at once, whenever it is tried."""
    if number:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(3)
    return number


def say_and_wait(folder):
    """Leave this worker's process id in a folder, and take forever."""
    (folder / str(os.getpid())).touch()
    time.sleep(600)


def wait_until_killed_once(item):
    """Leave this worker's process id in a folder and wait to be killed; evaluate the second time."""
    folder, job = item
    mine = folder / f"{job.deployment.replicas['a100']}.pid"
    if not mine.exists():
        mine.with_suffix(".part").write_text(str(os.getpid()))
        mine.with_suffix(".part").replace(mine)
        time.sleep(600)
    return Evaluator()(job)


def wait_with_workers(folder):
    """Start two workers that take forever, and wait for them."""
    with workers(2) as fan_out:
        list(fan_out(say_and_wait, [Path(folder)] * 2))


if __name__ == "__main__":
    globals()[sys.argv[1]](sys.argv[2])
