"""Hybrid SD: stages on different models, in one process and between two; and the payload that goes between them."""

import json
import math
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from executors.hybrid import (
    ExpectedTransfer,
    ImageRun,
    LatentTransfer,
    capture_transfer,
    check_address,
    expected_transfer,
    open_listener,
    parse,
    serialise,
)
from executors.hybrid.edge import edge_process, finish_at_edge, finish_run, serve_edge
from executors.hybrid.image import denoise_stage
from executors.hybrid.payload import checksum
from executors.models import (
    Conditioning,
    Pipeline,
    SamplerState,
    build_sampler,
    build_unet,
    seeded_conditioning,
    seeded_latents,
)
from executors.models.samplers import SAMPLERS, history_size
from executors.parallel import Alone, Denoiser, SingleDenoiser, denoise, denoising_of, resolve_settings, run_ranks
from hybridsd_sim.errors import InputError, RunError
from hybridsd_sim.plan import Request
from hybridsd_sim.pricing.pricer import latent_transfer_bytes
from rank_work import Case, denoiser_of
from small_models import HEIGHT_PX, SMALL, SMALLER, WIDTH_PX

STEPS = 4
HEAD = struct.Struct("!4scQ")
LONG_S = 120
"""More than anything here takes on a busy machine."""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sums come in one order only: every process of these tests computes with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def unet(size):
    """The cloud's model, or the edge's."""
    return build_unet(SMALL, seed=1) if size == "cloud" else build_unet(SMALLER, seed=2)


@cache
def conditioning():
    """Seeded embeddings under guidance; both models take them."""
    return seeded_conditioning(unet("cloud"))


def single(size):
    """The whole model on one device."""
    return SingleDenoiser(unet(size), conditioning())


def start(sampler):
    """The initial latents."""
    latents = seeded_latents(unet("cloud"), images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX)
    return latents * sampler.init_noise_sigma


@cache
def images(name, switch, cloud="cloud", edge="edge"):
    """What one process makes of it: `switch` steps of the cloud's model, the rest of the edge's."""
    return finish_run(handed_over(name, switch, cloud), single(edge))


def handed_over(name="dpmsolver++", switch=2, size="cloud", steps=STEPS):
    """The hand-over after `switch` steps of a model."""
    sampler = build_sampler(name, steps)
    latents = denoise(single(size), sampler, start(sampler), stop=switch)
    return capture_transfer(sampler, latents, switch, latent_space="sd1", conditioning=conditioning())


@pytest.fixture(scope="module")
def edge():
    """The address of an edge with the small model, in a process of its own."""
    with edge_process(partial(build_unet, SMALLER, seed=2), threads=1, latent_space="sd1") as (address, _):
        finish_at_edge(address, handed_over(), timeout_s=LONG_S)  # it is up
        yield address


# ---- In one process -------------------------------------------------------------------------------------------------


@settings(max_examples=12)
@given(name=st.sampled_from(SAMPLERS), switch=st.integers(0, STEPS))
def test_equal_models_reproduce_single_to_the_bit(name, switch):
    """With the same model on both sides, a switch at any step changes no bit, whatever the sampler."""
    sampler = build_sampler(name, STEPS)
    whole = denoise(single("cloud"), sampler, start(sampler))
    assert torch.equal(images(name, switch, "cloud", "cloud"), whole)


@settings(max_examples=12)
@given(name=st.sampled_from(SAMPLERS), switch=st.integers(0, STEPS))
def test_a_hand_over_changes_no_bit(name, switch):
    """Two models with a sampler each and a hand-over between them make what both make with one sampler."""
    sampler = build_sampler(name, STEPS)
    latents = denoise(single("cloud"), sampler, start(sampler), stop=switch)
    assert torch.equal(images(name, switch), denoise(single("edge"), sampler, latents, start=switch))


