"""Denoisers, encoders, decoders, samplers and weights: real architectures from diffusers' configs."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
