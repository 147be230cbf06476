"""What is served in a validation: two small pipelines on disk, the profiles that know them, and who serves them how.

The pipelines are Stable Diffusion's, whole and small: UNets that take some 40 to 60 ms for a guided step on one CPU
thread, a CLIP text encoder with a tokenizer of single bytes, and a tiny autoencoder. Their weights are seeded random
numbers, which cost what trained ones cost. The UNets are deep and narrow: their few megabytes of weights stay in the
caches, so that neighbours who use the memory, on this machine or on its host, disturb their steps little.

Each kind of serving has a scenario and a plan of its own. Nothing here is measured: how long a request holds its worker
comes from the cost rows of the profiles that are given.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from transformers import CLIPTextConfig, CLIPTextModel
from transformers.utils import logging as transformers_logging

from hybridsd_sim.errors import InputError, Problem, unknown_name
from hybridsd_sim.files import data_folder
from hybridsd_sim.perf import TEXT_TOKENS, unet_layers, unet_params
from hybridsd_sim.plan import Deployment, Plan, Stage
from hybridsd_sim.pricing import Candidate, fleet_site, make_candidate, pool_site, request_of
from hybridsd_sim.profiles import Profiles
from hybridsd_sim.scenario import Scenario

from ..models import build_unet, fill

LARGE, SMALL = "testbed-large", "testbed-small"

TEXT_ENCODER, VAE = "testbed-clip", "testbed-vae"

CLOUD, EDGE = "testbed-cloud", "testbed-edge"
"""Devices: the processes that serve as the one and as the other, whose times differ a little although all is alike."""

SIZE_PX = 128

_WIDTH = 256

_UNET: Mapping[str, Any] = {
    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 3,
    "cross_attention_dim": _WIDTH,
    "attention_head_dim": 8,
}

CONFIGS: Mapping[str, Mapping[str, Any]] = {
    LARGE: {**_UNET, "block_out_channels": [64, 64]},
    SMALL: {**_UNET, "block_out_channels": [32, 32]},
}

_SOURCE = {"kind": "modelled", "source": "hybridsd_sim.executors, seeded weights", "source_date": "2026-11"}

REQUEST_CLASS, POOL, FLEET = "picture", "cloud", "edge"

NETWORK = "wifi6"

SLO_LATENCIES = 3.0
"""The promise, in latencies of a request that has everything to itself: at high load some requests miss it."""

LONGEST_S = 3600.0
"""Nobody waits longer than this behind the last arrival."""


# ---- Kinds of serving -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingKind:
    """A way of serving: how many steps a picture has, where they are done, and by how many ranks."""

    name: str
    num_inference_steps: int
    in_cloud: bool = False
    at_edge: bool = False
    method: str = "single"
    degree: int = 1


KINDS: Mapping[str, ServingKind] = {
    kind.name: kind
    for kind in (
        ServingKind(name="cloud", num_inference_steps=2, in_cloud=True),
        ServingKind(name="edge", num_inference_steps=3, at_edge=True),
        ServingKind(name="hybrid", num_inference_steps=5, in_cloud=True, at_edge=True),
        ServingKind(name="parallel", num_inference_steps=3, in_cloud=True, method="cfg_parallel", degree=2),
    )
}
"""Each holds its busiest worker for a sixth of a second or so: the shorter, the more requests an hour."""


def kind_of(name: str) -> ServingKind:
    """A kind by its name. Raises `InputError` for others."""
    if name not in KINDS:
        raise InputError(unknown_name("--kinds", name, tuple(KINDS)))
    return KINDS[name]


def scenario_of(
    kind: ServingKind, *, arrivals: Mapping[str, Any], span_s: float, seed: int = 1, slo_s: float | None = None
) -> Scenario:
    """The scenario of a kind whose last request arrives after `span_s`; all of them end within the horizon."""
    picture = {
        "origin": FLEET, "model": LARGE, "small_models": [SMALL], "height_px": SIZE_PX, "width_px": SIZE_PX,
        "num_inference_steps": kind.num_inference_steps, "sampler": "ddim", "arrivals": dict(arrivals), "slo_s": slo_s,
    }  # fmt: skip
    edge = {
        "device": EDGE, "replicas": 1, "network": NETWORK, "ownership": "shared", "encodes_prompt": False,
    }  # fmt: skip
    cloud = {
        "gpu": CLOUD, "gpus_per_node": kind.degree, "runtime": "eager", "precision": "fp32", "usd_per_gpu_hour": 0.05,
        "replicas_max": 1,
    }  # fmt: skip
    return Scenario.model_validate(
        {
            "name": f"calibrate-{kind.name}",
            "seed": seed,
            "horizon_s": math.ceil(span_s + LONGEST_S),
            "requests": {REQUEST_CLASS: picture},
            "edge": {FLEET: edge},
            "pools": {POOL: cloud},
        },
        strict=False,
    )


def deployment_of(kind: ServingKind, scenario: Scenario, profiles: Profiles, *, switch_step: int) -> Deployment:
    """One worker wherever the kind has one, and the plan that all requests follow.

    `switch_step` counts for kinds that have both sides. The prompt is encoded where the steps begin, the image decoded
    where they end.
    """
    steps = kind.num_inference_steps
    cloud, edge = pool_site(POOL, scenario.pools[POOL]), fleet_site(FLEET, scenario.edge[FLEET], profiles)
    stop = (switch_step if kind.at_edge else steps) if kind.in_cloud else 0
    stages = []
    if kind.in_cloud:
        stages.append(Stage(start=0, stop=stop, model=LARGE, site=cloud, method=kind.method, degree=kind.degree))
    if kind.at_edge:
        stages.append(Stage(start=stop, stop=steps, model=SMALL, site=edge))
    first, last = stages[0].site.name, stages[-1].site.name
    plan = Plan(stages=tuple(stages), text_encode_site=first, vae_site=last, vae=VAE, network=NETWORK)
    return Deployment.pure({POOL: int(kind.in_cloud)}, {REQUEST_CLASS: plan})


def candidate_of(scenario: Scenario, deployment: Deployment, profiles: Profiles) -> Candidate:
    """The deployment's plan, priced for the class's requests."""
    request = request_of(REQUEST_CLASS, scenario.requests[REQUEST_CLASS])
    return make_candidate(scenario, profiles, request, plan_of(deployment))


def plan_of(deployment: Deployment) -> Plan:
    """The plan that all requests follow."""
    return deployment.plans[REQUEST_CLASS][0].plan


def bottleneck_s(candidate: Candidate) -> float:
    """Seconds for which a request holds the worker that it holds the longest.

    A load of 1 is a request every so many seconds, so that rates follow from it.
    """
    return max(candidate.cloud_s, candidate.edge_s)


def balanced_switch_step(kind: ServingKind, profiles: Profiles) -> int:
    """The switch step at which cloud and edge are loaded the most evenly; in the middle for kinds of one side.

    That is where the busier of the two is held for the shortest time; of equal ones the first.
    """
    steps = kind.num_inference_steps
    if not (kind.in_cloud and kind.at_edge):
        return steps // 2
    scenario = scenario_of(kind, arrivals={"process": "constant", "rate_per_s": 1.0}, span_s=1.0)

    def busiest_s(step: int) -> float:
        deployment = deployment_of(kind, scenario, profiles, switch_step=step)
        return bottleneck_s(candidate_of(scenario, deployment, profiles))

    return min(range(1, steps), key=busiest_s)


def share_requests(requests: int, loads: Iterable[float]) -> dict[float, int]:
    """How many of the requests each load gets: in proportion to it, so that all runs take equally long.

    Rounded up. Raises `InputError` for loads outside 0 to 1, both excluded.
    """
    wanted = list(loads)
    if problems := [
        Problem("--loads", str(load), "must lie above 0 and below 1, or queues grow for ever")
        for load in wanted
        if not 0.0 < load < 1.0
    ]:
        raise InputError(problems)
    return {load: math.ceil(requests * load / sum(wanted)) for load in wanted}


def trace_arrivals(path: Path) -> dict[str, Any]:
    """Arrivals that are played from a file as they are."""
    return {"process": "trace", "path": str(path)}


# ---- Files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Testbed:
    """A folder with the pipelines (diffusers' layout) and the profiles folder that has them in its catalogue."""

    folder: Path

    @property
    def profiles(self) -> Path:
        return self.folder / "profiles"

    @property
    def weights(self) -> dict[str, Path]:
        """The pipeline of each model."""
        return {name: self.folder / "pipelines" / name for name in CONFIGS}


def build_testbed(folder: Path) -> Testbed:
    """Write what is missing of the testbed into a folder."""
    testbed = Testbed(folder)
    write_catalogue(testbed.profiles)
    for name, path in testbed.weights.items():
        file, wanted = path / "unet" / "config.json", CONFIGS[name].items()
        if not (file.is_file() and wanted <= json.loads(file.read_text(encoding="utf-8")).items()):
            _write_pipeline(CONFIGS[name], path)
    return testbed


# ---- Pipelines ------------------------------------------------------------------------------------------------------


def _write_pipeline(config: Mapping[str, Any], path: Path) -> None:
    """Under another name first, so that an interrupted writer leaves no half of one."""
    part = path.with_name(f".{path.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    build_unet(config).save_pretrained(part / "unet")
    _seeded_vae().save_pretrained(part / "vae")
    _seeded_text_encoder().save_pretrained(part / "text_encoder")
    # a CLIP tokenizer that merges nothing: every byte of a prompt is a token
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TEXT_TOKENS}
    tokenizer = part / "tokenizer"
    tokenizer.mkdir(parents=True)
    (tokenizer / "vocab.json").write_text(json.dumps(_vocabulary()), encoding="utf-8")
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    shutil.rmtree(path, ignore_errors=True)
    part.rename(path)


def _seeded_vae() -> AutoencoderTiny:
    narrow = {f"{side}_block_out_channels": (16,) * 4 for side in ("encoder", "decoder")}
    with torch.device("meta"):
        vae = AutoencoderTiny(**narrow, num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1,) * 4)
    filled: AutoencoderTiny = fill(vae, seed=0, device="cpu", dtype=torch.float32)
    return filled


