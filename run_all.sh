#!/usr/bin/env bash
# The README's table: full data and EL2N at half of it, back to back, one seed after the other.
# Override from the environment: DATASETS="snips" METHODS="full random" SEEDS="0" KEEP=0.2 OUT=elsewhere bash run_all.sh
# Further flags go to train.py: bash run_all.sh --lr 1e-4
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
python report.py "${OUT:-runs}/results.jsonl"
