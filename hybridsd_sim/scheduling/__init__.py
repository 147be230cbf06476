"""Decides for one request, live or simulated, from the same policy.

Policies, the ledger of workers, what feedback teaches, and the embedded `Scheduler`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