def _seeded_text_encoder() -> CLIPTextModel:
    vocabulary = _vocabulary()
    config = CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=_WIDTH, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=4 * _WIDTH, projection_dim=_WIDTH,
        bos_token_id=vocabulary["<|startoftext|>"], eos_token_id=vocabulary["<|endoftext|>"],
    )  # fmt: skip
    with torch.device("meta"):
        encoder = CLIPTextModel(config)
    return fill(encoder, seed=0, device="cpu", dtype=torch.float32)


def _vocabulary() -> dict[str, int]:
    """Tokens of single bytes in CLIP's letters, inside a word and at its end, and the two marks."""
    # a visible letter for every byte: its own where it has one, as in GPT-2's and CLIP's vocabularies
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    letters = [*map(chr, sorted(visible)), *(chr(0x100 + index) for index in range(0x100 - len(visible)))]
    ends = (f"{letter}</w>" for letter in letters)
    return {token: index for index, token in enumerate([*letters, *ends, "<|startoftext|>", "<|endoftext|>"])}


# ---- Profiles -------------------------------------------------------------------------------------------------------


def write_catalogue(folder: Path) -> Path:
    """The shipped catalogue with the testbed's models, components and devices in it, in `folder`.

    Returns the folder, which can be given as a profiles folder.
    """
    shipped = data_folder("profiles") / "catalog"
    catalogue = folder / "catalog"
    catalogue.mkdir(parents=True, exist_ok=True)
    for path in shipped.glob("*.csv"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        columns = list(rows[0])
        with (catalogue / path.name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, lineterminator="\n")
            writer.writeheader()
            writer.writerows([*rows, *_catalogue_rows(path.stem)])
    return folder


def _catalogue_rows(table: str) -> Iterator[dict[str, Any]]:
    """The testbed's rows of a table."""
    if table == "models":
        for name, config in CONFIGS.items():
            yield {
                "name": name, "label": name, "latent_space": "sd1", "prediction": "epsilon", "native_px": SIZE_PX,
                "config": json.dumps(config), "params": unet_params(config),
                "ops": len(unet_layers(config, SIZE_PX, SIZE_PX)), "text_encoders": TEXT_ENCODER,
                "text_embedding_bytes_fp16": 2 * TEXT_TOKENS * _WIDTH, "cross_attention_dim": _WIDTH, "vae": VAE,
                "small_vae": VAE, **_SOURCE, "notes": "ops are its layers; it is only ever timed",
            }  # fmt: skip
    elif table == "components":
        yield _component(TEXT_ENCODER, "text_encode", _seeded_text_encoder())
        yield _component(VAE, "vae_decode", _seeded_vae().decoder)
    elif table == "edge_devices":
        for name in (CLOUD, EDGE):
            yield {
                "name": name, "label": "One thread of the machine under validation", "device_class": "cpu",
                "usable_memory_fraction": 0.8, "power_source": "unknown: not metered", "default_runtime": "eager",
                "default_precision": "fp32", **_SOURCE,
            }  # fmt: skip


def _component(name: str, component: str, module: torch.nn.Module) -> dict[str, Any]:
    params = sum(parameter.numel() for parameter in module.parameters())
    uncounted = dict.fromkeys(("flop_conv_512", "flop_linear_512", "flop_attention_512"), 0)
    notes = "FLOPs not counted: it is only ever timed"
    return {"name": name, "component": component, "params": params, "ops": 1, **uncounted, **_SOURCE, "notes": notes}