@pytest.mark.parametrize("name", SAMPLERS)
def test_switch_step_says_which_model_does_the_steps(name):
    """Switch step 0 is the small model alone, the last the large one alone; in between both take part."""
    alone = {
        size: denoise(single(size), sampler, start(sampler))
        for size in ("edge", "cloud")
        for sampler in [build_sampler(name, STEPS)]
    }
    assert torch.equal(images(name, 0), alone["edge"])
    assert torch.equal(images(name, STEPS), alone["cloud"])
    assert not any(torch.equal(images(name, 2), result) for result in alone.values())


def test_every_step_after_the_switch_is_reported_once():
    """`on_step` hears every step that is left, in order, and the last latents are the result."""
    heard = []
    result = finish_run(handed_over(switch=1), single("edge"), on_step=lambda *step: heard.append(step))
    assert [step for step, _ in heard] == list(range(1, STEPS))
    assert torch.equal(heard[-1][1], result)


# ---- The payload ----------------------------------------------------------------------------------------------------

SENDER = ExpectedTransfer(latent_space="sd1", prediction="epsilon")


def assert_same(left, right):
    """Equal in every field, tensors to the bit."""
    for name in LatentTransfer.__slots__:
        ours, theirs = getattr(left, name), getattr(right, name)
        if name == "state":
            assert (ours.order, len(ours.history)) == (theirs.order, len(theirs.history))
            assert all(map(torch.equal, ours.history, theirs.history))
        elif name == "added":
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        else:
            assert torch.equal(ours, theirs) if isinstance(ours, torch.Tensor) else ours == theirs


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("switch", [0, 2, STEPS])
def test_fp32_payload_brings_everything_to_the_bit(name, switch):
    """Latents, history, embeddings and settings arrive as they were sent."""
    sent = handed_over(name, switch)
    arrived = parse(serialise(sent), SENDER)
    assert_same(arrived, sent)
    assert arrived.state.step == switch


def test_added_conditions_and_views_travel_too():
    """SDXL's added conditions arrive by name, and tensors that are views of one another are no obstacle."""
    embeds = conditioning().embeds
    sent = replace(handed_over(), added={"text_embeds": embeds[:, 0], "time_ids": torch.tensor([[1024.0] * 6] * 2)})
    assert_same(parse(serialise(sent), SENDER), sent)


@given(
    name=st.sampled_from(SAMPLERS),
    switch=st.integers(0, 3),
    images=st.integers(1, 3),
    with_embeds=st.booleans(),
    guidance_scale=st.sampled_from([1.0, 7.5]),
    precision=st.sampled_from(["fp32", "fp16"]),
)
def test_payload_bytes_follow_the_formula(name, switch, images, with_embeds, guidance_scale, precision):
    """Latents times one plus the history, plus the embeddings, plus a header; in fp16 as the planner prices it."""
    request = Request(model="sd15", num_images=images, guidance_scale=guidance_scale, sampler=name)
    latents = torch.zeros(images, 4, 64, 64)
    history = (latents,) * history_size(name, switch)
    embeds = torch.zeros(request.unet_batch, 77, 768) if with_embeds else None
    sent = LatentTransfer(
        latents=latents,
        step=switch,
        num_inference_steps=25,
        sampler=name,
        prediction="epsilon",
        latent_space="sd1",
        guidance_scale=guidance_scale,
        state=SamplerState(history, min(switch, 2) * len(history)),
        embeds=embeds,
    )
    data = serialise(sent, precision)
    header = 8 + int.from_bytes(data[:8], "little")
    elements = latents.numel() * (1 + len(history)) + (embeds.numel() if with_embeds else 0)
    assert len(data) == header + elements * {"fp32": 4, "fp16": 2}[precision]
    assert header < 1000
    if precision == "fp16" and switch and images == 1:
        assert len(data) - header == latent_transfer_bytes(request, _Sd15, with_embedding=with_embeds)


class _Sd15:
    text_embedding_bytes_fp16 = 77 * 768 * 2


