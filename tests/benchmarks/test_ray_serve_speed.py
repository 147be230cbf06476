"""Ray Serve's own router against ours, on a real local Ray: `pytest -s tests/benchmarks/test_ray_serve_speed.py`.

Replicas sleep for the seconds that the plan predicts, one picture after the other, so that two cores suffice. Each seed
is served by every router in turn, the order rotating. `HYBRIDSD_FIGURE` names a file for the latencies' distributions
(SVG or PNG by its ending).
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

if find_spec("ray") is None or find_spec("grpc") is None:
    pytest.skip("Ray Serve is not installed", allow_module_level=True)

from ray import serve
from ray.serve.config import RequestRouterConfig

import serve_plans
import serve_work
from hybridsd_sim import Scheduler
from serve_plans import local_serve

SIZES = {(512, 10, 1): 0.50, (512, 30, 1): 0.25, (1024, 20, 1): 0.15, (1024, 50, 2): 0.10}
"""Shares of the pictures by pixels a side, steps and images: from 0.1 to 2.1 s, a factor of 19."""
REPLICAS, UTILISATION, PICTURES, SEEDS = 4, 0.75, 300, (1, 2, 3)
ROUTERS = {"Ray's default": (False, 5), "by predicted cost": (True, 5)}
ROUTERS |= {"Ray's default, one at a time": (False, 1), "by predicted cost, one at a time": (True, 1)}
"""Whether the router is ours, and `max_ongoing_requests`: 5 is what Ray sets unless told otherwise."""
DEFAULT, OURS, *_ = ROUTERS
BLOCK, DRAWS = 25, 2000
"""Consecutive pictures that the bootstrap keeps together, as their latencies depend on one another; and its draws."""
LINES = dict(zip(ROUTERS, (("#b1543c", "-"), ("#2f6f8f", "-"), ("#b1543c", ":"), ("#2f6f8f", ":")), strict=True))


@dataclass(frozen=True)
class Load:
    """Pictures of one seed: seconds between arrivals, sizes, and the seconds that each keeps a GPU busy."""

    gaps_s: np.ndarray
    sizes: list[tuple[int, int, int]]
    service_s: np.ndarray

    def call(self, index: int) -> dict[str, float]:
        px, steps, images = self.sizes[index]
        asked = {"height": px, "width": px, "num_inference_steps": steps, "num_images": images}
        return asked | {"name": index, "service_s": float(self.service_s[index])}


@dataclass(frozen=True)
class Served:
    """Latencies of the pictures in order of arrival, and the seconds from the first arrival to the last image."""

    latency_s: np.ndarray
    makespan_s: float


def load_of(seed: int, service_s: Mapping[tuple[int, int, int], float]) -> Load:
    """Poisson arrivals that keep the replicas busy for `UTILISATION` of the time."""
    rng = np.random.default_rng(seed)
    sizes = [list(SIZES)[index] for index in rng.choice(len(SIZES), size=PICTURES, p=list(SIZES.values()))]
    mean_s = sum(share * service_s[size] for size, share in SIZES.items())
    gaps_s = rng.exponential(mean_s / (REPLICAS * UTILISATION), size=PICTURES)
    return Load(gaps_s, sizes, np.array([service_s[size] for size in sizes]))


async def drive(handle: serve.handle.DeploymentHandle, load: Load) -> Served:
    """Send every picture when it is due, whatever became of those before."""
    start_s = time.monotonic()
    due_s = start_s + np.cumsum(load.gaps_s)

    async def one(index: int) -> float:
        await asyncio.sleep(max(0.0, due_s[index] - time.monotonic()))
        answer = await handle.remote(load.call(index))
        assert answer["name"] == index
        return time.monotonic() - due_s[index]

    latency_s = np.array(await asyncio.gather(*(one(index) for index in range(PICTURES))))
    return Served(latency_s, float((due_s + latency_s).max() - due_s[0]))


@pytest.fixture(scope="module")
def service_s(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int, int], float]:
    """What the plan predicts of every size."""
    scheduler = Scheduler.from_plan(serve_plans.save_plan(tmp_path_factory.mktemp("plan"), serve_plans.studio()))
    return {size: serve_plans.predicted_s(scheduler, *size) for size in SIZES}


@pytest.fixture(scope="module")
def handles(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, serve.handle.DeploymentHandle]]:
    """The same deployment behind each router."""
    plan = serve_plans.save_plan(tmp_path_factory.mktemp("plan"), serve_plans.studio())
    ours = RequestRouterConfig(
        request_router_class="hybridsd_sim.serving.ray_serve.PredictedCostRouter",
        request_router_kwargs={"plan": str(plan)},
    )
    with local_serve():
        found = {}
        for index, (name, (mine, ongoing)) in enumerate(ROUTERS.items()):
            deployment = serve.deployment(serve_work.Gpu).options(
                num_replicas=REPLICAS, max_ongoing_requests=ongoing, ray_actor_options={"num_cpus": 0},
                request_router_config=ours if mine else RequestRouterConfig(),
            )  # fmt: skip
            found[name] = serve.run(deployment.bind(), name=f"app{index}", route_prefix=None)
        yield found


def figures(served: list[Served]) -> dict[str, float]:
    """Mean, median and 95th percentile of all latencies, and the mean makespan."""
    latency_s = np.concatenate([one.latency_s for one in served])
    p50_s, p95_s = np.percentile(latency_s, [50, 95])
    makespan_s = float(np.mean([one.makespan_s for one in served]))
    return {"mean": float(latency_s.mean()), "p50": p50_s, "p95": p95_s, "makespan": makespan_s}


def resampled(served: Mapping[str, list[Served]]) -> Iterator[dict[str, np.ndarray]]:
    """Latencies of blocks of pictures drawn anew, the same for every router."""
    rng = np.random.default_rng(0)
    blocks = {name: np.concatenate([o.latency_s for o in runs]).reshape(-1, BLOCK) for name, runs in served.items()}
    count = len(next(iter(blocks.values())))
    for _ in range(DRAWS):
        drawn = rng.integers(count, size=count)
        yield {name: mine[drawn].ravel() for name, mine in blocks.items()}


def intervals(served: Mapping[str, list[Served]]) -> dict[str, dict[str, np.ndarray]]:
    """90% bootstrap intervals of mean, p50 and p95, and of ours over the router's."""
    draws: dict[str, list[list[float]]] = {name: [] for name in served}
    for latencies in resampled(served):
        for name, latency_s in latencies.items():
            draws[name].append([latency_s.mean(), *np.percentile(latency_s, [50, 95])])
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, mine in draws.items():
        ratios = np.array(draws[OURS]) / np.array(mine)
        bounds, ratio = np.percentile(mine, [5, 95], axis=0).T, np.percentile(ratios, [5, 50, 95], axis=0).T
        found[name] = {
            key: np.concatenate(pair) for key, *pair in zip(("mean", "p50", "p95"), bounds, ratio, strict=True)
        }
    return found


