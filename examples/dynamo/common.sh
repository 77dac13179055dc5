# What the examples share: settings, and starting, awaiting and stopping processes. Sourced, not run.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# `python` and `flexkv` are those of the environment that Dynamo and FlexKV are installed in: activate it first.
MODEL=${MODEL:-Qwen/Qwen3-0.6B}
read -ra worker_args <<<"${WORKER_ARGS:-}"     # more for each worker, such as: --max-model-len 4096 --enforce-eager
export DYN_HTTP_PORT=${DYN_HTTP_PORT:-8000}
EVENT_PORT=${EVENT_PORT:-20080}                # of the first worker's KV events; the next one's is one more
SYSTEM_PORT=${SYSTEM_PORT:-9180}               # of the first worker's metrics; likewise
if [ -z "${FLEXKV_CONFIG_PATH:-}${FLEXKV_CPU_CACHE_GB:-}" ]; then
  export FLEXKV_CONFIG_PATH=$here/stack.yaml   # else what these variables say
fi
connector='{"kv_connector":"FlexKVConnectorV1","kv_role":"kv_both"}'
CONNECTOR=${CONNECTOR:-$connector}

discovery=$(mktemp -d)
logs=${LOGS:-$(mktemp -d)}                     # kept, for whoever wants to know why something ended
mkdir -p "$logs"
# Dynamo without etcd and NATS: discovery through files, events over ZMQ. The frontend and the workers must agree.
export DYN_DISCOVERY_BACKEND=file DYN_FILE_KV=$discovery DYN_EVENT_PLANE=zmq DYN_REQUEST_PLANE=tcp
started=()

# start NAME COMMAND...: in the background, in a process group of its own, its output in $logs/NAME.log.
start() {
  local name=$1
  shift
  setsid "$@" >"$logs/$name.log" 2>&1 &
  started+=($!)
  echo "$name: process $!, log $logs/$name.log"
}

alive() { kill -0 -- "-$1" 2>/dev/null; }

# The last one started is stopped first: workers, then the frontend, then the cache that they use.
stop_all() {
  trap - EXIT
  trap '' INT TERM
  local at group
  for ((at = ${#started[@]} - 1; at >= 0; at--)); do
    group=${started[at]}
    kill -TERM "$group" 2>/dev/null || true
    for _ in {1..300}; do alive "$group" || break; sleep 0.1; done
    kill -KILL -- "-$group" 2>/dev/null || true
  done
  rm -rf "$discovery"
}
trap stop_all EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

start_flexkv() {
  start flexkv flexkv serve
  wait_for "the FlexKV server" flexkv status
}

start_frontend() {
  start frontend python -m dynamo.frontend "$@"
}

# start_worker NUMBER TRANSFER_CONFIG ARGUMENTS...: a worker on device NUMBER.
start_worker() {
  local number=$1 transfer=$2
  shift 2
  start "worker$number" env CUDA_VISIBLE_DEVICES="$number" DYN_SYSTEM_PORT=$((SYSTEM_PORT + number)) \
    python -m dynamo.vllm --model "$MODEL" --kv-transfer-config "$transfer" "$@" \
    ${worker_args[@]+"${worker_args[@]}"}
}

# KV events of worker NUMBER, which a frontend with --router-mode kv listens to.
events() {
  echo '{"publisher":"zmq","topic":"kv-events","endpoint":"tcp://*:'$((EVENT_PORT + $1))'","enable_kv_cache_events":true}'
}

# wait_for WHAT COMMAND...: until the command succeeds; an end of anything that was started ends the wait.
wait_for() {
  local what=$1 process
  shift
  until "$@" >/dev/null 2>&1; do
    for process in "${started[@]}"; do
      kill -0 "$process" 2>/dev/null || { echo "process $process ended before $what was there: see $logs" >&2; exit 1; }
    done
    sleep 0.5
  done
}

# serving COUNT: whether the frontend knows so many workers and the model.
serving() {
  local count
  count=$(curl -sf "localhost:$DYN_HTTP_PORT/health" | grep -o '"generate"' | wc -l)
  [ "$count" -ge "$1" ] && curl -sf "localhost:$DYN_HTTP_PORT/v1/models" | grep -q '"id"'
}

# serve COUNT: say when so many workers are there, then stay until one of the processes ends or Ctrl-C.
serve() {
  wait_for "the model" serving "$1"
  echo "serving $MODEL at http://localhost:$DYN_HTTP_PORT: try $here/verify"
  wait -n
  echo "a process has ended: stopping the others (logs: $logs)" >&2
  exit 1
}
