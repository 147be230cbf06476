"""What if a request came now, or while pools are busier: every way to serve it, and the one that the policy takes.

Asks the scheduler without entering anything in its ledger, so that a look changes no decision.
"""

from __future__ import annotations

from base64 import b64encode
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib.resources import files
from math import inf
from re import DOTALL, search
from typing import Any

from hybridsd_sim.errors import InputError, unknown_name
from hybridsd_sim.pricing import Candidate
from hybridsd_sim.scheduling import (
    CERTAIN_LATE,
    FALLBACK,
    NO_CANDIDATE,
    OVER_BUDGET,
    POLICIES,
    TURNED_AWAY,
    UNKNOWN_CLASS,
    AnyPool,
    FleetView,
    Scheduler,
)
from hybridsd_sim.serving.requests import QuestionSent

WHY = {
    "late": "No plan that the policy may take is predicted to meet the deadline; it serves the request all the same.",
    NO_CANDIDATE: "No plan of the policy's kind can serve such a request.",
    TURNED_AWAY: "The capacity plan has no room for this part of its class.",
    CERTAIN_LATE: "Every plan would miss the deadline, or make requests late that wait already.",
    OVER_BUDGET: "It would overspend the running budget.",
    UNKNOWN_CLASS: "The plan's scenario has no such request class.",
    FALLBACK: "Deciding failed; this is what an idle fleet would do.",
}


class _Busy(AnyPool):
    """A pool in which every worker group waits equally long."""

    __slots__ = ("_seconds", "declared_work", "queued")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.queued = int(seconds > 0.0)
        self.declared_work = seconds

    def wait_s(self, degree: int, now: float) -> float:
        return self._seconds


def what_if(scheduler: Scheduler, question: QuestionSent, now: float) -> dict[str, Any]:
    """The answer to a question. Raises `InputError` for a pool that there is not."""
    pools = list(scheduler.scenario.pools)
    if strange := [name for name in question.busy_s if name not in pools]:
        raise InputError(unknown_name("busy_s", name, pools) for name in strange)
    request = question.request.of(scheduler.requests)
    view: FleetView | None = None  # the scheduler's own, but for pools that the question makes busy
    if busy_s := question.busy_s:
        named = zip(pools, scheduler.view(now).pools, strict=True)
        view = FleetView([_Busy(busy_s[name]) if name in busy_s else pool for name, pool in named])
    weighed = scheduler.preview(request, view, now)
    decision = weighed.decision
    left_s = decision.deadline_s - now
    options = [
        _option(option, wait_s, left_s) | {"taken": option is decision.candidate}
        for option, wait_s in zip(weighed.options, weighed.waits_s, strict=True)
    ]
    why, policy = WHY.get(decision.reason), scheduler.policy_name
    if why is None:
        known = POLICIES.get(policy)
        why = f"The policy {policy} takes it: {known.summary}." if known else f"The policy {policy} takes it."
    return {"decision": decision.to_dict(with_plan=False), "why": why, "options": options}


def _option(option: Candidate, wait_s: float, left_s: float) -> dict[str, Any]:
    sites, quality = option.plan.sites, option.cost.quality
    latency_s = wait_s + option.latency_s
    misses = ["deadline"] if latency_s > left_s else []
    return {
        "plan": option.plan.label,
        "pool": next((name for name, site in sites.items() if site.tier == "cloud"), None),
        "device": next((name for name, site in sites.items() if site.tier == "edge"), None),
        "degree": option.degree,
        "switch_step": option.plan.switch_step,
        "wait_s": wait_s,
        "latency_s": latency_s,
        "latency_interval_s": None if wait_s == inf else [wait_s + end_s for end_s in option.cost.latency_interval_s],
        "usd": option.cost.usd,
        "quality": option.quality,
        "quality_interval": quality.clip.interval_or_none,
        "misses": misses if option.keeps_limits else [*misses, "quality floor or limits"],
    }


def choices(scheduler: Scheduler) -> dict[str, Any]:
    """What one can ask about."""
    classes = {name: asdict(request) for name, request in scheduler.requests.items()}
    for own in classes.values():
        del own["request_class"]
    return {
        "scenario": scheduler.scenario.name,
        "policy": scheduler.policy_name,
        "version": scheduler.version,
        "classes": classes,
        "pools": list(scheduler.scenario.pools),
    }


@cache
def page() -> tuple[str, dict[str, str]]:
    """The what-if page, in the style of the reports, and headers by which it may use nothing but itself."""
    style = (files("hybridsd_sim.reporting") / "page.css").read_text(encoding="utf-8")
    text = (files(__package__) / "whatif.html").read_text(encoding="utf-8")
    html = text.replace("/* page.css */", style)
    allowed = {}
    for tag in ("style", "script"):  # the digests that a browser compares elements written into the page with
        found = search(f"<{tag}>(.*?)</{tag}>", html, DOTALL)
        digest = b64encode(sha256((found.group(1) if found else "").encode()).digest()).decode()
        allowed[f"{tag}-src"] = f"'sha256-{digest}'"
    policy = "; ".join(f"{key} {value}" for key, value in {"default-src": "'none'", "connect-src": "'self'"}.items())
    policy += "".join(f"; {key} {value}" for key, value in allowed.items())
    policy += "; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    return html, {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
