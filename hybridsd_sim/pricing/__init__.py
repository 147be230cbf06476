"""Latency, dollars, joules and quality of one plan; all legal plans of a scenario; `predict` and `verify`."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
