"""Hybrid SD (arXiv 2408.06646): a large model denoises the first steps, a small one the rest.

Latents cross with the sampler's state as one `LatentTransfer`, and the small model goes on with a sampler of its own:
in the same process with the transfer as it is, on another machine with what arrives over a TCP connection. That carries
frames of magic, kind, length and payload; nothing in them is ever executed.
"""

from __future__ import annotations

import logging
import multiprocessing
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from diffusers.models import UNet2DConditionModel
from torch import Tensor

from hybridsd_sim.errors import HybridSDError, InputError, Problem, RunError

from ..models import SamplerState, build_sampler, resume
from ..parallel import TIMEOUT_S, Denoiser, SingleDenoiser, denoise
from .payload import ExpectedTransfer, LatentTransfer, parse, serialise

log = logging.getLogger(__name__)


Address = tuple[str, int]

OnStep = Callable[[int, Tensor], None]

MAX_BYTES = 64 * 2**20
"""Largest payload accepted; four SDXL images of 2048 px with history and embeddings take 14 MB in fp32."""

CONNECT_S = 10.0
"""A host that does not take a call within this is not there."""

_POLL_S = 0.5

_HEAD = struct.Struct("!4scQ")

_MAGIC = b"HSD1"

_HANDOVER, _PROGRESS, _RESULT, _ERROR = b"H", b"P", b"R", b"E"


def finish_run(
    transfer: LatentTransfer, denoiser: Denoiser, *, device: torch.device | str = "cpu", on_step: OnStep | None = None
) -> Tensor:
    """Denoise the rest of a transferred run, to its end. Raises `InputError` for a state that does not fit.

    Returns the final latents (images, C, H, W) on `device`. `on_step` is called after every step with its index and the
    latents.
    """
    sampler = build_sampler(
        transfer.sampler, transfer.num_inference_steps, prediction=transfer.prediction, device=device
    )
    resume(sampler, transfer.state, transfer.step)
    return denoise(denoiser, sampler, transfer.latents.to(device), start=transfer.step, on_step=on_step)


# ---- Frames ---------------------------------------------------------------------------------------------------------


