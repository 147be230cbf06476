"""A pool of workers with small models, and what one process makes of the same tasks: for the tests of workers."""

from __future__ import annotations

import asyncio
import io
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from multiprocessing import active_children

import numpy as np
import torch
from PIL import Image

from executors.hybrid import ExpectedTransfer, ImageRun, generate_image
from executors.live import ProcessPool, Task, WorkerSpec
from executors.models import load_pipeline
from executors.parallel import denoising_of, resolve_settings
from executors.validation.rehearse import available_cpus
from hybridsd_sim.profiles import load_profiles
from small_models import HEIGHT_PX, WIDTH_PX
from small_pipelines import small_catalogue, small_pipeline

STEPS = 4
LONG_S = 120
"""More than anything here takes on a busy machine."""
SENDER = ExpectedTransfer(latent_space="sd1", prediction="epsilon")
STALE = {"warmup_steps": 1}
"""Options of the pair's AsyncDiff: from the second step on, what one rank computes rests on the other's last step."""
ENDLESS = {"num_inference_steps": 900, "stop": 900}


def task(key="image", model="small", **changes):
    """A whole image by the large model, on one prompt and seed."""
    whole = Task(
        key=key, model=model, prompt="a b", seed=3, height_px=HEIGHT_PX, width_px=WIDTH_PX,
        num_inference_steps=STEPS, stop=STEPS, decode=True,
    )  # fmt: skip
    return replace(whole, **changes)


class Site:
    """A pool on an event loop of its own that runs while a test waits for something."""

    def __init__(self, folder):
        self.profiles = small_catalogue(folder / "profiles")
        self.weights = {
            name: small_pipeline(folder / name, name, seed=seed) for seed, name in enumerate(("small", "smaller"), 1)
        }
        self.runner = asyncio.Runner()
        self.heard = []
        self.news = asyncio.Event()
        self.model = cache(self._model)

    def spec(self, name, models=("small",), **changes):
        """A worker with the small models."""
        weights = {model: self.weights[model] for model in models if model in self.weights}
        return WorkerSpec(name=name, pool="p", models=models, weights=weights, profiles=self.profiles, **changes)

    def pool(self, *specs, **options):
        """A pool whose comings and goings are noted."""
        return ProcessPool(
            specs,
            **{"start_method": "forkserver"} | options,
            on_up=lambda spec: self.hear("up", spec),
            on_down=lambda spec: self.hear("down", spec),
        )

    def hear(self, what, spec):
        """A worker has come or gone."""
        self.heard.append((what, spec.name))
        self.news.set()

    async def until(self, *wanted):
        """Wait until this is the last that was heard."""
        while self.heard[-1:] != [wanted]:
            self.news.clear()
            await self.news.wait()

    def run(self, worker, *args, **options):
        """What a worker makes of a task."""
        return self.do(self.workers.run(worker, *args, **options))

    def do(self, work):
        """Wait for it, but not for ever."""
        return self.runner.run(asyncio.wait_for(work, LONG_S))

    def _model(self, name):
        """The same model in this process."""
        return load_pipeline(name, weights=self.weights[name], profiles=load_profiles(self.profiles))

    def picture(self, wanted, small=None, switch_step=None, **method):
        """The levels of the picture that one process makes of a task without any worker."""
        run = ImageRun(
            model=self.model(wanted.model), small=small and self.model(small), switch_step=switch_step,
            latent_space="sd1", prompt=wanted.prompt, seed=wanted.seed, sampler=wanted.sampler,
            num_inference_steps=wanted.num_inference_steps, guidance_scale=wanted.guidance_scale,
            height_px=wanted.height_px, width_px=wanted.width_px, **method,
        )  # fmt: skip
        return (generate_image(run).pixels * 255).round().byte().permute(1, 2, 0).numpy()


def levels(done):
    """The picture in an answer."""
    assert done.is_image
    return np.array(Image.open(io.BytesIO(done.payload)))


def pair_method(site):
    """The pair's method as a run in one process has it."""
    job = denoising_of(
        site.model("small").unet, site.model("small").encode(["a"], height_px=64, width_px=64), images=1,
        height_px=HEIGHT_PX, width_px=WIDTH_PX, steps=STEPS,
    )  # fmt: skip
    return {"method": "asyncdiff", "degree": 2, "settings": resolve_settings("asyncdiff", job, 2, STALE)}


@contextmanager
def opened(folder):
    """A site with a cloud worker on the last CPU, an edge worker with both models, and two ranks that work as one."""
    site = Site(folder)
    torch.set_num_threads(1)
    site.workers = site.pool(
        site.spec("cloud", cpus=available_cpus()[-1:]),
        site.spec("edge", ("smaller", "small")),
        site.spec("pair", method="asyncdiff", degree=2, options=STALE),
    )
    with site.runner:
        site.do(site.workers.__aenter__())
        yield site
        site.do(site.workers.__aexit__(None, None, None))
        assert active_children() == []
