#!/usr/bin/env bash
# Runs the small evaluations on two cores, and makes their report. The same command goes on where it was stopped.
#
#     bash examples/evaluation/real_runs.sh [DIR]     # build/evaluation
#
# The minutes are estimates from FLOPs, at 50 GFLOP/s on two cores; a step computes three times a forward pass.
#   ResNet-18 at 64x64: 0.3 GFLOPs an image forward, 2,100 images, 20 epochs: 13 minutes, and the loading of images
#   Faster R-CNN, ResNet-18-FPN at 128x128: 6 GFLOPs, 800 images, 6 epochs: 30 minutes
#   Mask R-CNN, the same with 32 regions: 13 GFLOPs, 400 images, 5 epochs: 27 minutes, and 5 for validation
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${1:-build/evaluation}
python=${PYTHON:-.venv/bin/python}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2}
part() { "$python" "examples/evaluation/$1.py" "${@:2}"; }

[ -d "$out/data/cells/val" ] || part datasets cells "$out/data/cells"
[ -e "$out/data/digits/annotations/instances_val.json" ] || part datasets digits "$out/data/digits" --train 800 --val 60
[ -e "$out/data/few_digits/annotations/instances_val.json" ] ||
    part datasets digits "$out/data/few_digits" --train 400 --val 60 --seed 1

gates=("none" "se" "eca" "cbam" "gct" "steam" "steam order=parallel" "steam placement=blocks")
for seed in 0 1 2; do
    for gate in "${gates[@]}"; do
        read -r name variant <<<"$gate"
        part classification --data "$out/data/cells" --model resnet18 --gate "$name" --variant "$variant" --seed "$seed" \
            --out "$out/runs/cells/$name${variant:+-$variant}-$seed" --epochs 20 --batch 64 --lr 0.05 --schedule cosine \
            --warmup_epochs 1 --train_size 64 --val_resize 72 --val_size 64 --weight_decay 0.0005
    done
done
for seed in 0 1 2; do
    for gate in "none" "se" "eca" "steam window=16"; do
        read -r name variant <<<"$gate"
        common=(--backbone resnet18 --gate "$name" --variant "$variant" --seed "$seed" --batch 8 --lr 0.01 --schedule cosine
            --warmup_epochs 0.5 --min_size 128 --max_size 128 --flip 0 --detections 20)
        run=$name${variant:+-$variant}-$seed
        part detection --data "$out/data/digits" --model fasterrcnn --out "$out/runs/boxes/$run" --epochs 6 --rois 64 \
            "${common[@]}"
        part detection --data "$out/data/few_digits" --model maskrcnn --out "$out/runs/masks/$run" --epochs 5 --rois 32 \
            "${common[@]}"
    done
done
part report "$out/runs" --out "$out/report"