def report(served: Mapping[str, list[Served]], bounds: Mapping[str, Mapping[str, np.ndarray]]) -> str:
    """A line for each router and figure."""
    lines = []
    for name, runs in served.items():
        mine = figures(runs)
        lines.append(f"{name}: makespan {mine['makespan']:.1f} s")
        for key, (low, high, *ratio) in bounds[name].items():
            against = "" if name == OURS else f"; ours takes {ratio[1]:.2f} of it [{ratio[0]:.2f}, {ratio[2]:.2f}]"
            lines.append(f"  {key:<4} {mine[key]:.3f} s [{low:.3f}, {high:.3f}]{against}")
    return "\n".join(lines)


def draw(served: Mapping[str, list[Served]], file: Path) -> None:
    """The share of pictures served within so many seconds."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update(
        {"svg.hashsalt": "hybridsd", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    )
    figure, axes = plt.subplots(figsize=(6.4, 3.8), layout="constrained")
    share = np.linspace(0.0, 1.0, 301)
    for name, runs in served.items():
        latency_s = np.quantile(np.concatenate([one.latency_s for one in runs]), share)
        color, style = LINES[name]
        axes.plot(latency_s, share, style, color=color, label=f"{name}: p95 {np.interp(0.95, share, latency_s):.2f} s")
    axes.axhline(0.95, color="#bbbbbb", linewidth=0.6, linestyle=":")
    axes.set(xscale="log", xlabel="latency, arrival to image [s]", ylabel="share of pictures", ylim=(0.0, 1.005))
    axes.set_xticks([0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.1", "0.2", "0.5", "1", "2", "5", "10"])
    axes.set_title(
        f"Ray Serve on one machine: {REPLICAS} replicas, {len(SEEDS)} x {PICTURES} pictures of 0.1 to 2.1 s, "
        f"{UTILISATION:.0%} busy", fontsize=9, loc="left",
    )  # fmt: skip
    axes.legend(frameon=False, loc="lower right")
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


def test_routing_by_predicted_cost_beats_the_default_router(handles, service_s, tmp_path) -> None:
    """On sizes that differ by a factor of 19, mean and p95 latency are shorter than under Ray's defaults."""
    served: dict[str, list[Served]] = {name: [] for name in ROUTERS}
    names = list(ROUTERS)
    for turn, seed in enumerate(SEEDS):
        load = load_of(seed, service_s)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            served[name].append(asyncio.run(drive(handles[name], load)))
    bounds = intervals(served)
    sys.stdout.write(f"\n{report(served, bounds)}\n")
    file = Path(os.environ.get("HYBRIDSD_FIGURE", tmp_path / "routers.svg"))
    draw(served, file)
    assert file.stat().st_size > 0
    default = bounds[DEFAULT]
    assert default["mean"][-1] < 1.0
    assert default["p95"][-1] < 1.0