def test_planner_knows_the_same_embeddings(profiles):
    """The catalogue's bytes of a prompt's embeddings are those that travel: 77 tokens of SD 1.5's width in fp16."""
    assert profiles.model("sd15").text_embedding_bytes_fp16 == _Sd15.text_embedding_bytes_fp16


@cache
def payload():
    """A payload with every kind of tensor."""
    return serialise(replace(handed_over(), added={"time_ids": torch.ones(2, 6)}), "fp16")


@settings(max_examples=200)
@given(data=st.data())
def test_one_flipped_bit_is_refused_or_harmless(data):
    """Wherever a bit flips, in the header or in a tensor, the payload is refused, or means exactly what it meant."""
    position = data.draw(st.one_of(st.integers(0, 8 * 800), st.integers(0, 8 * len(payload()) - 1)))
    altered = bytearray(payload())
    altered[position // 8] ^= 1 << position % 8
    try:
        arrived = parse(bytes(altered), SENDER)
    except InputError:
        return
    assert_same(arrived, parse(payload(), SENDER))


@given(st.integers(0, 10**6))
def test_truncated_payload_is_refused(length):
    """Any missing end is noticed, with the number of bytes that did arrive."""
    cut = payload()[: length % len(payload())]
    with pytest.raises(InputError, match=rf"hand-over: {len(cut)} bytes .*; must be a whole safetensors file"):
        parse(cut, SENDER)


def test_trailing_bytes_are_refused():
    """A payload with something after its end is not the one that was sent."""
    with pytest.raises(InputError, match="whole safetensors file"):
        parse(payload() + b"\0" * 8, SENDER)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"latent_space": "sdxl"}, "hand-over latent_space: sd1; this side runs sdxl"),
        ({"prediction": "v"}, "hand-over prediction: epsilon; this side runs v"),
        ({"sampler": "ddim"}, r"hand-over sampler: dpmsolver\+\+; this side runs ddim"),
        ({"num_inference_steps": 25}, "hand-over num_inference_steps: 4; this side runs 25"),
        ({"step": 3}, "hand-over step: 2; this side runs 3"),
        ({"shape": (1, 4, 8, 24)}, r"hand-over shape: \(1, 4, 24, 8\); this side runs \(1, 4, 8, 24\)"),
        ({"channels": 9}, "hand-over channels: 4; this side runs 9"),
        ({"embeds_width": 768}, r"hand-over embeds: 2x77x16; must be 2 \(branches x images\) .* a width of 768"),
        ({"embeds_width": 16, "added": ("text_embeds",)}, "hand-over added: none; .* added condition text_embeds"),
    ],
)
def test_payload_of_another_job_is_refused(expected, message):
    """A receiver names what does not agree with its own model and job."""
    with pytest.raises(InputError, match=message):
        parse(serialise(handed_over()), replace(SENDER, **expected))


def test_all_that_disagrees_is_named_at_once():
    """Two mismatches are two problems of one error."""
    with pytest.raises(InputError) as caught:
        parse(serialise(handed_over()), replace(SENDER, latent_space="sdxl", prediction="v"))
    assert len(caught.value.problems) == 2


def test_missing_embeddings_are_refused_only_where_they_are_needed():
    """A receiver with a text encoder of its own needs no embeddings; one without does."""
    bare = serialise(replace(handed_over(), embeds=None))
    assert parse(bare, SENDER).conditioning is None
    with pytest.raises(InputError, match="hand-over embeds: none; this side has no text encoder"):
        parse(bare, replace(SENDER, embeds_width=16))


