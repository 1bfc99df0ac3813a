#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# One chat answer with curl. DISAGG_URL says where (default http://127.0.0.1:8000).
set -euo pipefail

url=${DISAGG_URL:-http://127.0.0.1:8000}

model=$(curl --fail --silent --show-error "$url/v1/models" | sed -E 's/.*"data" *: *\[ *\{[^}]*"id" *: *"([^"]*)".*/\1/')

curl --fail --silent --show-error "$url/v1/chat/completions" \
  -H 'Content-Type: application/json' \
  -d "{\"model\": \"$model\", \"messages\": [{\"role\": \"user\", \"content\": \"Hello\"}], \"max_tokens\": 16}"
echo
