# Sourced by the scripts that a person starts: phases with elapsed time, one full log, and on failure the phase, the last lines and what to do.
# A script called by another one goes on with the caller's log and clock.

phases_begin() { # DEFAULT_LOG
  if [[ -z ${PPFT_LOG:-} ]]; then
    mkdir -p "$(dirname "$1")"
    export PPFT_LOG=$1 PPFT_STARTED=$(date +%s)
    : >"$PPFT_LOG"
    echo "full log: $PPFT_LOG"
  fi
  exec 3>&1 # a phase writes to the log; what the user should see at once goes to 3
  phase_depth=$((${PPFT_PHASE_DEPTH:-0} + 1))
  export PPFT_PHASE_DEPTH=$phase_depth
}

elapsed() {
  local seconds=$(($(date +%s) - PPFT_STARTED))
  printf '%3d:%02d' $((seconds / 60)) $((seconds % 60))
}

say() { printf '[%s] %s\n' "$(elapsed)" "$*"; }

phase_failed() { # NAME REMEDY LOG_OFFSET
  {
    echo
    echo "FAILED in phase: $1"
    echo "last lines of $PPFT_LOG:"
    tail -c "+$(($3 + 1))" "$PPFT_LOG" | tail -n 25 | sed 's/^/  | /'
    echo "what to do: $2"
  } >&2
}

# Runs a command with its output in the log. Not to be used in a condition: there, bash ignores 'set -e' inside the command.
phase() { # NAME REMEDY COMMAND...
  local name=$1 remedy=$2 offset begun rc
  shift 2
  begun=$(date +%s)
  say "$name ..."
  printf '\n=== [%s] %s: %s\n' "$(elapsed)" "$name" "$*" >>"$PPFT_LOG"
  offset=$(stat -c %s "$PPFT_LOG")
  set +e
  (set -e && "$@") >>"$PPFT_LOG" 2>&1 </dev/null
  rc=$?
  set -e
  if ((rc != 0)); then
    phase_failed "$name" "$remedy" "$offset"
    exit "$rc"
  fi
  say "$name: done in $(($(date +%s) - begun)) s"
}
