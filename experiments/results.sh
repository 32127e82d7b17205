#!/usr/bin/env bash
# The runs behind docs/RESULTS.md, one after another; those that are finished are left alone.
# Usage: FEDTALORA_DATA=... experiments/results.sh [FOLDER]
set -euo pipefail
results=$(realpath -m "${1:-$(dirname "$0")/../runs/results}")
cd "$(dirname "$0")/.."
play() {  # play NAME PRESET [KEY=VALUE ...]
    local out="$results/$1" preset=$2; shift 2
    [ -e "$out/metrics.json" ] && return
    if [ -e "$out/config.json" ]; then .venv/bin/fedtalora run --resume "$out"; return; fi
    .venv/bin/fedtalora run --preset "$preset" --out "$out" $(printf -- '--set %s ' "$@")
}
pooled="num-clients=1 partition=iid"
clinc() { play "clinc150-$1" clinc150 "${@:2}"; }
tiny() { play "tiny-imagenet-$1" tiny-imagenet "${@:2}"; }
clinc s0 seed=0 verify=true
clinc off-s0 seed=0 residual=off verify=true
clinc frozen seed=0 rounds-per-task=0
clinc pooled seed=0 $pooled
clinc joint seed=0 num-tasks=1 $pooled  # all data at once, the same passes over it
for seed in 1 2; do
    clinc s$seed seed=$seed
    clinc off-s$seed seed=$seed residual=off
    clinc frozen-s$seed seed=$seed rounds-per-task=0
done
tiny s0 seed=0 verify=true
tiny off-s0 seed=0 residual=off verify=true
tiny frozen seed=0 rounds-per-task=0
tiny pooled seed=0 $pooled
tiny joint seed=0 num-tasks=1 $pooled
for seed in 1 2; do
    tiny s$seed seed=$seed
    tiny off-s$seed seed=$seed residual=off
    tiny frozen-s$seed seed=$seed rounds-per-task=0
done
