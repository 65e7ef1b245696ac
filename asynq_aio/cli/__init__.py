"""The command `asynq-aio`."""
