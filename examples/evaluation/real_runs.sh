#!/usr/bin/env bash
# Runs the small evaluations on two cores, and makes their report. The same command goes on where it was stopped.
#
#     bash examples/evaluation/real_runs.sh [DIR]     # build/evaluation
#
# Every seed has all gates, so the runs that are finished when it is stopped can be compared.
#   cells    ResNet-18 at 48x48, 2,073 photographs of solar cells in four classes, 10 epochs
#   boxes    Faster R-CNN, ResNet-18-FPN at 96x96, 250 scenes of digits, 3 epochs
#   masks    Mask R-CNN with the same backbone and scenes, 3 epochs
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/evaluation}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
part() { "$python" "examples/evaluation/$1.py" "${@:2}"; }

[ -d "$out/data/cells/val" ] || part datasets cells "$out/data/cells"
[ -e "$out/data/digits/annotations/instances_val.json" ] || part datasets digits "$out/data/digits" --train 250 --val 40

for seed in 0 1 2; do
    for gate in "none" "steam" "se" "eca" "cbam" "gct"; do
        part classification --data "$out/data/cells" --model resnet18 --gate "$gate" --seed "$seed" \
            --out "$out/runs/cells/$gate-$seed" --epochs 10 --batch 64 --lr 0.05 --schedule cosine --warmup_epochs 1 \
            --train_size 48 --val_resize 54 --val_size 48 --weight_decay 0.0005
    done
    for gate in "none" "steam window=16" "se" "eca"; do
        read -r name variant <<<"$gate"
        for task in boxes masks; do
            if [ "$task" = boxes ]; then model=(fasterrcnn --rois 64); else model=(maskrcnn --rois 32); fi
            part detection --data "$out/data/digits" --model "${model[@]}" --out "$out/runs/$task/$name-$seed" --epochs 3 \
                --backbone resnet18 --gate "$name" --variant "$variant" --seed "$seed" --batch 8 --lr 0.01 \
                --schedule cosine --warmup_epochs 0.5 --min_size 96 --max_size 96 --flip 0 --detections 20
        done
    done
done
part report "$out/runs" --out "$out/report"
