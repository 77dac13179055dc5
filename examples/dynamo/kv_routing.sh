#!/usr/bin/env bash
# Two workers behind a frontend that sends a request where most of its prefix is; both share one FlexKV server, so what
# one has computed the other need not.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

start_flexkv
start_frontend --router-mode kv
start_worker 0 "$CONNECTOR" --kv-events-config "$(events 0)"
start_worker 1 "$CONNECTOR" --kv-events-config "$(events 1)"
serve 2
