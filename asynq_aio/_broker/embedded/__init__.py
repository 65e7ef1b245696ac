"""Private Redis servers for development, the demo and tests: one, or a whole cluster; gone with the process.

Each server runs under a keeper (keeper.py), in a session of its own: Ctrl-C in the terminal does not reach it before
the worker has drained, and no death of this process leaves it behind. This package manages servers and speaks to them
by redis-py's blocking client, in threads; of the engine only connect.py asks it, for the server behind `embedded://`.
"""

from asynq_aio._broker.embedded.cluster import EmbeddedCluster
from asynq_aio._broker.embedded.server import EmbeddedRedis, find_binary, private_server

__all__ = ["EmbeddedCluster", "EmbeddedRedis", "find_binary", "private_server"]
