"""The scheduler over HTTP: a sidecar for serving systems in any language, its metrics, and a page to ask what if.

`build_app` makes the application; `serve` runs it. fastapi, starlette and uvicorn are known here alone.
"""

from hybridsd_sim.server.app import build_app
from hybridsd_sim.server.listen import serve

__all__ = ["build_app", "serve"]
