"""Plans, prices and simulates Stable Diffusion inference shared between edge devices and cloud GPUs.

The names of `__init__.pyi` are the public surface; each is loaded from its package when first asked for, so that
importing this costs nothing.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
