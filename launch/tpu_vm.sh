#!/usr/bin/env bash
# Runs one mae-jax job on a Cloud TPU slice, from asking for the slice to deleting it.
#
# usage: launch/tpu_vm.sh [--dry-run] [--keep] [--spot] [--runtime=VERSION]
#                         --name=NAME --zone=ZONE --type=TYPE JOB [ARGUMENT ...]
#
#   launch/tpu_vm.sh --spot --name=mae --zone=us-central1-a --type=v5litepod-64 pretrain \
#       --config=configs/pretrain.py:vit_b16 --config.data.data_dir=gs://BUCKET/tfds --workdir=gs://BUCKET/vit_b16
#
#   --name=NAME        of the queued resource and of its TPU VM; where NAME is there already, it is used
#   --zone=ZONE        where; the project is gcloud's own (CLOUDSDK_CORE_PROJECT names another)
#   --type=TYPE        what, as `gcloud compute tpus accelerator-types list --zone=ZONE` calls it
#   --spot             much cheaper, and may be taken away at any time
#   --keep             do not delete NAME at the end
#   --runtime=VERSION  the image of the VMs, where this script knows none for TYPE
#   --dry-run          print the commands, in order, and run none of them
#
# The code is what git has committed here. The job runs detached, and this script follows it: interrupted, or where the
# connection is lost, the same command goes on following. A slice that is taken away is deleted and asked for again, and
# the job goes on from its last checkpoint, for which --workdir must be in a bucket: the disks of the VMs go with them.
# NAME is deleted when the job has ended, well or not. A TPU VM made without a queued resource is used, and left alone.
#
# Exit code: the job's (0 done, 2 bad configuration, 3 data, 4 checkpoint, ...); 1 also where there is no slice.
set -euo pipefail

RETRIES=5 # in a row, within an hour each, on a slice that is still there; a slice that is taken away costs none

root=$(cd "$(dirname "$0")/.." && pwd)
name='' zone='' type='' runtime='' spot='' keep='' dry=''
made=queued-resources field=state.state up=ACTIVE # what NAME is to gcloud, where that has its state, and the good one
mine=''                                           # whether NAME is to be deleted at the end
fresh='' taken=''                                 # whether NAME was made in this try, and was taken away before

say() { echo "tpu_vm.sh: $*" >&2; }
die() {
    say "$1"
    exit "${2:-1}"
}

# Does it, or prints it as it could be typed.
run() {
    local word quote="'\\''" line=''
    if [[ ! $dry ]]; then
        "$@"
        return
    fi
    for word; do
        [[ $word =~ ^[-A-Za-z0-9_./:=,@]+$ ]] || word="'${word//\'/$quote}'"
        line+=" $word"
    done
    echo "${line# }"
}

# on WORKER COMMAND: as text for the shell over there. A worker that is gone without a word is noticed in two minutes.
on() {
    run gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker="$1" \
        --ssh-flag='-o ServerAliveInterval=30' --command="$2"
}

# worker ACTION ARGUMENT ...: the text that calls tpu_worker.sh. This is the one place where arguments are quoted.
worker() {
    printf 'bash mae_jax/launch/tpu_worker.sh %q' "$1"
    (($# == 1)) || printf ' %q' "${@:2}"
}

# `list` says nothing where there is no NAME; `describe` would fail, as it does where gcloud cannot say.
listed() { run gcloud compute tpus "$made" list --zone="$zone" --filter="name~/$name\$" --format="value($field)"; }

# The state of NAME, in `now`.
look() {
    local try
    for try in 1 2 3; do
        now=$(listed) && return
        ((try == 3)) || sleep 30
    done
    die "gcloud does not say what $name is doing (see above); once it does, run the same command again"
}

create() {
    run gcloud compute tpus queued-resources create "$name" --node-id="$name" --zone="$zone" \
        --accelerator-type="$type" --runtime-version="$runtime" ${spot:+--spot} || return
    mine=1 fresh=1
}

delete() {
    run gcloud compute tpus queued-resources delete "$name" --zone="$zone" --force --quiet || return
    mine='' fresh=''
}

# Ends with exit code $1, or 1 in place of 0 where NAME costs on, and with NAME deleted if it may be.
finish() {
    local try
    if [[ $mine && ! $keep ]]; then
        for try in 1 2 3; do
            delete && break
            ((try < 3)) || exit "$(($1 ? $1 : 1))"
            sleep 60
        done
    fi
    exit "$1"
}

# Returns when NAME can be used.
ready() {
    local before=none unlisted=0
    if [[ $dry ]]; then
        echo "# where $name is there already, the next two are left out"
        create
        echo "until [[ \$($(listed)) == $up ]]; do sleep 30; done"
        return
    fi
    while
        look
        [[ $now != "$up" ]]
    do
        [[ $now == "$before" ]] || say "$name is ${now:-not there}"
        before=$now
        case $made:$now in
        queued-resources:)
            if [[ $fresh ]]; then # asked for, and not listed yet
                ((unlisted++ < 10)) || die "$name was asked for, and is not listed; was it deleted by others?"
                sleep 30
                continue
            fi
            create || {
                [[ $taken ]] || die "no $name (see above); check quota, zone and type, as launch/README.md says"
                sleep 60 # it worked before, and waiting costs nothing
            }
            ;;
        queued-resources:SUSPENDED) delete || sleep 60 ;; # was taken away, and never comes back
        queued-resources:FAILED)
            if [[ $fresh && ! $taken ]]; then
                gcloud compute tpus queued-resources describe "$name" --zone="$zone" || true
                say "Google cannot provide $name (see above); try another zone or type, or later"
                finish 1
            fi
            delete || true # it worked before; and one left by an earlier command says nothing about this one
            sleep 60
            ;;
        tpu-vm: | tpu-vm:PREEMPTED | tpu-vm:TERMINATED | tpu-vm:STOPPED)
            die "$name is ${now:-gone}, and was made by others; start or delete it, and run the same command again"
            ;;
        *) sleep 30 ;;
        esac
    done
}

