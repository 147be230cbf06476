"""Writes what was found for people and machines: pages, tables, figures, timeline, terminal.

The same result gives the same bytes; a saved run can be drawn again, or beside another.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
