#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes .venv from requirements/cpu.lock, installs this project into it and writes the tiny model.
# Each part is skipped when nothing it depends on has changed. Set PYTHON to choose the interpreter.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

readonly LOCK=requirements/cpu.lock
readonly MODEL=.cache/tiny-model
readonly LOG=.cache/setup.log
readonly TORCH_CPU_INDEX=https://download.pytorch.org/whl/cpu
# Shared libraries that the stack loads from the system, with the Debian package of each.
readonly LIBRARIES="libibverbs.so.1=libibverbs1 librdmacm.so.1=librdmacm1 libnuma.so.1=libnuma1 libcurl.so.4=libcurl4"
# Programs that the tests start, with the Debian package of each.
readonly PROGRAMS="redis-server=redis-server"
# A served application imports none of these, and compiling them takes longer than all the rest.
readonly NOT_COMPILED='/(tests?|testing|anthropic|google|hypothesis|mypyc?|numba|pip|pygments|schemathesis|sentry_sdk|setuptools|vllm/models)/|/ray/(autoscaler|dashboard/client|data|llm|rllib|train|tune)/|/transformers/models/(?!auto|llama)|/vllm/model_executor/models/(?!adapters|config|interfaces|llama|registry|utils|vision)'

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: %s\n' "$*" >&2; exit 1; }
pin() { sed -n "s/^$1==/$1==/p" "$LOCK"; }
digest() { sha256sum | cut -d' ' -f1; }
unchanged() { [[ -f $1 && $(<"$1") == "$2" ]]; }

# Runs a command with its output in the log; says every 10 s how long it has taken; shows the log when it fails.
step() {
  local what=$1 start=$SECONDS pid
  shift
  say "$what ..."
  "$@" >>"$LOG" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    (( SECONDS - start < 10 || (SECONDS - start) % 10 )) || { say "  $((SECONDS - start)) s, $(du -sm .venv 2>/dev/null | cut -f1) MiB in .venv"; sleep 0.8; }
  done
  wait "$pid" || { tail -n 30 "$LOG" >&2; return 1; }
  say "  done in $((SECONDS - start)) s"
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-python3.11 python3.12 python3}; do
    if "$candidate" -c 'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  fail "needs Python 3.11 or 3.12 with its venv module (Debian: apt-get install python3.11-venv), or PYTHON=/path/to/python"
}

missing_packages() {
  local entry
  for entry in $LIBRARIES; do
    "$1" -c "import ctypes; ctypes.CDLL('${entry%=*}')" 2>/dev/null || printf '%s ' "${entry#*=}"
  done
  for entry in $PROGRAMS; do
    command -v "${entry%=*}" >/dev/null || printf '%s ' "${entry#*=}"
  done
}

apt_install() {
  export DEBIAN_FRONTEND=noninteractive
  timeout 60 apt-get install -y -q --no-install-recommends "$@" ||
    { timeout 60 apt-get update -q && timeout 60 apt-get install -y -q --no-install-recommends "$@"; }
}

# The wheel comes from wherever pip is configured to look; PyTorch's own index is asked only when that has none.
install_torch() {
  .venv/bin/pip install --no-deps --no-compile "$(pin torch)" ||
    .venv/bin/pip install --no-deps --no-compile --retries 2 --timeout 30 --extra-index-url "$TORCH_CPU_INDEX" "$(pin torch)"
}

# uv installs eight times as fast as pip but does not read pip's configuration, so pip takes over where uv finds nothing.
install_lock() {
  grep -vE '^(#|torch==)' "$LOCK" >.cache/without-torch.txt
  .venv/bin/pip install --no-deps --no-compile "$(pin uv)" &&
    UV_HTTP_TIMEOUT=60 .venv/bin/uv pip install --python .venv/bin/python --no-deps -r .cache/without-torch.txt ||
    .venv/bin/pip install --no-deps --no-compile -r .cache/without-torch.txt
}

install_project() { .venv/bin/pip install --no-deps --no-build-isolation -e .; }

# Ahead of time and on all cores: the first start of three engine processes would each do it alone.
compile() {
  .venv/bin/python -m compileall -q -j 0 -x "$NOT_COMPILED" .venv/lib >/dev/null || true
}

make_environment() {
  local python packages apt_pid=""
  python=$(find_python)
  packages=$(missing_packages "$python")
  if [[ -n $packages && $EUID == 0 && -n $(command -v apt-get) ]]; then
    say "installing $packages(Debian packages that Mooncake, LMCache and the tests need) in the background"
    # shellcheck disable=SC2086
    apt_install $packages >.cache/apt.log 2>&1 &
    apt_pid=$!
  fi
  rm -rf .venv
  step "creating .venv with $("$python" --version)" "$python" -m venv .venv
  step "installing $(pin torch)" install_torch
  step "installing $(grep -c == "$LOCK") packages of $LOCK" install_lock
  step "compiling to bytecode" compile
  [[ -z $apt_pid ]] || wait "$apt_pid" || say "apt-get failed, see .cache/apt.log"
  packages=$(missing_packages "$python")
  [[ -z $packages ]] || say "missing for Mooncake, LMCache and their tests; NIXL serving works without. To add them: sudo apt-get install ${packages% }"
}

mkdir -p .cache
exec 9>.cache/setup.lock
if command -v flock >/dev/null; then flock 9; fi

environment="$(printf '%s\n' "$PWD" "${PYTHON:-}" | cat - "$LOCK" | digest) $(.venv/bin/python --version 2>/dev/null || true)"
if ! unchanged .venv/.lock-stamp "$environment"; then
  : >"$LOG"
  make_environment
  printf '%s\n' "${environment%% *} $(.venv/bin/python --version)" >.venv/.lock-stamp
fi

project=$(digest <pyproject.toml)
if ! unchanged .venv/.project-stamp "$project"; then
  step "installing disagg into .venv" install_project
  printf '%s\n' "$project" >.venv/.project-stamp
fi

model=$(digest <disagg/tiny_model.py)
if ! unchanged "$MODEL.stamp" "$model" || [[ ! -f $MODEL/config.json ]]; then
  step "writing the tiny model to $MODEL" .venv/bin/disagg tiny-model "$MODEL"
  printf '%s\n' "$model" >"$MODEL.stamp"
fi
