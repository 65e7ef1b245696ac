"""asynq_aio."""