@pytest.mark.parametrize("part", ["latents", "embeds"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_not_sent(part, value):
    """NaN and infinity stop at the sender, with the tensor's name."""
    sent = handed_over()
    broken = getattr(sent, part).clone()
    broken.view(-1)[5] = value
    with pytest.raises(InputError, match=f"hand-over {part}: 1 values are NaN or infinite; must be finite"):
        serialise(replace(sent, **{part: broken}))


def test_latents_too_large_for_fp16_are_refused_in_fp16_only():
    """What overflows in half precision travels in fp32."""
    sent = replace(handed_over(), latents=torch.full((1, 4, 24, 8), 1e5))
    assert_same(parse(serialise(sent), SENDER), sent)
    with pytest.raises(InputError, match="Use fp32"):
        serialise(sent, "fp16")


def test_unknown_precision_is_refused():
    """Tensors travel in fp32 or fp16."""
    with pytest.raises(InputError, match="precision: 'fp8'"):
        serialise(handed_over(), "fp8")


def rewritten(change_tensors=lambda _: {}, without=(), **changes):
    """A payload by another writer: entries changed, and a checksum that agrees with them."""
    data = serialise(handed_over())
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    metadata = {name: value for name, value in {**metadata, **changes}.items() if name not in (*without, "checksum")}
    tensors = load(data)
    tensors |= change_tensors(tensors)
    return save(tensors, {**metadata, "checksum": checksum(tensors, metadata)})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (partial(rewritten, version="2"), "hand-over format: hybridsd-handover version 2; must be .* version 1"),
        (partial(rewritten, format="else"), "hand-over format: else version 1"),
        (partial(rewritten, without=("sampler",)), "hand-over: no valid entry 'sampler'"),
        (partial(rewritten, step="two"), "hand-over: no valid entry .*'two'"),
        (partial(rewritten, step="5"), "hand-over step: 5; must lie in 0 to 4"),
        (partial(rewritten, step="-1"), "hand-over step: -1"),
        (partial(rewritten, guidance_scale="nan"), "hand-over guidance_scale: nan"),
        (partial(rewritten, shape="1x4x8x8"), "hand-over latents: 1x4x24x8; must be .* as announced: 1x4x8x8"),
        (partial(rewritten, lambda _: {"history.0": torch.zeros(1, 4, 8, 8)}), "hand-over history: 1x4x8x8"),
        (partial(rewritten, lambda t: {"latents": t["latents"] * math.nan}), "hand-over latents: 768 values are NaN"),
        (partial(rewritten, lambda t: {"latents": t["latents"].to(torch.int32)}), "hand-over latents: torch.int32"),
        (lambda: save({"latents": torch.zeros(1)}), "hand-over format: None version None"),
    ],
)
def test_payload_that_another_program_wrote_wrongly_is_refused(data, message):
    """A right checksum does not excuse a wrong version, missing entries, contradictions or NaN."""
    with pytest.raises(InputError, match=message):
        parse(data(), SENDER)


# ---- Between two processes ------------------------------------------------------------------------------------------


@settings(max_examples=10)
@given(name=st.sampled_from(SAMPLERS), switch=st.integers(0, STEPS))
def test_equal_models_over_tcp_reproduce_single_to_the_bit(edge, name, switch):
    """With the edge's model on both machines, a hand-over after any step changes no bit of the result."""
    sampler = build_sampler(name, STEPS)
    whole = denoise(single("edge"), sampler, start(sampler))
    assert torch.equal(finish_at_edge(edge, handed_over(name, switch, "edge")), whole)


@pytest.mark.parametrize("name", SAMPLERS)
def test_hybrid_over_tcp_equals_hybrid_in_one_process(edge, name):
    """Large model here, small model in another process: the same bits as both in one process."""
    heard = []
    assert torch.equal(finish_at_edge(edge, handed_over(name, 2), on_progress=heard.append), images(name, 2))
    assert heard == [2, 3]


