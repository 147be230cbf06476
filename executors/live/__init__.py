"""Hybrid inference as a service: a cloud endpoint with worker processes and an edge client."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
