#!/usr/bin/env bash
# Make the main results: each `arm …` is one line of the tables. Finished runs are skipped. Stopped runs go on.
#   bash run_all.sh                  all runs, one after the other, then the report
#   bash run_all.sh --list           the commands only, one a line: … --list | xargs -d '\n' -n 1 -P 4 bash -c
#   SMOKE=1 bash run_all.sh          every arm on 128 samples of demo, in minutes
#   PAPER=1 bash run_all.sh          the paper's setting: RoBERTa-base, 40 epochs (GLUE: 10), constant rate, 5 seeds
#   DATASETS="atis snips" SEEDS=0 RATES=3e-5 MODEL=roberta-base OUT=runs/mine bash run_all.sh --batch-size 16
#
# Flags at the end go to every run. The first seed tries two learning rates. The others take the better one: on dev, or
# on a tenth of train for GLUE and your own data. --list lists the other seeds once the first has finished.
set -euo pipefail
cd "$(dirname "$0")"
list=; if [ "${1:-}" = --list ]; then list=1; shift; fi
case ${1:--} in -*) ;; *) echo "run_all.sh: $1 is no flag; name datasets in DATASETS" >&2; exit 2 ;; esac
for flag in "$@"; do
    case $flag in --batch-size* | --max-* | --clip* | --precision* | --device* | --data-dir* | --save-every*) ;;
    -*) echo "run_all.sh: $flag cannot go to every run; leave it out, or set a variable as above in this file" >&2
        exit 2 ;; esac
done
out=${OUT:-runs/all${MODEL:+-$(basename "$MODEL")}} seeds=${SEEDS:-0 1 2} E=10
datasets=${DATASETS:-atis snips slurp mtop cola mrpc rte}
if [ "${SMOKE:-}" ]; then
    out=${OUT:-runs/smoke} datasets=${DATASETS:-demo} seeds=${SEEDS:-0} RATES=${RATES:-2e-4} E=5 PAPER=
    set -- --max-train 128 --batch-size 16 "$@"
elif [ "${PAPER:-}" ]; then
    out=${OUT:-runs/paper} seeds=${SEEDS:-0 1 2 3 4} MODEL=${MODEL:-roberta-base} RATES=${RATES:-2e-5}
fi
out=${out%/} seeds=$(echo $seeds) RATES=$(echo ${RATES:-}) always=(--no-model --resume "$@") failed=0

run() { # run FLAGS…: one run. A failure does not keep the next run from starting.
    local command=(python train.py --dataset "$dataset" $paper "$@" ${MODEL:+--model "$MODEL"} "${always[@]}") status=0
    if [ "$list" ]; then printf '%q ' "${command[@]}"; echo; return; fi
    "${command[@]}" || status=$?
    case $status in 0) ;; 130 | 143) exit $status ;; *) failed=$((failed + 1)) ;; esac # 130, 143: interrupted
}

arm() { # arm NAME FLAGS…: the runs of one arm.
    local folder=$out/${dataset##*/}-$1 trials=$out/${dataset##*/}-$1 tune= rate best=$rates first=${seeds%% *} tried=
    shift
    if [ "$held_out" ]; then trials=$out-tune/${folder##*/} tune=--tune; fi
    if [[ $rates == *" "* ]]; then
        for rate in $rates; do run "$@" --seed "$first" --lr "$rate" $tune --out "$trials"; done
        [ -d "$trials" ] || return 0
        best=$(python -c 'import sys, compare; print(compare.best_rate(*sys.argv[1:]) or "")' "$trials" "$first" $rates)
        if [ ! "$best" ]; then return; fi # a trial has failed, or is only listed
        [ "$tune" ] || tried=$first
    fi
    for seed in $seeds; do [ "$seed" = "$tried" ] || run "$@" --seed "$seed" --lr "$best" --out "$folder"; done
}

for dataset in $datasets; do
    dataset=${dataset%/} epochs=$E tau= cycle= held_out= paper=${PAPER:+--schedule constant} rates=${RATES:-2e-4 4e-4}
    case $dataset in cola | mrpc | rte | wnli | sst2 | qnli | qqp | mnli) held_out=glue rates=${RATES:-1e-4 2e-4} ;;
    *) if [ -d "$dataset" ]; then
            held_out=own # and without words and tags (has_tags in data/readers.py) it is classification, too
            [ -d "$dataset/train" ] || grep -qs '"words"' "$dataset/train.jsonl" || rates=${RATES:-1e-4 2e-4}
        fi ;;
    esac
    if [ "${PAPER:-}" ] && [ "$held_out" != glue ]; then # the paper clips the sum of a batch's losses, we their mean
        epochs=40 tau="--full-epochs 4" cycle="--cycle 4" paper="$paper --clip 0.03125"
    fi

    for fewer in $(for tenths in 10 7 6 5 4 3; do echo $((epochs * tenths / 10)); done | uniq); do
        arm full-$fewer --method full --epochs $fewer # full data, and the equal-time baseline: fewer epochs
        if [ "${PAPER:-}" ]; then arm full-linear-$fewer --method full --epochs $fewer --schedule linear; fi
    done
    for keep in 0.5 0.2; do
        arm highest-$keep --keep $keep --epochs $epochs $tau $cycle  # the paper's method
        arm random-$keep --method random --keep $keep --epochs $epochs $tau $cycle  # its control
        arm random-anew-$keep --method random --keep $keep --epochs $epochs $tau --cycle 1  # the control of sampling
    done
    for keep in 0.5 0.3 0.2; do # ours: drawn in proportion to EL2N, anew every epoch, without a scoring pass
        arm sampled-$keep --sample --keep $keep --epochs $epochs $tau
    done
    arm infobatch --method infobatch --epochs $epochs
    # Ablations, on two datasets: other scores, other rules, and one selection for good.
    case $dataset in atis | snips | demo) ;; *) continue ;; esac
    for keep in 0.5 0.2; do
        for method in loss forgetting grand; do
            arm $method-$keep --method $method --keep $keep --epochs $epochs $tau $cycle
        done
        arm stratified-$keep --stratify --keep $keep --epochs $epochs $tau $cycle
        arm static-$keep --selection static --keep $keep --epochs $epochs $tau
    done
done

if [ "$list" ]; then exit; fi
python report.py "$out" --to "$out/report" || failed=$((failed + 1))
[ $failed = 0 ] || { echo "run_all.sh: $failed failure(s), see above; start it again to repeat them" >&2; exit 1; }
