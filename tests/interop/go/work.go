package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/hibiken/asynq"
)

// event is what a handler saw; started and ended share one shape.
type event struct {
	Event    string            `json:"event"` // ready, start, end, error
	ID       string            `json:"id,omitempty"`
	Queue    string            `json:"queue,omitempty"`
	Type     string            `json:"type,omitempty"`
	Payload  []byte            `json:"payload"` // base64; null where there is none
	Headers  map[string]string `json:"headers,omitempty"`
	Retried  int               `json:"retried"`
	MaxRetry int               `json:"max_retry"`
	Deadline float64           `json:"deadline_unix,omitempty"`
	Error    string            `json:"error,omitempty"`
}

func saw(name string, ctx context.Context, task *asynq.Task, err error) event {
	e := event{Event: name, Type: task.Type(), Payload: task.Payload(), Headers: task.Headers()}
	e.ID, _ = asynq.GetTaskID(ctx)
	e.Queue, _ = asynq.GetQueueName(ctx)
	e.Retried, _ = asynq.GetRetryCount(ctx)
	e.MaxRetry, _ = asynq.GetMaxRetry(ctx)
	if deadline, ok := ctx.Deadline(); ok {
		e.Deadline = float64(deadline.UnixNano()) / 1e9
	}
	if err != nil {
		e.Error = err.Error()
	}
	return e
}

// handle does what the first part of the type says.
func handle(ctx context.Context, task *asynq.Task) error {
	retried, _ := asynq.GetRetryCount(ctx)
	word, _, _ := strings.Cut(task.Type(), ":")
	switch word {
	case "fail":
		return errors.New("failed by the Go worker")
	case "flaky": // twice
		if retried < 2 {
			return fmt.Errorf("attempt %d failed by the Go worker", retried+1)
		}
	case "skip":
		return fmt.Errorf("skipped by the Go worker: %w", asynq.SkipRetry)
	case "revoke":
		return fmt.Errorf("revoked by the Go worker: %w", asynq.RevokeTask)
	case "panic":
		panic("of the Go worker")
	case "wait": // for a cancellation or the deadline; after a failure it is content
		if retried == 0 {
			<-ctx.Done()
			return ctx.Err()
		}
	case "result":
		_, err := task.ResultWriter().Write([]byte("by the Go worker"))
		return err
	case "sleep":
		time.Sleep(5 * time.Millisecond)
	}
	return nil
}

func work(flags *flag.FlagSet, args []string) {
	queues := flags.String("queues", "default=1", "name=priority, comma-separated")
	concurrency := flags.Int("concurrency", 10, "workers")
	retryDelay := flags.Duration("retry-delay", time.Second, "of every retry")
	flags.Parse(args)
	config := asynq.Config{
		Concurrency:              *concurrency,
		Queues:                   map[string]int{},
		RetryDelayFunc:           func(int, error, *asynq.Task) time.Duration { return *retryDelay },
		TaskCheckInterval:        50 * time.Millisecond,
		DelayedTaskCheckInterval: 200 * time.Millisecond,
		LogLevel:                 asynq.WarnLevel,
		ShutdownTimeout:          5 * time.Second,
		ErrorHandler: asynq.ErrorHandlerFunc(func(ctx context.Context, task *asynq.Task, err error) {
			write(saw("error", ctx, task, err))
		}),
	}
	for _, entry := range strings.Split(*queues, ",") {
		name, priority, _ := strings.Cut(entry, "=")
		config.Queues[name], _ = strconv.Atoi(priority)
	}
	server := asynq.NewServer(connect(), config)
	handler := asynq.HandlerFunc(func(ctx context.Context, task *asynq.Task) error {
		write(saw("start", ctx, task, nil))
		err := handle(ctx, task)
		write(saw("end", ctx, task, err))
		return err
	})
	if err := server.Start(handler); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
	write(event{Event: "ready"})
	io.Copy(io.Discard, os.Stdin)
	server.Shutdown()
}
