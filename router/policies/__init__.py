"""Routing policies: plain Python that picks a decode worker; a user's own is a name, `module:Class` or a file."""

from .base import (
    Choice,
    IndexMode,
    ObservingPolicy,
    Outcome,
    Plan,
    Policy,
    PolicyError,
    PrefillView,
    RequestView,
    WorkerView,
    load_policy,
)

__all__ = [
    "Choice",
    "IndexMode",
    "ObservingPolicy",
    "Outcome",
    "Plan",
    "Policy",
    "PolicyError",
    "PrefillView",
    "RequestView",
    "WorkerView",
    "load_policy",
]
