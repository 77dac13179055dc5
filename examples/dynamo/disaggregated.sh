#!/usr/bin/env bash
# A prefill worker and a decode worker: NIXL carries the prompt's KV from one to the other, FlexKV keeps it for later.
# Needs NIXL (pip install 'nixl[cu13]') and a GPU for each worker.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
nixl='{"kv_connector":"NixlConnector","kv_role":"kv_both"}'
both='{"kv_connector":"MultiConnector","kv_role":"kv_both","kv_connector_extra_config":{"connectors":['$CONNECTOR,$nixl']}}'

start_flexkv
start_frontend
VLLM_NIXL_SIDE_CHANNEL_PORT=20096 start_worker 0 "$nixl" --disaggregation-mode decode
VLLM_NIXL_SIDE_CHANNEL_PORT=20097 start_worker 1 "$both" --disaggregation-mode prefill --kv-events-config "$(events 1)"
serve 2