# One try on a slice that is there. Returns as `tpu_worker.sh follow` does; 1 or 255 where gcloud lost the connection,
# 95 where it does not come to that.
attempt() {
    local code=0
    if [[ ! $fresh ]]; then
        on 0 "$(worker attach "$@")" || code=$?
        case $code in
        97 | 127) ;; # nothing runs there, or there is no code yet
        98)
            mine=''
            die "another job runs on $name; wait for it, or take another name"
            ;;
        *) return "$code" ;;
        esac
    fi
    run gcloud compute tpus tpu-vm scp "$archive" "$name:mae_jax.tar.gz" --zone="$zone" --worker=all || return 95
    on all "rm -rf mae_jax && mkdir mae_jax && tar -xzf mae_jax.tar.gz -C mae_jax && $(worker install)" || return 95
    on all "$(worker start "$@")" || return 95
    on 0 "$(worker follow)"
}

while [[ ${1-} == -* ]]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    --name=?*) name=${1#*=} ;;
    --zone=?*) zone=${1#*=} ;;
    --type=?*) type=${1#*=} ;;
    --runtime=?*) runtime=${1#*=} ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry-run) dry=1 ;;
    *) die "$1: no such option, or one without its value; see launch/tpu_vm.sh --help" 2 ;;
    esac
    shift
done
for option in name zone type; do
    [[ ${!option} ]] || die "--$option=... is missing; see launch/tpu_vm.sh --help" 2
done
[[ $name =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "--name=$name: a name has small letters, digits and dashes only" 2
[[ ${1-} ]] || die "JOB is missing; see launch/tpu_vm.sh --help" 2
for argument; do
    [[ $keep || $argument != --workdir=* || $argument == --workdir=gs://* ]] ||
        die "$argument is on disks that are deleted with $name; use --workdir=gs://BUCKET/..., or add --keep" 2
done
if [[ ! $runtime ]]; then
    case $type in # https://cloud.google.com/tpu/docs/runtimes
    v2-* | v3-* | v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) die "--type=$type: no runtime is known for it; add --runtime=VERSION" 2 ;;
    esac
fi
[[ $dry ]] || command -v gcloud >/dev/null || die "gcloud is missing; install the Google Cloud CLI" 2

archive=$root/build/$name.tar.gz
git -C "$root" diff --quiet HEAD 2>/dev/null || say "changes that are not committed are not copied"
run mkdir -p "$root/build"
run git -C "$root" archive --format=tar.gz --output="$archive" HEAD ||
    die "no code to copy (see above); clone it with git" 2

if [[ ! $dry ]]; then
    trap 'exit 130' INT
    trap 'exit 143' TERM HUP
    trap '[[ ! $mine ]] || say "$name is still there, at a cost. The same command goes on with it, and this deletes it:
gcloud compute tpus queued-resources delete $name --zone=$zone --force"' EXIT
    look
    if [[ $now ]]; then
        mine=1
    else
        made=tpu-vm field=state up=READY
        look
        [[ $now ]] || made=queued-resources field=state.state up=ACTIVE
    fi
fi

retries=0
while :; do
    ready
    began=$SECONDS code=0
    attempt "$@" || code=$?
    case $code in
    0 | 2 | 3 | 4 | 5) finish "$code" ;; # done, or what the same command would meet again
    esac

    sleep 60 # a slice that is taken away shows it late
    fresh=''
    look
    ((SECONDS - began < 3600)) || retries=0
    if [[ $now != "$up" ]]; then
        say "$name was taken away; once more"
        taken=1
    elif [[ $code =~ ^(1|6|95|97|134|137|143|255)$ ]] && ((retries++ < RETRIES)); then
        say "it stopped with $code; once more"
    elif [[ $code =~ ^(1|255)$ ]]; then
        die "no connection to $name (see above); once there is one, run the same command again"
    else
        say "it failed with $code (see above)"
        finish "$((code == 95 || code == 96 ? 1 : code))"
    fi
done
