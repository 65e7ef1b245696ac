"""Numbers that every program on the same Redis must agree on, and the numbers of Go's clients that peers expect."""

from __future__ import annotations

from typing import Final

__all__ = [
    "AGGREGATION_SET_SECONDS",
    "ARCHIVE_DAYS",
    "ARCHIVE_SIZE",
    "COUNTER_MAX",
    "DEFAULT_MAX_RETRY",
    "DEFAULT_QUEUE",
    "DEFAULT_TIMEOUT",
    "FORWARD_BATCH",
    "HEARTBEAT_SECONDS",
    "INT32_MAX",
    "JANITOR_BATCH",
    "LEASE_SECONDS",
    "LONGEST_DURATION_SECONDS",
    "PRESENCE_TTL",
    "RECOVERY_GRACE_SECONDS",
    "SCHEDULER_HISTORY_SIZE",
    "SLOTS",
    "STATISTICS_SECONDS",
]

# -- leases and presence
LEASE_SECONDS: Final = 30
"""How long a claimed task belongs to its server without a heartbeat."""
RECOVERY_GRACE_SECONDS: Final = 30
"""How long past its lease a task is left alone: clocks of a mixed fleet differ."""
HEARTBEAT_SECONDS: Final = 5
"""How often a server extends its leases and says that it is there."""
PRESENCE_TTL: Final = 10
"""Seconds after which a server that says nothing is no longer listed."""

# -- archive, statistics, history
ARCHIVE_SIZE: Final = 10_000
"""The archive is cut by rank 0 .. -ARCHIVE_SIZE, so that one task fewer than this stays."""
ARCHIVE_DAYS: Final = 90
"""Days after which an archived task goes at the next archiving."""
STATISTICS_SECONDS: Final = 90 * 86_400
"""How long the counters of a day are kept."""
COUNTER_MAX: Final = 2**63 - 1
"""At this count the totals of a queue start again from 1."""
SCHEDULER_HISTORY_SIZE: Final = 1_000
"""Enqueue events kept for each scheduler entry."""

# -- batches
FORWARD_BATCH: Final = 100
"""Due tasks that one forward call moves at most."""
JANITOR_BATCH: Final = 100
"""Expired completed tasks that one janitor call deletes at most."""
AGGREGATION_SET_SECONDS: Final = 120
"""How long an aggregation may take before its tasks return to the group."""

# -- what a client writes where nothing is asked for
DEFAULT_QUEUE: Final = "default"
DEFAULT_MAX_RETRY: Final = 25
DEFAULT_TIMEOUT: Final = 1_800
"""Seconds for one attempt where neither timeout nor deadline is given."""

# -- what fits
INT32_MAX: Final = 2**31 - 1
"""`retry` and `retried` are int32 on the wire; Go's encoder wraps what is above."""
LONGEST_DURATION_SECONDS: Final = (2**63 - 1) // 10**9
"""292 years: Go reads timeout and retention as int64 nanoseconds, and silently overflows above."""
SLOTS: Final = 16_384
"""Hash slots of a Redis Cluster."""
