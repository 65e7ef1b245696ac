"""`python -m asynq_aio` is the command `asynq-aio`."""

from __future__ import annotations

import sys

from asynq_aio.cli.app import main

if __name__ == "__main__":
    sys.exit(main())
