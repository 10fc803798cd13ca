#!/usr/bin/env bash
# Submits one mae-jax job to Slurm.
#
# usage: launch/slurm.sh [--dry-run] [OPTION OF SBATCH ...] -- JOB [ARGUMENT ...]
#
#   launch/slurm.sh --nodes=4 --partition=gpu -- pretrain --config=configs/pretrain.py:vit_b16 --workdir=runs/vit_b16
#
#   --dry-run  print the command and do not run it
#
# What is asked for by default, and what happens at the time limit, is at the top of launch/slurm.sbatch. Submit from an
# environment that has mae-jax and from a folder that all nodes see: the job inherits both. All nodes have to see
# --workdir too.
set -euo pipefail

die() {
    echo "slurm.sh: $1" >&2
    exit 2
}

here=$(cd "$(dirname "$0")" && pwd)
dry='' options=()
while [[ ${1---} != -- ]]; do
    case $1 in
    -h | --help)
        sed -n '2,/^set/s/^# \{0,1\}//p' "$0"
        exit
        ;;
    --dry-run) dry=1 ;;
    -*) options+=("$1") ;;
    *) die "$1: options of sbatch are written --NAME=VALUE, and -- comes before JOB; see launch/slurm.sh --help" ;;
    esac
    shift
done
shift || die "-- JOB is missing; see launch/slurm.sh --help"
[[ ${1-} ]] || die "JOB is missing; see launch/slurm.sh --help"

command=(sbatch ${options[@]+"${options[@]}"} "$here/slurm.sbatch" "$@")
if [[ $dry ]]; then
    line=$(printf '%q ' "${command[@]}")
    echo "${line% }"
    exit
fi
for tool in sbatch mae-jax; do
    command -v "$tool" >/dev/null || die "$tool is missing; submit from a login node, with the environment active"
done
exec "${command[@]}"
