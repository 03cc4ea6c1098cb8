#!/usr/bin/env bash
# All results: each block below is one kind of row in the table. What the results file has already is not run again.
#
#   bash run_all.sh                   all of it, one run after the other, then the report
#   bash run_all.sh --list            the commands alone, one a line: … | xargs -d '\n' -n 1 -P 4 bash -c
#   SMOKE=1 bash run_all.sh           a tiny pass through all of it, in minutes
#   PAPER=1 bash run_all.sh           the paper's setting: RoBERTa-base, 40 epochs (GLUE: 10), a constant rate, five seeds
#   DATASETS="snips" METHODS="full el2n" KEEPS="0.5" SEEDS="0" MODEL=roberta-base EPOCHS=40 OUT=elsewhere bash run_all.sh
#
# Any other flags go to every run: bash run_all.sh --lr 1e-4. Another number of epochs belongs into another OUT, as the
# report compares with full data for the most epochs. From 40 on, τ = T = 4, as in the paper.
set -euo pipefail
cd "$(dirname "$0")"

list=; if [ "${1:-}" = --list ]; then list=1; shift; fi
glue="cola mrpc rte sst2"
methods="full random el2n loss forgetting grand infobatch"
if [ "${SMOKE:-}" ]; then
    DATASETS=${DATASETS:-demo} SEEDS=${SEEDS:-0} KEEPS=${KEEPS:-0.5} EPOCHS=${EPOCHS:-4} OUT=${OUT:-runs/smoke}
    METHODS=${METHODS:-$methods}
    set -- --max-train 256 "$@"
elif [ "${PAPER:-}" ]; then
    DATASETS=${DATASETS:-snips atis slurp mtop $glue} SEEDS=${SEEDS:-0 1 2 3 4} OUT=${OUT:-runs/paper}
    MODEL=${MODEL:-roberta-base}
    set -- --lr 2e-5 --schedule constant --clip 0.03125 "$@"  # its loss is a batch's sum, ours the mean of 32
fi
out=${OUT:-runs}

# run FLAGS…: one run, or its command where they are listed. One that fails does not keep the others from running.
failed=0
run() {
    local command=(python train.py "$@" ${MODEL:+--model "$MODEL"} --no-model --resume auto --out "$out") status=0
    if [ "$list" ]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}" || status=$?
    if [ $status = 130 ] || [ $status = 143 ]; then exit $status; fi # interrupted
    if [ $status -ne 0 ]; then failed=$((failed + 1)); fi
}

# wanted METHOD: whether it is among those asked for.
METHODS=${METHODS:-full random el2n loss infobatch} KEEPS=${KEEPS:-0.5 0.3 0.2}
wanted() { [[ " $METHODS " == *" $1 "* ]]; }
for method in $METHODS; do
    if [[ " $methods " != *" $method "* ]]; then
        echo "run_all.sh: error: METHODS: $method is none of: $methods" >&2
        exit 2
    fi
done

# passes METHOD: the paper scores every example in every round.
passes() { if [ "${PAPER:-}" ] && [[ $1 == el2n || $1 == loss ]]; then echo --rescore all; fi; }

for seed in ${SEEDS:-0 1 2}; do
    for dataset in ${DATASETS:-snips atis cola slurp mtop mrpc rte sst2}; do
        epochs=${EPOCHS:-10} tau='' cycle='' smoothing=''
        if [ "${PAPER:-}" ]; then
            if [[ " $glue " == *" $dataset "* ]]; then
                smoothing="--ema 1 --std-weight 0" # scores of GLUE are not smoothed
            else
                epochs=${EPOCHS:-40} tau="--full-epochs 4" cycle="--cycle 4"
            fi
        fi
        if [ "$epochs" -ge 40 ]; then tau="--full-epochs 4" cycle="--cycle 4"; fi
        each() { run --dataset "$dataset" --seed "$seed" "$@"; }

        # Full data; and for fewer epochs, the baseline that costs what pruning does ("equal time"), also at twice the
        # default learning rate, as fewer steps may want longer ones. The report takes what is better on dev.
        if wanted full; then
            case "$* $dataset" in
                *--lr*) twice='' ;; # a rate for all
                *" snips" | *" atis" | *" slurp" | *" mtop" | *" demo") twice="--lr 4e-4" ;;
                *" cola" | *" mrpc" | *" rte" | *" sst2") twice="--lr 2e-4" ;;
                *) twice='' ;;
            esac
            each --method full --epochs "$epochs" "$@"
            for fewer in $(printf '%s\n' $((epochs * 7 / 10)) $((epochs / 2)) $((epochs * 4 / 10)) \
                $((epochs * 3 / 10)) | sort -nru); do
                if [ "$fewer" -eq 0 ]; then continue; fi
                each --method full --epochs "$fewer" "$@"
                if [ "$twice" ]; then each --method full --epochs "$fewer" $twice "$@"; fi
            done
        fi

        # Dynamic selection, at each share. Random draws anew every round; so does --draw every epoch, with chances by
        # score, which needs no scoring pass.
        for keep in $KEEPS; do
            for method in random el2n loss forgetting grand; do
                if wanted $method; then
                    each --method $method --keep "$keep" --epochs "$epochs" $tau $cycle $smoothing $(passes $method) "$@"
                fi
            done
            if wanted el2n; then each --method el2n --keep "$keep" --epochs "$epochs" $tau --draw "$@"; fi
        done

        # More time saved at the same share: half the data with fewer selections, a fifth in 6/10 of the epochs, rounded
        # up. Only where that is another run and prunes after two full epochs; the paper has a schedule of its own. And
        # a fifth from all ranges of scores, as the hardest are but errors where a model errs on more than a fifth.
        if wanted el2n && [ -z "${PAPER:-}" ] && [ -z "$tau" ]; then
            shorter=$(((epochs * 6 + 9) / 10))
            if [[ " $KEEPS " == *" 0.5 "* ]] && [ "$epochs" -gt 4 ]; then
                each --method el2n --keep 0.5 --epochs "$epochs" --cycle 4 "$@"
            fi
            if [[ " $KEEPS " == *" 0.2 "* ]]; then
                if [ $shorter -gt 2 ]; then each --method el2n --keep 0.2 --epochs $shorter "$@"; fi
                each --method el2n --keep 0.2 --epochs "$epochs" --stratify "$@"
            fi
        fi

        # Static selection: scored once, then trained from the start on what is kept.
        for keep in $KEEPS; do
            if wanted random; then
                each --method random --selection static --keep "$keep" --epochs "$epochs" "$@"
            fi
            if wanted el2n; then
                each --method el2n --selection static --keep "$keep" --epochs "$epochs" $tau $cycle $smoothing "$@"
            fi
        done

        # InfoBatch: drops half of those below the mean loss, at random, every epoch.
        if wanted infobatch; then
            each --method infobatch --epochs "$epochs" "$@"
        fi
    done
done

if [ "$list" ]; then exit; fi
status=0
python report.py "$out/results.jsonl" --to "$out/report" || status=$?
if [ $failed -gt 0 ]; then
    echo "run_all.sh: $failed run(s) failed, see above; start it again to repeat them" >&2
    status=1
fi
exit $status
