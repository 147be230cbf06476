"""What replicas do in the tests of the Ray Serve adapter; importable by processes that Ray starts."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

from ray import serve


class Gpu:
    """Stands for a GPU: one picture after the other, each as long as its call says."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._name = serve.get_replica_context().replica_id.unique_id

    async def __call__(self, picture: dict[str, Any], decision: dict[str, Any] | None = None) -> dict[str, Any]:
        async with self._turn:
            await asyncio.sleep(picture["service_s"])
        return {"name": picture["name"], "replica": self._name, "pid": os.getpid(), "decision": decision}


class PooledGpu(Gpu):
    """A GPU that says which pool it belongs to: the first that starts to `gpus`, the others to `spare`."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        try:
            (Path(folder) / "first").touch(exist_ok=False)
        except FileExistsError:
            self._pool = "spare"
        else:
            self._pool = "gpus"

    def record_replica_metadata(self) -> dict[str, str]:
        return {"pool": self._pool}

    async def __call__(self, picture: dict[str, Any], decision: dict[str, Any] | None = None) -> dict[str, Any]:
        return await super().__call__(picture, decision) | {"pool": self._pool}


class Front:
    """The ingress: makes many calls while it serves one request."""

    def __init__(self, gpu: Any) -> None:
        self._gpu = gpu

    async def __call__(self, pictures: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return list(await asyncio.gather(*(self._gpu.remote(picture) for picture in pictures)))