@pytest.mark.parametrize("name", SAMPLERS)
def test_fp16_payload_is_close(edge, name):
    """Half precision on the way moves the result by a few of its rounding units, 2**-11, of the largest value."""
    exact = images(name, 2)
    error = (finish_at_edge(edge, handed_over(name, 2), precision="fp16") - exact).abs().max() / exact.abs().max()
    assert 0 < error < 4 * 2**-11


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent_space": "sd2"}, "refused: hand-over latent_space: sd2; this side runs sd1"),
        ({"prediction": "v"}, "refused: hand-over prediction: v; this side runs epsilon"),
        ({"sampler": "ddmi"}, "refused: sampler: 'ddmi'; no such name"),
        ({"sampler": "ddim"}, "refused: sampler history: 1 tensors; ddim carries 0"),
        ({"state": SamplerState()}, r"refused: sampler history: 0 tensors; dpmsolver\+\+ carries 1"),
        ({"num_inference_steps": 5000}, "refused: num_inference_steps: 5000"),
        ({"latents": torch.zeros(1, 9, 24, 8), "state": SamplerState()}, "refused: hand-over channels: 9"),
        ({"embeds": torch.zeros(2, 77, 32)}, "refused: hand-over embeds: 2x77x32; must be .* a width of 16"),
        ({"embeds": None}, "refused: hand-over embeds: none"),
    ],
)
def test_edge_refuses_what_it_cannot_run_and_says_why(edge, change, message):
    """The sender learns in the edge's own words what does not fit, and the edge goes on serving."""
    with pytest.raises(RunError, match=message):
        finish_at_edge(edge, replace(handed_over(), **change))
    assert torch.equal(finish_at_edge(edge, handed_over()), images("dpmsolver++", 2))


def framed(data, kind=b"H", magic=b"HSD1"):
    """A frame on the wire."""
    return HEAD.pack(magic, kind, len(data)) + data


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (framed(b"x" * 1000)[:500], b"cut the connection after 487 of 1000 bytes"),
        (framed(b"")[:5], b"cut the connection after 5 of 13 bytes"),
        (b"", b"cut the connection after 0 of 13 bytes"),
        (framed(b"x", magic=b"GET "), b"does not speak this protocol"),
        (framed(b"x", kind=b"R"), b"not a hand-over"),
        (HEAD.pack(b"HSD1", b"H", 2**60), b"at most 67108864 are accepted"),
        (framed(b"x" * 100), b"must be a whole safetensors file"),
    ],
)
def test_edge_survives_a_bad_client_and_serves_the_next(edge, sent, answer):
    """A cut connection, another protocol or too large a payload gets a reason; the next client gets its image."""
    with socket.create_connection(edge, timeout=LONG_S) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        reply = b"".join(iter(lambda: client.recv(4096), b""))
    assert HEAD.unpack(reply[:13]) == (b"HSD1", b"E", len(reply) - 13)
    assert answer in reply
    assert torch.equal(finish_at_edge(edge, handed_over()), images("dpmsolver++", 2))


