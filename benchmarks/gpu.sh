#!/bin/sh
# Run everything that needs a GPU: the tests, the benchmarks and four short trainings.
#
#     sh benchmarks/gpu.sh [FOLDER]
#
# It takes about ten minutes, and needs requirements.txt and benchmarks/requirements.txt. The output
# of each part is written to a file in FOLDER (by default $OUT if it is set, else runs/gpu). A part
# that fails, or takes longer than five minutes, does not stop the others.
out=${1:-${OUT:-runs/gpu}}
mkdir -p "$out"

# run NAME COMMAND...: run the command, write its output to NAME.txt, and print the last lines of it.
run() {
    name=$1
    shift
    echo "$name: $*"
    timeout 300 "$@" >"$out/$name.txt" 2>&1 || echo "failed with status $?" >>"$out/$name.txt"
    tail -n 3 "$out/$name.txt"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/card.txt"

run tests python -m pytest -q

# speed and memory of a training step, beside timm and lightly
step="benchmarks/throughput.py --image-size 224 --batch-size 32"
run step python $step --workers 2
run step-16-workers python $step --workers 16
run memory python $step --memory

# one epoch of 100 steps with the paper's network, as it comes and compiled
paper="--preset paper --weights none --digits sklearn --loss nce --epochs 1 --images-per-epoch 3200"
run paper python train.py $paper --views same --output "$out/paper"
run paper-compiled python train.py $paper --views same --compile --output "$out/paper-compiled"

# a whole run of the laptop preset
run laptop python train.py --preset laptop --digits sklearn --loss dino --output "$out/laptop"

# different views at 448 px and batch 32, with no more than 16 GB of the card's memory
limit_memory_and_train="
import sys, torch, train
total_memory = torch.cuda.get_device_properties(0).total_memory
torch.cuda.set_per_process_memory_fraction(16e9 / total_memory)
sys.exit(train.main(sys.argv[1:]))
"
run 448-in-16-GB python -c "$limit_memory_and_train" $paper --views different \
    --image-size 448 --checkpoint-blocks --output "$out/448"
