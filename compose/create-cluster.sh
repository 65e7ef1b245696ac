#!/bin/sh
# Join the nodes to a cluster, three masters with a replica each; nothing is done to nodes that were joined before.
#   create-cluster.sh HOST:PORT ...
# Stays when it has finished: $READY is there, for the health check, as soon as all nodes agree.
set -eu
ready="${READY:-/tmp/ready}"
rm -f "$ready"

ask() { # HOST:PORT FIELD of CLUSTER INFO; nothing when the node does not answer
    valkey-cli -h "${1%:*}" -p "${1##*:}" cluster info 2>/dev/null | tr -d '\r' | sed -n "s/^$2://p"
}

for node in "$@"; do
    until [ -n "$(ask "$node" cluster_state)" ]; do
        sleep 0.2
    done
done
if [ "$(ask "$1" cluster_known_nodes)" = 1 ]; then
    valkey-cli --cluster create "$@" --cluster-replicas 1 --cluster-yes
fi
for node in "$@"; do
    until [ "$(ask "$node" cluster_state)" = ok ]; do
        sleep 0.2
    done
done
touch "$ready"
echo "the cluster is ready: $*"
exec sleep infinity
