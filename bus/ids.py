"""The names of things that cross process borders. Everything here is opaque to whoever receives it."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
"""Ours, 128 random bits as 32 hex digits; never the client's header."""
WorkerId = NewType("WorkerId", str)
"""`[A-Za-z0-9_-]+`, contains a boot nonce: a restarted process is a new worker."""
RouterId = NewType("RouterId", str)
"""`[A-Za-z0-9_-]+`, contains a boot nonce."""
HandoffToken = NewType("HandoffToken", bytes)
"""16 random bytes, made by the router for each attempt, sent to both workers over the bus only."""
