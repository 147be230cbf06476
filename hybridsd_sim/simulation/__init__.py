"""Runs requests through a deployment and says how it went: SimPy engine, compiled recursion, metrics, verdict."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