class _Connection:
    """A connection as both sides use it: whole frames, each within `timeout_s`, or a `RunError` that says why not."""

    def __init__(self, connection: socket.socket, peer: str, timeout_s: float, max_bytes: int) -> None:
        self.connection = connection
        self.peer = peer
        self.timeout_s = timeout_s
        self.max_bytes = max_bytes

    def send(self, kind: bytes, payload: bytes) -> None:
        with _connection_errors(self.peer, self.timeout_s):
            self.connection.settimeout(self.timeout_s)
            self.connection.sendall(_HEAD.pack(_MAGIC, kind, len(payload)) + payload)

    def receive(self) -> tuple[bytes, bytes]:
        """Kind and payload of the next frame."""
        deadline = time.monotonic() + self.timeout_s
        with _connection_errors(self.peer, self.timeout_s):
            magic, kind, length = _HEAD.unpack(self._exactly(_HEAD.size, deadline))
            if magic != _MAGIC:
                raise RunError(f"{self.peer} does not speak this protocol: it sent {magic!r}, not {_MAGIC!r}")
            if length > self.max_bytes:
                raise RunError(f"{self.peer} announced {length} bytes; at most {self.max_bytes} are accepted")
            return kind, self._exactly(length, deadline)

    def _exactly(self, count: int, deadline: float) -> bytes:
        data = bytearray()
        while len(data) < count:
            self.connection.settimeout(max(deadline - time.monotonic(), 1e-3))
            part = self.connection.recv(min(count - len(data), 2**20))
            if not part:
                raise RunError(f"{self.peer} cut the connection after {len(data)} of {count} bytes")
            data += part
        return bytes(data)

    def drain(self) -> None:
        """Read what the peer still sends, for a second at most: closing on unread bytes would destroy our answer."""
        deadline = time.monotonic() + min(1.0, self.timeout_s)
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)
            while (left := deadline - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(2**16):
                    return


@contextmanager
def _connection_errors(peer: str, timeout_s: float) -> Iterator[None]:
    try:
        yield
    except TimeoutError as error:
        raise RunError(
            f"{peer} was silent or too slow for {timeout_s:g} s; is it alive, and the network up?"
        ) from error
    except OSError as error:
        raise RunError(f"connection with {peer} lost: {error}") from error


# ---- The sending side -----------------------------------------------------------------------------------------------


def finish_at_edge(
    address: Address,
    transfer: LatentTransfer,
    *,
    precision: str = "fp32",
    timeout_s: float = TIMEOUT_S,
    on_progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Let the edge at `address` finish a run and return the final latents (images, C, H, W), float32.

    `on_progress` is called with the index of every step that the edge has done. Raises `RunError` with the edge's own
    words if it refuses, and when it cannot be reached, dies or stays silent for longer than `timeout_s`: for a whole
    payload, or for one denoising step.
    """
    payload = serialise(transfer, precision)
    peer = f"the edge at {address[0]}:{address[1]}"
    connect_s = min(timeout_s, CONNECT_S)
    with _connection_errors(peer, connect_s):
        connection = socket.create_connection(address, timeout=connect_s)
    with connection:
        line = _Connection(connection, peer, timeout_s, MAX_BYTES)
        line.send(_HANDOVER, payload)
        while (frame := line.receive())[0] == _PROGRESS:
            if on_progress:
                on_progress(int.from_bytes(frame[1], "big"))
    kind, answer = frame
    if kind == _ERROR:
        raise RunError(f"{peer} refused: {answer.decode(errors='replace')}")
    if kind != _RESULT:
        raise RunError(f"{peer} answered with a frame of kind {kind!r}, not with latents")
    expected = ExpectedTransfer(
        latent_space=transfer.latent_space,
        prediction=transfer.prediction,
        sampler=transfer.sampler,
        num_inference_steps=transfer.num_inference_steps,
        step=transfer.num_inference_steps,
        shape=tuple(transfer.latents.shape),
    )
    try:
        return parse(answer, expected).latents.to(transfer.latents.device)
    except InputError as error:
        raise RunError(f"{peer} answered with unusable latents: {error}") from error


# ---- The edge -------------------------------------------------------------------------------------------------------


def parent_is_alive() -> bool:
    """Whether the process that started this one is still there; true for one that was started by hand."""
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()


def serve_edge(
    listener: socket.socket,
    make_denoiser: Callable[[LatentTransfer], Denoiser],
    expected: ExpectedTransfer,
    *,
    device: torch.device | str = "cpu",
    timeout_s: float = TIMEOUT_S,
    max_bytes: int = MAX_BYTES,
    keep_serving: Callable[[], bool] = parent_is_alive,
) -> None:
    """Finish the runs that arrive on `listener`, one after the other, as long as `keep_serving` says so.

    `make_denoiser` builds the small model's denoiser for a transfer. After every step the sender is told, so each side
    learns within seconds that the other is gone. Whoever sends what cannot be run gets the reason, and the next is
    served; a silent sender keeps the others waiting for `timeout_s`. Any host that reaches the port may use it.
    """
    listener.settimeout(_POLL_S)
    while keep_serving():
        try:
            connection, address = listener.accept()
        except TimeoutError:
            continue
        with connection:
            line = _Connection(connection, f"the sender at {address[0]}:{address[1]}", timeout_s, max_bytes)
            try:
                line.send(_RESULT, _finish_transfer(line, make_denoiser, expected, device))
            except HybridSDError as error:
                log.warning("%s was not served: %s", line.peer, error)
                _refuse(line, str(error))
            except Exception as error:
                log.exception("%s was not served", line.peer)
                _refuse(line, f"the run failed there: {type(error).__name__}: {error}")


def _finish_transfer(
    line: _Connection,
    make_denoiser: Callable[[LatentTransfer], Denoiser],
    expected: ExpectedTransfer,
    device: torch.device | str,
) -> bytes:
    """The final latents of the run that the sender hands over, as bytes of a transfer without state."""
    kind, payload = line.receive()
    if kind != _HANDOVER:
        raise RunError(f"{line.peer} sent a frame of kind {kind!r}, not a hand-over")
    transfer = parse(payload, expected)
    latents = finish_run(
        transfer,
        make_denoiser(transfer),
        device=device,
        on_step=lambda step, _: line.send(_PROGRESS, step.to_bytes(4, "big")),
    )
    end = transfer.num_inference_steps
    return serialise(replace(transfer, latents=latents, step=end, state=SamplerState(), embeds=None, added={}))


def _refuse(line: _Connection, reason: str) -> None:
    with suppress(RunError):  # the sender may be gone; the log has the reason
        line.send(_ERROR, reason.encode())
        line.drain()


def expected_transfer(unet: UNet2DConditionModel, latent_space: str, prediction: str) -> ExpectedTransfer:
    """What an edge without a text encoder can go on with, given its UNet.

    Number of steps, sampler, size and step are left open: every sender brings its own.
    """
    width = unet.config["cross_attention_dim"]
    return ExpectedTransfer(
        latent_space=latent_space,
        prediction=prediction,
        channels=unet.config["in_channels"],
        embeds_width=width if isinstance(width, int) else width[0],
        added=("text_embeds", "time_ids") if unet.config["addition_embed_type"] == "text_time" else (),
    )


def serve_unet(
    listener: socket.socket,
    unet: UNet2DConditionModel,
    *,
    latent_space: str,
    prediction: str = "epsilon",
    timeout_s: float = TIMEOUT_S,
) -> None:
    """`serve_edge` with one UNet, on the device where it is.

    The prompt must come embedded: a transfer without embeddings is refused. `latent_space` and `prediction` are the
    catalogue's words for the UNet.
    """

    def make_denoiser(transfer: LatentTransfer) -> Denoiser:
        conditioning = transfer.conditioning
        if conditioning is None:
            raise RunError("this edge has no text encoder")
        return SingleDenoiser(unet, conditioning.to(unet.device, unet.dtype))

    expected = expected_transfer(unet, latent_space, prediction)
    serve_edge(listener, make_denoiser, expected, device=unet.device, timeout_s=timeout_s)


def check_address(address: Address, place: str) -> None:
    """Raises `InputError` for a host that nobody knows, `place` being the option that names it."""
    try:
        socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (OSError, ValueError) as error:  # ValueError: text that cannot be a host's name
        rule = f"the host is not known here: {_reason(error)}"
        remedy = "Give an IPv4 address, or a name that this machine can resolve."
        raise InputError(Problem(place, _written(address), rule, remedy)) from error


def open_listener(address: Address) -> socket.socket:
    """A socket that listens; port 0 takes a free one. Raises `InputError` where this machine cannot listen there."""
    check_address(address, "--listen")
    try:
        listener = socket.create_server(address)
    except OSError as error:
        rule = f"this machine cannot listen there: {_reason(error)}"
        remedy = "Choose a free port, or 0 for any, and an address of this machine, such as 127.0.0.1."
        raise InputError(Problem("--listen", _written(address), rule, remedy)) from error
    # What it accepts inherits this. Without it a payload waits until the receiver has acknowledged what came before.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


def _written(address: Address) -> str:
    return f"{address[0]}:{address[1]}"


def _reason(error: OSError | ValueError) -> str:
    """What the system says, without the address that Python repeats after it."""
    text = getattr(error, "strerror", None) or str(error)
    return str(text).partition(" (while")[0]


@contextmanager
def edge_process(
    build: Callable[[], UNet2DConditionModel], *, threads: int | None = None, **settings: Any
) -> Iterator[tuple[Address, BaseProcess]]:
    """An edge in a process of its own on this machine: its address, and the process.

    The process builds its UNet with `build`, which it must be able to import, and serves it with `serve_unet` and these
    settings. It ends with the block, and by itself if this process dies.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:  # the process keeps it; callers wait in its queue
        process = multiprocessing.get_context("spawn").Process(
            target=_run_edge, args=(listener, build, threads, settings), daemon=True
        )
        process.start()
        address = listener.getsockname()
    try:
        yield address, process
    finally:
        process.kill()
        process.join()


def _run_edge(
    listener: socket.socket, build: Callable[[], UNet2DConditionModel], threads: int | None, settings: dict[str, Any]
) -> None:
    if threads:
        torch.set_num_threads(threads)
    serve_unet(listener, build(), **settings)
