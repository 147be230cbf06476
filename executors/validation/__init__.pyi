from .command import LOADS as LOADS
from .command import validate as validate
from .testbed import KINDS as KINDS
