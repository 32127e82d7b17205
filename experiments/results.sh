#!/usr/bin/env bash
# The runs behind docs/RESULTS.md, one after another; those that are finished are left alone.
# Usage: FEDTALORA_DATA=... experiments/results.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
results=${1:-runs/results}
play() {  # play NAME PRESET [KEY=VALUE ...]
    local out="$results/$1" preset=$2; shift 2
    [ -e "$out/metrics.json" ] && return
    rm -rf "$out"
    .venv/bin/fedtalora run --preset "$preset" --out "$out" $(printf -- '--set %s ' "$@")
}
pooled="num-clients=1 partition=iid threads=2"
for preset in clinc150 tiny-imagenet; do
    play "$preset-s0" $preset seed=0 verify=true
    play "$preset-frozen" $preset seed=0 rounds-per-task=0
    play "$preset-off-s0" $preset seed=0 residual=off verify=true
    play "$preset-pooled" $preset seed=0 $pooled
done
for seed in 1 2; do
    play "clinc150-s$seed" clinc150 seed=$seed
    play "clinc150-off-s$seed" clinc150 seed=$seed residual=off
done
for preset in clinc150 tiny-imagenet; do  # all data at once, the same passes over it
    play "$preset-joint" $preset seed=0 num-tasks=1 $pooled
done
for preset in clinc150 tiny-imagenet; do
    play "$preset-plain-ridge" $preset seed=0 ridge-features=0
    play "$preset-frozen-plain-ridge" $preset seed=0 ridge-features=0 rounds-per-task=0
done
