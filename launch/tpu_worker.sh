#!/usr/bin/env bash
# What launch/tpu_vm.sh calls on the workers of a slice: the code is in ~/mae_jax, what the job says in ~/mae_jax_run.
#
# usage: tpu_worker.sh install                    what the code needs, in ~/venv
#        tpu_worker.sh start JOB [ARGUMENT ...]   ends what still runs here, then starts the job, detached
#        tpu_worker.sh attach JOB [ARGUMENT ...]  as follow, if this job runs here; 97 if none does, 98 if another does
#        tpu_worker.sh follow                     shows the log until the job ends, then ends with the job's exit code,
#                                                 96 where that is 1 (gcloud's own), 97 where the job left none
set -euo pipefail

code=$(cd "$(dirname "$0")/.." && pwd)
run=$HOME/mae_jax_run

alive() { [[ -f $run/group && ! -f $run/exit ]] && kill -0 -- "-$(<"$run/group")" 2>/dev/null; }

follow() {
    local exit=97
    tail --lines=100 --follow --pid="$(<"$run/group")" "$run/log"
    [[ ! -f $run/exit ]] || exit=$(<"$run/exit")
    exit "$((exit == 1 ? 96 : exit))"
}

case $1 in
install)
    # the images have Python 3.10; and they update themselves after the start, which locks apt
    command -v c++ >/dev/null || sudo apt-get -o DPkg::Lock::Timeout=600 install -qq g++
    [[ -x $HOME/.local/bin/uv ]] || curl -LsSf https://astral.sh/uv/install.sh | sh
    "$HOME/.local/bin/uv" venv --quiet --allow-existing --python=3.12 "$HOME/venv"
    "$HOME/.local/bin/uv" pip install --quiet --python="$HOME/venv/bin/python" --editable "${code}[tpu]"
    ;;
start)
    # where one worker is lost, the others may still be waiting for it
    for ((second = 0; second < 60; second++)); do
        alive || break
        ((second)) || kill -TERM -- "-$(<"$run/group")"
        sleep 1
    done
    if alive; then kill -KILL -- "-$(<"$run/group")"; fi

    rm -rf "$run"
    mkdir "$run"
    printf '%q ' "${@:2}" >"$run/command"
    cd "$code"
    # In a group of its own, which the end of this connection does not reach. The shell outlives the job's SIGTERM, to
    # write down its exit code.
    # shellcheck disable=SC2016
    setsid bash -c 'trap : TERM; "$HOME/venv/bin/mae-jax" "$@"; echo $? >"$0/exit"' "$run" "${@:2}" \
        </dev/null >"$run/log" 2>&1 &
    echo $! >"$run/group"
    ;;
attach)
    alive || exit 97
    [[ $(<"$run/command") == "$(printf '%q ' "${@:2}")" ]] || exit 98
    follow
    ;;
follow) follow ;;
esac
