package main

import (
	"flag"
	"fmt"
	"time"

	"github.com/hibiken/asynq"
)

// question names a method of the Inspector and its arguments.
type question struct {
	Ask   string `json:"ask"`
	Queue string `json:"queue"`
	ID    string `json:"id"`
	State string `json:"state"`
	Group string `json:"group"`
}

type taskShown struct {
	ID            string            `json:"id"`
	Queue         string            `json:"queue"`
	Type          string            `json:"type"`
	Payload       []byte            `json:"payload"`
	Headers       map[string]string `json:"headers"`
	State         string            `json:"state"`
	MaxRetry      int               `json:"max_retry"`
	Retried       int               `json:"retried"`
	LastErr       string            `json:"last_error"`
	LastFailedAt  int64             `json:"last_failed_unix"`
	TimeoutS      float64           `json:"timeout_s"`
	DeadlineAt    int64             `json:"deadline_unix"`
	Group         string            `json:"group"`
	NextProcessAt int64             `json:"next_process_unix"`
	IsOrphaned    bool              `json:"is_orphaned"`
	RetentionS    float64           `json:"retention_s"`
	CompletedAt   int64             `json:"completed_unix"`
	Result        []byte            `json:"result"`
}

// unix is 0 for the zero time, which means "none".
func unix(moment time.Time) int64 {
	if moment.IsZero() {
		return 0
	}
	return moment.Unix()
}

func shown(info *asynq.TaskInfo) taskShown {
	return taskShown{
		ID: info.ID, Queue: info.Queue, Type: info.Type, Payload: info.Payload, Headers: info.Headers,
		State: info.State.String(), MaxRetry: info.MaxRetry, Retried: info.Retried, LastErr: info.LastErr,
		LastFailedAt: unix(info.LastFailedAt), TimeoutS: info.Timeout.Seconds(), DeadlineAt: unix(info.Deadline),
		Group: info.Group, NextProcessAt: unix(info.NextProcessAt), IsOrphaned: info.IsOrphaned,
		RetentionS: info.Retention.Seconds(), CompletedAt: unix(info.CompletedAt), Result: info.Result,
	}
}

func inspect(flags *flag.FlagSet, args []string) {
	flags.Parse(args)
	inspector := asynq.NewInspector(connect())
	defer inspector.Close()
	lists := map[string]func(string, ...asynq.ListOption) ([]*asynq.TaskInfo, error){
		"pending":   inspector.ListPendingTasks,
		"active":    inspector.ListActiveTasks,
		"scheduled": inspector.ListScheduledTasks,
		"retry":     inspector.ListRetryTasks,
		"archived":  inspector.ListArchivedTasks,
		"completed": inspector.ListCompletedTasks,
	}
	done := func(err error) (any, error) { return map[string]bool{"done": true}, err }
	each(func(q question) (any, error) {
		switch q.Ask {
		case "queues":
			return inspector.Queues()
		case "queue":
			info, err := inspector.GetQueueInfo(q.Queue)
			if err != nil {
				return nil, err
			}
			return map[string]any{
				"pending": info.Pending, "active": info.Active, "scheduled": info.Scheduled, "retry": info.Retry,
				"archived": info.Archived, "completed": info.Completed, "aggregating": info.Aggregating,
				"size": info.Size, "groups": info.Groups, "processed": info.Processed, "failed": info.Failed,
				"processed_total": info.ProcessedTotal, "failed_total": info.FailedTotal, "paused": info.Paused,
				"latency_s": info.Latency.Seconds(), "memory": info.MemoryUsage,
			}, nil
		case "task":
			info, err := inspector.GetTaskInfo(q.Queue, q.ID)
			if err != nil {
				return nil, err
			}
			return shown(info), nil
		case "list":
			var infos []*asynq.TaskInfo
			var err error
			if q.State == "aggregating" {
				infos, err = inspector.ListAggregatingTasks(q.Queue, q.Group, asynq.PageSize(10_000))
			} else {
				infos, err = lists[q.State](q.Queue, asynq.PageSize(10_000))
			}
			tasks := []taskShown{}
			for _, info := range infos {
				tasks = append(tasks, shown(info))
			}
			return tasks, err
		case "servers":
			infos, err := inspector.Servers()
			servers := []map[string]any{}
			for _, info := range infos {
				workers := []map[string]any{}
				for _, worker := range info.ActiveWorkers {
					workers = append(workers, map[string]any{
						"id": worker.TaskID, "type": worker.TaskType, "payload": worker.TaskPayload,
						"queue": worker.Queue, "started_unix": unix(worker.Started), "deadline_unix": unix(worker.Deadline),
					})
				}
				servers = append(servers, map[string]any{
					"id": info.ID, "host": info.Host, "pid": info.PID, "concurrency": info.Concurrency,
					"queues": info.Queues, "strict": info.StrictPriority, "started_unix": unix(info.Started),
					"status": info.Status, "workers": workers,
				})
			}
			return servers, err
		case "cancel":
			return done(inspector.CancelProcessing(q.ID))
		case "run":
			return done(inspector.RunTask(q.Queue, q.ID))
		case "archive":
			return done(inspector.ArchiveTask(q.Queue, q.ID))
		case "delete":
			return done(inspector.DeleteTask(q.Queue, q.ID))
		case "pause":
			return done(inspector.PauseQueue(q.Queue))
		case "unpause":
			return done(inspector.UnpauseQueue(q.Queue))
		}
		return nil, fmt.Errorf("peer: no question %q", q.Ask)
	})
}
