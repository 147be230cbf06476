"""How requests end without an image: a code for programs, and place, value, rule and remedy for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from hybridsd_sim.errors import HybridSDError, Problem

CANCELLED, DAMAGED, DEADLINE, EDGE_LOST, FAILED = "cancelled", "damaged", "deadline", "edge_lost", "failed"
NO_EDGE, NO_WORKER, REFUSED, STOPPED, TIMEOUT = "no_edge", "no_worker", "refused", "stopped", "timeout"
UNREACHABLE, WORKER_LOST = "unreachable", "worker_lost"


class Ending(NamedTuple):
    """The HTTP status of an ending, the rule behind it, and what the asker can do."""

    code: int
    rule: str
    remedy: str


_AGAIN = "Ask again later, under another id."
_OPERATOR = "Tell whoever runs the service."
_ENDINGS: Mapping[str, Ending] = {
    CANCELLED: Ending(409, "the client took it back", "Ask again under another id."),
    DAMAGED: Ending(
        502, "every copy of the answer was damaged on the way", "Look at what is between client and cloud."
    ),
    DEADLINE: Ending(504, "its deadline has passed, and the policy serves nobody late", _AGAIN),
    EDGE_LOST: Ending(500, "the edge's own process died with it too often", "Look at the edge's memory."),
    FAILED: Ending(500, "it could not be carried out", _OPERATOR),
    NO_EDGE: Ending(500, "the plan leaves steps to the edge, and this client has no device", "Give the client a crew."),
    NO_WORKER: Ending(503, "no worker that is up can carry out its plan", _AGAIN),
    REFUSED: Ending(400, "the service did not take it", "See the error that came with it."),
    STOPPED: Ending(503, "the service is being stopped", _AGAIN),
    TIMEOUT: Ending(504, "it took longer than any request may", _AGAIN),
    UNREACHABLE: Ending(503, "the service cannot be reached", "Is it running, and the network up?"),
    WORKER_LOST: Ending(503, "workers died with it too often", _OPERATOR),
    "unknown_class": Ending(404, "the plan has no such request class", "Name a class of the plan's scenario."),
}
_REJECTED = Ending(503, "the scheduler has no room for it", _AGAIN)


class UnservedError(HybridSDError):
    """A request ends without an image, for this reason; `words` say more than the code does."""

    def __init__(self, reason: str, words: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.words = words


def ending_of(reason: str) -> Ending:
    """What a reason code means; codes of policies that are not in the table reject."""
    return _ENDINGS.get(reason, _REJECTED)


def problem_of(reason: str, words: str = "") -> Problem:
    """A reason code for people."""
    ending = ending_of(reason)
    return Problem("request", words or reason, ending.rule, ending.remedy)
