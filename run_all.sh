#!/usr/bin/env bash
# Every row of the README's table: full data and EL2N at half of it, back to back, one seed after the other.
# Override from the environment: DATASETS="snips" SEEDS="0" OUT=somewhere bash run_all.sh --lr 1e-4
set -euo pipefail
cd "$(dirname "$0")"

for seed in ${SEEDS:-0 1 2}; do
    for dataset in ${DATASETS:-snips atis}; do
        for method in ${METHODS:-full el2n}; do
            python train.py --dataset "$dataset" --method "$method" --keep "${KEEP:-0.5}" --seed "$seed" \
                --no-model --out "${OUT:-runs}" "$@"
        done
    done
done
