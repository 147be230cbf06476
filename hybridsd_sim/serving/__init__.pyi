from .answers import RefusedError as RefusedError
from .app import build_app as build_app
from .guard import LOOPBACK as LOOPBACK
from .guard import Guard as Guard
from .guard import body_of as body_of
from .listen import is_loopback as is_loopback
from .listen import names_of as names_of
from .listen import serve as serve