def test_edge_refuses_a_frame_with_any_flipped_bit_in_its_head(edge):
    """Magic, kind and length: each of their 104 bits, flipped on the way, is noticed before anything is run."""
    frame = framed(payload())
    for bit in range(8 * HEAD.size):
        altered = bytearray(frame)
        altered[bit // 8] ^= 1 << bit % 8
        with socket.create_connection(edge, timeout=LONG_S) as client:
            client.sendall(altered)
            client.shutdown(socket.SHUT_WR)
            assert client.recv(5, socket.MSG_WAITALL) == b"HSD1E", f"bit {bit}"
    assert torch.equal(finish_at_edge(edge, handed_over()), images("dpmsolver++", 2))


PARALLEL = {"cfg_parallel": {}, "distrifusion": {"warmup_steps": 1}, "asyncdiff": {"warmup_steps": 1}}


def cloud_run(method, model):
    """A run whose first three steps two ranks do; the second and third with what is one step old."""
    job = denoising_of(unet("cloud"), conditioning(), images=1, height_px=HEIGHT_PX, width_px=WIDTH_PX, steps=STEPS)
    return ImageRun(
        model=model, latent_space="sd1", method=method, degree=2, switch_step=3,
        settings=resolve_settings(method, job, 2, PARALLEL[method]), num_inference_steps=STEPS, sampler="dpmsolver++",
        guidance_scale=conditioning().guidance_scale, height_px=HEIGHT_PX, width_px=WIDTH_PX,
    )  # fmt: skip


def small_model(device="cpu"):
    """The cloud's model as a run is given it; nothing but its UNet is asked for."""
    return Pipeline(
        name="small", config=SMALL, prediction="epsilon", encoder_names=(), vae_name="taesd", weights=None, seed=1,
        device=device, dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.parametrize("method", PARALLEL)
def test_parallel_cloud_stage_hands_over_to_the_edge(edge, method):
    """Two ranks do the cloud's steps and one hands over; the edge ends with the bits of the same steps by hand."""

    def by_hand(group):
        case = Case(method, PARALLEL[method], steps=STEPS, guidance_scale=conditioning().guidance_scale)
        sampler = build_sampler("dpmsolver++", STEPS)
        latents = denoise(denoiser_of(group, case), sampler, start(sampler), stop=3)
        return denoise(single("edge"), sampler, latents, start=3)

    wanted = run_ranks(by_hand, 2)[0]
    first, second = run_ranks(denoise_stage, 2, args=(cloud_run(method, small_model()), conditioning()))
    assert second.transfer is None
    assert torch.equal(finish_run(first.transfer, single("edge")), wanted)
    assert torch.equal(finish_at_edge(edge, first.transfer, timeout_s=LONG_S), wanted)
    if method != "cfg_parallel":
        assert not torch.equal(wanted, images("dpmsolver++", 3)), "what is one step old must show"


def test_killed_edge_is_noticed_at_once():
    """An edge that dies in the middle of its steps is an error at once, not after a silence, and nothing is left."""
    build = partial(build_unet, SMALLER, seed=2)
    message = r"the edge at 127.0.0.1:\d+ cut|connection with the edge .* lost"
    with (
        edge_process(build, threads=1, latent_space="sd1") as (address, process),
        pytest.raises(RunError, match=message),
    ):
        finish_at_edge(address, handed_over(steps=900), on_progress=lambda _: process.kill(), timeout_s=LONG_S)
    assert not process.is_alive()
    with pytest.raises(RunError, match=r"connection with the edge .* lost"):
        finish_at_edge(address, handed_over(), timeout_s=5)


ORPHANING = """
import sys, time
from functools import partial
from executors.hybrid.edge import edge_process
from executors.models import build_unet

if __name__ == "__main__":
    with edge_process(partial(build_unet, {config}, seed=2), threads=1, latent_space="sd1") as (address, _):
        print(address[1], flush=True)
        time.sleep(600)
"""


def test_edge_does_not_outlive_the_process_that_started_it(tmp_path):
    """Kill the parent: the edge closes its port and ends by itself, so that no orphan keeps the device."""
    script = tmp_path / "parent.py"
    script.write_text(ORPHANING.format(config=SMALLER))
    root = Path(__file__).parents[3]
    parent = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, env={"PYTHONPATH": str(root)})
    with parent:
        address = ("127.0.0.1", int(parent.stdout.readline()))
        try:
            finish_at_edge(address, handed_over(), timeout_s=LONG_S)
        finally:
            parent.kill()
    deadline = time.monotonic() + LONG_S
    while time.monotonic() < deadline:
        with suppress(OSError), socket.create_connection(address, timeout=1):
            time.sleep(0.1)
            continue
        break
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address, timeout=1)


# ---- Peers that misbehave, in threads of this process ---------------------------------------------------------------


