package main

import (
	"flag"
	"time"

	"github.com/hibiken/asynq"
)

// newTask is a request to enqueue. Options that are null are not given; a null payload is none at all.
type newTask struct {
	Type       string            `json:"type"`
	Payload    []byte            `json:"payload"` // base64
	Headers    map[string]string `json:"headers"`
	TaskID     *string           `json:"task_id"`
	Queue      *string           `json:"queue"`
	MaxRetry   *int              `json:"max_retry"`
	TimeoutS   *float64          `json:"timeout_s"`
	DeadlineAt *int64            `json:"deadline_unix"`
	UniqueS    *float64          `json:"unique_s"`
	ProcessInS *float64          `json:"process_in_s"`
	ProcessAt  *int64            `json:"process_at_unix"`
	RetentionS *float64          `json:"retention_s"`
	Group      *string           `json:"group"`
}

func seconds(n float64) time.Duration { return time.Duration(n * float64(time.Second)) }

func (n newTask) options() []asynq.Option {
	var options []asynq.Option
	add := func(option asynq.Option) { options = append(options, option) }
	if n.TaskID != nil {
		add(asynq.TaskID(*n.TaskID))
	}
	if n.Queue != nil {
		add(asynq.Queue(*n.Queue))
	}
	if n.MaxRetry != nil {
		add(asynq.MaxRetry(*n.MaxRetry))
	}
	if n.TimeoutS != nil {
		add(asynq.Timeout(seconds(*n.TimeoutS)))
	}
	if n.DeadlineAt != nil {
		add(asynq.Deadline(time.Unix(*n.DeadlineAt, 0)))
	}
	if n.UniqueS != nil {
		add(asynq.Unique(seconds(*n.UniqueS)))
	}
	if n.ProcessInS != nil {
		add(asynq.ProcessIn(seconds(*n.ProcessInS)))
	}
	if n.ProcessAt != nil {
		add(asynq.ProcessAt(time.Unix(*n.ProcessAt, 0)))
	}
	if n.RetentionS != nil {
		add(asynq.Retention(seconds(*n.RetentionS)))
	}
	if n.Group != nil {
		add(asynq.Group(*n.Group))
	}
	return options
}

func enqueue(flags *flag.FlagSet, args []string) {
	flags.Parse(args)
	client := asynq.NewClient(connect())
	defer client.Close()
	each(func(n newTask) (any, error) {
		task := asynq.NewTaskWithHeaders(n.Type, n.Payload, n.Headers)
		info, err := client.Enqueue(task, n.options()...)
		if err != nil {
			return nil, err
		}
		return shown(info), nil
	})
}
