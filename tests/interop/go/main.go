// Peer is the other side of the wire contract: Go's asynq as a client, a worker and an inspector, driven by lines of
// JSON. Each command reads requests on stdin until it is closed, and writes answers or events to stdout.
//
//	peer enqueue -addrs 127.0.0.1:7000 [-cluster]     one request per task, one answer each
//	peer work    -addrs ... -queues a=6,b=3 ...       events of its handlers, until stdin is closed
//	peer inspect -addrs ...                           one request per question, one answer each
package main

import (
	"bufio"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"sync"

	"github.com/hibiken/asynq"
)

var connection struct {
	addrs   string
	cluster bool
}

func connect() asynq.RedisConnOpt {
	addrs := strings.Split(connection.addrs, ",")
	if connection.cluster {
		return asynq.RedisClusterClientOpt{Addrs: addrs}
	}
	return asynq.RedisClientOpt{Addr: addrs[0]}
}

var output sync.Mutex

// write puts one line of JSON on stdout; handlers do so side by side.
func write(value any) {
	output.Lock()
	defer output.Unlock()
	if err := json.NewEncoder(os.Stdout).Encode(value); err != nil {
		fmt.Fprintln(os.Stderr, "peer:", err)
		os.Exit(1)
	}
}

// each decodes every line of stdin into a request of its own and answers it.
func each[Request any](answer func(Request) (any, error)) {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 64<<20)
	for lines.Scan() {
		var request Request
		decoder := json.NewDecoder(strings.NewReader(lines.Text()))
		decoder.DisallowUnknownFields()
		if err := decoder.Decode(&request); err != nil {
			fmt.Fprintln(os.Stderr, "peer: bad request:", err)
			os.Exit(2)
		}
		reply, err := answer(request)
		if err != nil {
			reply = map[string]string{"error": err.Error()}
		}
		write(reply)
	}
}

func main() {
	if len(os.Args) < 2 {
		fmt.Fprintln(os.Stderr, "usage: peer enqueue|work|inspect -addrs host:port[,...] [-cluster] [flags]")
		os.Exit(2)
	}
	flags := flag.NewFlagSet(os.Args[1], flag.ExitOnError)
	flags.StringVar(&connection.addrs, "addrs", "127.0.0.1:6379", "host:port, comma-separated")
	flags.BoolVar(&connection.cluster, "cluster", false, "the addresses are those of a cluster")
	run := map[string]func(*flag.FlagSet, []string){"enqueue": enqueue, "work": work, "inspect": inspect}[os.Args[1]]
	if run == nil {
		fmt.Fprintf(os.Stderr, "peer: unknown command %q\n", os.Args[1])
		os.Exit(2)
	}
	run(flags, os.Args[2:])
}
