"""The catalogue of measured and published facts: the schema of its rows, their reader, and look-up."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
