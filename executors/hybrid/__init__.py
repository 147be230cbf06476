"""One image by two sites: what crosses a switch, who takes over, and the image end to end."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
