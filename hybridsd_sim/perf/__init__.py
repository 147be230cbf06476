"""Seconds, bytes and memory of one stage on one device or group of devices.

A denoiser becomes a table of layers, a parallel method says what each rank does of it, a device fit gives seconds.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
