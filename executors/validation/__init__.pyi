from .command import LOADS as LOADS
from .command import calibrate as calibrate
from .setting import KINDS as KINDS
