"""Routing policies: plain Python that picks a decode worker; a user's own is a name, `module:Class` or a file."""

from .base import Choice, Plan, Policy, PolicyError, RequestView, WorkerView, load_policy

__all__ = ["Choice", "Plan", "Policy", "PolicyError", "RequestView", "WorkerView", "load_policy"]
