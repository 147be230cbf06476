"""Finds the capacity plan, proves it and explains it: search, frontier, alternatives, robustness, confidence."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
