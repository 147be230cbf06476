"""Parallel methods on real ranks: one file a method, the groups that they talk over, and what starts the ranks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
