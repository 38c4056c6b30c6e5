#!/usr/bin/env bash
# All that a GPU is to show, in the order of its value, within ten minutes: tests/bench/gpu_plan.sh FOLDER [STEP ...]
# Steps: tests products gpt resnet18 blocks images compiled tf32 mlp (all; what there is no time for is said).
# FOLDER gets plan.log and four JSON files, a cell at a time: what has been measured is there if the machine is taken away.
# PYTHON is the interpreter (python3). Packages of the peers are taken from .peers, CIFAR's images from .data, where these
# folders are in the checkout; otherwise from PYTHONPATH and HESSFN_DATA.
# SECONDS_FOR_ALL=400 OPTIONS="--scale tiny --device cpu --products 12" IMAGES=4 tries the script on a CPU.
set -u
cd "$(dirname "$0")/../.."
out=$(realpath -m "${1:?a folder for the results}")
shift
steps=" $* "
mkdir -p "$out"
python=${PYTHON:-python3}
options=${OPTIONS:-}
end=$((SECONDS + ${SECONDS_FOR_ALL:-570}))
[[ -d .peers ]] && PYTHONPATH="$PWD/.peers${PYTHONPATH:+:$PYTHONPATH}"
[[ -d .data ]] && export HESSFN_DATA="$PWD/.data"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# step NAME SECONDS COMMAND...: at most so long, and never longer than what is left of the whole.
step() {
    local name=$1 left=$((end - SECONDS)) seconds=$2 printed
    shift 2
    [[ $steps == "  " || $steps == *" $name "* ]] || return 0
    seconds=$((seconds < left ? seconds : left))
    if ((seconds < 20)); then
        echo "== $name: no time left" | tee -a "$out/plan.log"
        return
    fi
    echo "== $name: at most $seconds s" | tee -a "$out/plan.log"
    printed=$(mktemp)
    # A script begins to count when its imports are done: ten seconds are theirs.
    timeout -k 5 "$seconds" "${@//@SECONDS@/$((seconds - 10))}" >"$printed" 2>&1
    echo "== $name: exit status $?" >>"$printed"
    grep -v BatchedFallback "$printed" | tee -a "$out/plan.log" | cut -c1-250 | tail -60
    rm "$printed"
}

bench() { # bench NAME SECONDS FILE ARGUMENTS...
    local name=$1 seconds=$2 file=$3
    shift 3
    # shellcheck disable=SC2086  # options are words
    step "$name" "$seconds" "$python" tests/bench/bench_gpu.py "$@" --seconds @SECONDS@ --json "$out/$file.json" $options
}

compiled="gradient;hessfn linearized_hvp;hessfn linearized_hvp, compiled;hessfn linearized_hvp, reduce-overhead"
tf32="gradient;hessfn hvp;hessfn linearized_hvp;hessian-eigenthings"
images=${IMAGES:-1000}

# What has never run comes first, and in it the bits of the probes.
step tests 100 "$python" -m pytest -q -p no:cacheprovider -n 0 -m gpu tests/test_gpu.py
bench products 180 products resnet18 nanogpt vit resnet50 --no-compile
bench gpt 160 jobs gpt --job --cell 30 --products 40
# A product takes as long as the images it is of: numbers and errors are of 1000, the seconds of a product also of 10,000.
bench resnet18 140 jobs resnet18 --job --cell 30 --products 40 --images "$images"
bench blocks 45 blocks mlp resnet18 nanogpt --blocks 1,2,4,8,16
bench images 45 jobs resnet18 --job --products 0 --images "$((10 * images))"
bench compiled 90 compiled resnet18 nanogpt --cell 45 --ways "$compiled"
bench tf32 40 compiled nanogpt --precision high --ways "$tf32"
bench mlp 25 products mlp --no-compile
ls -l "$out"