@contextmanager
def background(work):
    """Run `work(listener)` in a thread; the address it listens at."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=work, args=(listener,), daemon=True)
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            thread.join(timeout=LONG_S)
        assert not thread.is_alive()


def answering(answer):
    """An edge that reads a hand-over and answers whatever `answer` makes of it, then hangs up."""

    def work(listener):
        connection, _ = listener.accept()
        with connection:
            length = HEAD.unpack(connection.recv(13, socket.MSG_WAITALL))[2]
            connection.sendall(answer(connection.recv(length, socket.MSG_WAITALL)))

    return work


def finished(data, **changes):
    """The result frame of an edge that did nothing."""
    return framed(serialise(replace(parse(data, SENDER), step=STEPS, **changes)), b"R")


def flipped(frame, position):
    """A frame with one bit of the byte at `position` changed."""
    return bytes(byte ^ (index == position % len(frame)) for index, byte in enumerate(frame))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda _: b"", "cut the connection after 0 of 13 bytes"),
        (lambda data: finished(data)[:-100], "cut the connection after"),
        (lambda data: flipped(finished(data), -50), "answered with unusable latents: hand-over: checksum"),
        (
            lambda data: finished(data, latents=torch.zeros(1, 4, 8, 8), state=SamplerState()),
            "unusable latents: .*shape",
        ),
        (lambda data: framed(data, b"R"), "unusable latents: hand-over step: 2; this side runs 4"),
        (lambda data: framed(data, b"H"), "answered with a frame of kind b'H'"),
        (lambda _: b"HTTP/1.1 400 Bad Request\r\n\r\n", "does not speak this protocol: it sent b'HTTP'"),
        (lambda _: HEAD.pack(b"HSD1", b"R", 2**40), "announced 1099511627776 bytes; at most 67108864"),
        (lambda _: framed(b"out of memory", b"E"), "refused: out of memory"),
    ],
)
def test_sender_refuses_a_bad_answer(answer, message):
    """A cut, altered, unfitting or foreign answer never passes for latents."""
    with background(answering(answer)) as address, pytest.raises(RunError, match=message):
        finish_at_edge(address, handed_over(), timeout_s=LONG_S)


def test_silent_edge_is_given_up():
    """An edge that accepts and then says nothing is given up after the time allowed."""
    done = threading.Event()

    def work(listener):
        connection, _ = listener.accept()
        with connection:
            done.wait(LONG_S)

    with background(work) as address:
        with pytest.raises(RunError, match=r"was silent or too slow for 0.3 s; is it alive, and the network up\?"):
            finish_at_edge(address, handed_over(), timeout_s=0.3)
        done.set()


class Still(Denoiser):
    """Predicts no noise at all, or fails."""

    def __init__(self, *, fails=False):
        self.fails = fails

    def noise(self, latents, step, timestep):
        if self.fails:
            raise ValueError("no such device")
        return torch.zeros_like(latents)


@contextmanager
def serving(make_denoiser, **settings):
    """An edge in a thread of this process."""
    stop = threading.Event()
    work = partial(
        serve_edge, make_denoiser=make_denoiser, expected=SENDER, keep_serving=lambda: not stop.is_set(), **settings
    )
    with background(work) as address:
        try:
            yield address
        finally:
            stop.set()


def test_edge_gives_up_a_silent_client():
    """A client that stops in the middle of its payload is told so after the time allowed; the next one is served."""
    with serving(lambda _: Still(), timeout_s=2) as address:
        with socket.create_connection(address, timeout=LONG_S) as client:
            client.sendall(framed(b"x" * 1000)[:500])
            assert b"was silent or too slow for 2 s" in client.recv(4096)
        assert finish_at_edge(address, handed_over()).shape == (1, 4, 24, 8)


def test_edge_tells_of_a_run_that_fails():
    """When the model itself fails, the sender gets the reason and the next run is served."""
    denoisers = iter([Still(fails=True), Still()])
    with serving(lambda _: next(denoisers)) as address:
        with pytest.raises(RunError, match="refused: the run failed there: ValueError: no such device"):
            finish_at_edge(address, handed_over())
        assert finish_at_edge(address, handed_over()).shape == (1, 4, 24, 8)


def test_edge_stops_working_for_a_sender_that_left():
    """Once the sender is gone, the edge leaves its run after a few steps, and serves the next."""
    steps = []

    class Counting(Still):
        def noise(self, latents, step, timestep):
            steps.append(step)
            time.sleep(0.02)
            return super().noise(latents, step, timestep)

    with serving(lambda _: Counting()) as address:
        with socket.create_connection(address, timeout=LONG_S) as client:
            client.sendall(framed(serialise(handed_over(steps=900))))
            client.recv(13, socket.MSG_WAITALL)
        assert finish_at_edge(address, handed_over("ddim", 3)).shape == (1, 4, 24, 8)
    assert len(steps) < 450


def test_edge_with_an_encoder_needs_no_embeddings():
    """What conditions the edge's model is the edge's business: its denoiser is built for the hand-over."""
    prompts = []

    def make_denoiser(transfer):
        prompts.append(transfer.conditioning)
        return SingleDenoiser(
            unet("edge"), Conditioning(embeds=conditioning().embeds, guidance_scale=transfer.guidance_scale)
        )

    with serving(make_denoiser) as address:
        bare = replace(handed_over(), embeds=None)
        assert torch.equal(finish_at_edge(address, bare), images("dpmsolver++", 2))
    assert prompts == [None]


def test_an_edge_listens_where_it_was_told():
    """Port 0 takes a free port, at the address that was asked for."""
    with open_listener(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        with socket.create_connection((host, port), timeout=LONG_S):
            assert (host, port > 0) == ("127.0.0.1", True)


def test_an_address_that_cannot_be_used_is_refused():
    """A port in use, an address of another machine and a name that is none: place, value, rule and remedy."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=rf"^--listen: 127.0.0.1:{port}; .* Address already in use. Choose a free"):
            open_listener(("127.0.0.1", port))
    with pytest.raises(InputError, match=r"^--listen: 192.0.2.1:0; this machine cannot listen there: .* Choose"):
        open_listener(("192.0.2.1", 0))
    for nobody in ("a..b", "x" * 300):
        with pytest.raises(InputError, match=rf"^--edge: {nobody}:80; the host is not known here: .* Give"):
            check_address((nobody, 80), "--edge")


