"""An asyncio task queue on Redis and Redis Cluster that speaks Go asynq's wire protocol.

In the order in which a task's life reads:

    Task, Payload, TaskInfo, TaskState    what flows
    Client, SyncClient                    a task enters
    RedisClientOpt, RedisClusterClientOpt, RedisFailoverClientOpt, parse_redis_uri    where Redis is
    AsyncServer, ServerConfig             a task is worked on
    ServeMux, Context, ResultWriter       by your code
    SkipRetry, RevokeTask, Backoff        which may decide what becomes of it
    Inspector                             people look and steer
    EmbeddedRedis, EmbeddedCluster        a private Redis, for development and tests
    AsynqError                            the root of everything that is reported
"""

from __future__ import annotations

from importlib.metadata import version as _version

from asynq_aio._backoff import Backoff, default_retry_delay
from asynq_aio._broker.embedded import EmbeddedCluster, EmbeddedRedis
from asynq_aio._client import Client
from asynq_aio._config import (
    RedisClientOpt,
    RedisClusterClientOpt,
    RedisConnOpt,
    RedisFailoverClientOpt,
    TLSOptions,
)
from asynq_aio._context import Context, ResultWriter, current_context
from asynq_aio._defaults import default_redis
from asynq_aio._handler import Handler, Middleware, ServeMux
from asynq_aio._inspector import ClusterNode, Inspector
from asynq_aio._server.config import ServerConfig
from asynq_aio._server.server import AsyncServer
from asynq_aio._sync import SyncClient
from asynq_aio._task import Payload, Task, TaskInfo, TaskOptions, TaskState
from asynq_aio._uris import parse_redis_uri
from asynq_aio.errors import (
    AlreadyExistsError,
    AsynqError,
    BrokerAuthError,
    BrokerError,
    BrokerFullError,
    BrokerUnavailableError,
    ConfigError,
    DuplicateTaskError,
    EnqueueManyError,
    HandlerNotFoundError,
    InvalidTaskError,
    LeaseExpiredError,
    MessageDecodeError,
    MessageEncodeError,
    NotFoundError,
    NotReplicatedError,
    OutcomeUnknownError,
    PayloadError,
    PreconditionError,
    QueueActiveError,
    QueueNotEmptyError,
    QueueNotFoundError,
    QueuePausedError,
    RevokeTask,
    ServerClosedError,
    ServerStateError,
    SkipRetry,
    TaskCancelledError,
    TaskIDConflictError,
    TaskNotFoundError,
    TaskStateError,
    WireError,
)

__all__ = [
    "AlreadyExistsError",
    "AsyncServer",
    "AsynqError",
    "Backoff",
    "BrokerAuthError",
    "BrokerError",
    "BrokerFullError",
    "BrokerUnavailableError",
    "Client",
    "ClusterNode",
    "ConfigError",
    "Context",
    "DuplicateTaskError",
    "EmbeddedCluster",
    "EmbeddedRedis",
    "EnqueueManyError",
    "Handler",
    "HandlerNotFoundError",
    "Inspector",
    "InvalidTaskError",
    "LeaseExpiredError",
    "MessageDecodeError",
    "MessageEncodeError",
    "Middleware",
    "NotFoundError",
    "NotReplicatedError",
    "OutcomeUnknownError",
    "Payload",
    "PayloadError",
    "PreconditionError",
    "QueueActiveError",
    "QueueNotEmptyError",
    "QueueNotFoundError",
    "QueuePausedError",
    "RedisClientOpt",
    "RedisClusterClientOpt",
    "RedisConnOpt",
    "RedisFailoverClientOpt",
    "ResultWriter",
    "RevokeTask",
    "ServeMux",
    "ServerClosedError",
    "ServerConfig",
    "ServerStateError",
    "SkipRetry",
    "SyncClient",
    "TLSOptions",
    "Task",
    "TaskCancelledError",
    "TaskIDConflictError",
    "TaskInfo",
    "TaskNotFoundError",
    "TaskOptions",
    "TaskState",
    "TaskStateError",
    "WireError",
    "__version__",
    "current_context",
    "default_redis",
    "default_retry_delay",
    "parse_redis_uri",
]

__version__ = _version("asynq_aio")
