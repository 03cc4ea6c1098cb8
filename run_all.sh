#!/usr/bin/env bash
# Make all results: each block below is one part of the table. A finished run is not made again, a stopped one goes on.
#
#   bash run_all.sh                  all runs, one after the other, then the report
#   bash run_all.sh --list           the commands only, one a line: … --list | xargs -d '\n' -n 1 -P 4 bash -c
#   SMOKE=1 bash run_all.sh          every block on 128 samples of demo, in minutes
#   PAPER=1 bash run_all.sh          the paper's setting: RoBERTa-base, 40 epochs (GLUE: 10), constant rate, five seeds
#   DATASETS="atis snips" SEEDS=0 MODEL=roberta-base OUT=runs/mine bash run_all.sh --batch-size 16
#
# Flags at the end go to every run.
set -euo pipefail
cd "$(dirname "$0")"

list=; if [ "${1:-}" = --list ]; then list=1; shift; fi
out=${OUT:-runs/all} seeds=${SEEDS:-0 1 2} datasets=${DATASETS:-atis snips slurp mtop cola mrpc rte} E=10
if [ "${SMOKE:-}" ]; then
    out=${OUT:-runs/smoke} seeds=${SEEDS:-0} datasets=${DATASETS:-demo} E=5
    set -- --max-train 128 --batch-size 16 "$@"
elif [ "${PAPER:-}" ]; then
    out=${OUT:-runs/paper} seeds=${SEEDS:-0 1 2 3 4} MODEL=${MODEL:-roberta-base}
    set -- --lr 2e-5 --schedule constant --clip 0.03125 "$@" # the paper clips a batch's sum of losses, we its mean of 32
fi

failed=0
run() { # run FLAGS…: one run. A failure does not keep the next run from starting.
    local command=(python train.py --dataset "$dataset" --seed "$seed" "$@" ${MODEL:+--model "$MODEL"} --no-model --resume
        --out "$out") status=0
    if [ "$list" ]; then printf '%q ' "${command[@]}"; echo; return; fi
    "${command[@]}" || status=$?
    if [ $status = 130 ] || [ $status = 143 ]; then exit $status; fi # interrupted
    if [ $status -ne 0 ]; then failed=$((failed + 1)); fi
}

for seed in $seeds; do
    for dataset in $datasets; do
        epochs=$E tau= cycle= smoothing= rate=4e-4
        case $dataset in cola | mrpc | rte | wnli | sst2 | qnli | qqp | mnli) rate=2e-4 ;; esac
        if [ "${PAPER:-}" ] && [ $rate = 2e-4 ]; then smoothing="--ema 1"; fi # the paper does not smooth GLUE's scores
        if [ "${PAPER:-}" ] && [ $rate = 4e-4 ]; then epochs=40 tau="--full-epochs 4" cycle="--cycle 4"; fi

        # Full data, and the equal-time baseline: full data for fewer epochs, also at twice the learning rate.
        run --method full --epochs $epochs "$@"
        for fewer in $((epochs * 7 / 10)) $((epochs / 2)) $((epochs * 3 / 10)); do
            run --method full --epochs $fewer "$@"
            if [[ " $* " != *" --lr "* ]]; then run --method full --epochs $fewer --lr $rate "$@"; fi
        done

        for keep in 0.5 0.3 0.2; do
            # The paper's method: the highest EL2N, scored anew every T epochs.
            run --keep $keep --epochs $epochs $tau $cycle $smoothing "$@"
            # Our variant: drawn in proportion to EL2N, anew every epoch, without a scoring pass.
            run --keep $keep --epochs $epochs $tau --sample "$@"
            # The control: a random selection of the same size.
            run --method random --keep $keep --epochs $epochs $tau $cycle "$@"
        done

        # InfoBatch: drops half of the samples below the mean loss, at random, every epoch.
        run --method infobatch --epochs $epochs "$@"

        # Ablations, on two datasets: other scores, other rules, and one selection for good.
        case $dataset in atis | snips | demo) ;; *) continue ;; esac
        for keep in 0.5 0.2; do
            for method in loss forgetting grand; do
                run --method $method --keep $keep --epochs $epochs $tau $cycle "$@"
            done
            run --keep $keep --stratify --epochs $epochs $tau $cycle "$@"
            run --keep $keep --selection static --epochs $epochs $tau "$@"
            run --method random --keep $keep --selection static --epochs $epochs "$@"
        done
    done
done

if [ "$list" ]; then exit; fi
python report.py "$out" --to "$out/report"
if [ $failed -gt 0 ]; then
    echo "run_all.sh: $failed run(s) failed, see above; start it again to repeat them" >&2
    exit 1
fi