def test_sdxl_edge_expects_added_conditions():
    """A UNet of SDXL's kind wants pooled embeddings and time ids along; Stable Diffusion's wants neither."""
    added = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    }
    expected = expected_transfer(build_unet(SMALL | added), "sdxl", "epsilon")
    assert (expected.channels, expected.embeds_width, expected.added) == (4, 16, ("text_embeds", "time_ids"))
    assert expected_transfer(unet("edge"), "sd1", "epsilon").added == ()


@pytest.mark.gpu
def test_what_a_gpu_hands_over_is_in_the_machines_memory():
    """Another process or device goes on from there: nothing of the hand-over is left on the GPU."""
    run = replace(cloud_run("cfg_parallel", small_model("cuda")), method="single", degree=1, settings={})
    sent = denoise_stage(Alone("cuda"), run, conditioning()).transfer
    tensors = [sent.latents, *sent.state.history, sent.embeds, *sent.added.values()]
    assert len(tensors) == 3
    assert {tensor.device.type for tensor in tensors} == {"cpu"}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SAMPLERS)
def test_hand_over_between_gpu_models_changes_no_bit(name):
    """On one GPU, a run that crosses as fp32 payload to an edge with the same model ends with the bits of `single`."""
    model = build_unet(SMALL, seed=1, device="cuda")
    denoiser = SingleDenoiser(model, seeded_conditioning(model))
    sampler = build_sampler(name, STEPS, device="cuda")
    whole = denoise(denoiser, sampler, start(sampler).cuda())
    sampler = build_sampler(name, STEPS, device="cuda")
    latents = denoise(denoiser, sampler, start(sampler).cuda(), stop=2)
    sent = capture_transfer(sampler, latents, 2, latent_space="sd1", conditioning=denoiser.conditioning)
    with serving(lambda _: denoiser, device="cuda") as address:
        assert torch.equal(finish_at_edge(address, sent), whole)
