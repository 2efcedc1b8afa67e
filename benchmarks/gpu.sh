#!/bin/sh
# All that needs a GPU, in about ten minutes: sh benchmarks/gpu.sh [FOLDER for what it prints]
# Needs requirements.txt and benchmarks/requirements.txt. A part that fails does not stop the rest.
out=${1:-${OUT:-runs/gpu}}
mkdir -p "$out"
part() {
    name=$1
    shift
    echo "$name: $*"
    timeout 300 "$@" >"$out/$name.txt" 2>&1 || echo "failed, status $?" >>"$out/$name.txt"
    tail -n 3 "$out/$name.txt"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/card.txt"
part tests python -m pytest -q
part step python benchmarks/throughput.py --image-size 224 --batch-size 32 --workers 2
part step-16-workers python benchmarks/throughput.py --image-size 224 --batch-size 32 --workers 16
part memory python benchmarks/throughput.py --memory --image-size 224 --batch-size 32
paper="--preset paper --weights none --digits sklearn --loss nce --epochs 1 --images-per-epoch 3200"
part paper python train.py $paper --views same --output "$out/paper"
part paper-compiled python train.py $paper --views same --compile --output "$out/paper-compiled"
part laptop python train.py --preset laptop --digits sklearn --loss dino --output "$out/laptop"
# 448 px, batch 32, different views, on a card of which 16 GB may be used
part 448-in-16-GB python -c "
import sys, torch, train
torch.cuda.set_per_process_memory_fraction(16e9 / torch.cuda.get_device_properties(0).total_memory)
sys.exit(train.main('$paper --views different --image-size 448 --checkpoint-blocks'.split()
                    + ['--output', '$out/448']))"
