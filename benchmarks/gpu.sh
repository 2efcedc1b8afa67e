#!/bin/sh
# Run everything that needs a GPU, in at most nine minutes: tests, speed, large images, depth.
#
#     sh benchmarks/gpu.sh [FOLDER [DATA_ROOT]]
#
# It needs requirements-dev.txt and benchmarks/requirements.txt. Each part writes JSON into FOLDER
# (by default $OUT if it is set, else runs/gpu) as soon as it knows anything. A part that fails or
# takes too long does not stop the others. DATA_ROOT is the folder of MNIST/raw [data].
out=${1:-${OUT:-runs/gpu}}
data_root=${2:-data}
mkdir -p "$out"

# run PART SECONDS: run a part, stop it after SECONDS, and print the end of its output
run() {
    echo "$1, at most $2 s"
    timeout -k 5 "$2" python benchmarks/gpu.py "$1" "$out" --seconds "$(($2 - 10))" \
        --data-root "$data_root" >"$out/$1.txt" 2>&1 || echo "ended with status $?" >>"$out/$1.txt"
    tail -n 2 "$out/$1.txt"
}

nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv | tee "$out/card.txt"
run tests 110
run step 150
run large 40
run depth 230
