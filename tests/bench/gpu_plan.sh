#!/usr/bin/env bash
# All that a GPU is to show, in the order of its value, within twelve minutes: tests/bench/gpu_plan.sh FOLDER
# FOLDER has a log and a JSON file of each step; what has been measured is there even if the machine is taken away.
# PYTHON is the interpreter (python3); a folder of the peers goes into PYTHONPATH, one of CIFAR's images into HESSFN_DATA.
# SECONDS_FOR_ALL=60 OPTIONS="--scale tiny --device cpu --products 12" IMAGES=4 tries the script on a CPU.
set -u
cd "$(dirname "$0")/../.."
out=${1:?a folder for the results}
mkdir -p "$out"
python=${PYTHON:-python3}
options=${OPTIONS:-}
end=$((SECONDS + ${SECONDS_FOR_ALL:-720}))
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

# share SECONDS NAME COMMAND...: at most so long, and never longer than what is left of the whole.
share() {
    local left=$((end - SECONDS)) seconds=$1 name=$2
    shift 2
    seconds=$((seconds < left ? seconds : left))
    if ((seconds < 20)); then
        echo "== $name: no time left"
        return
    fi
    echo "== $name: at most $seconds s"
    # A script begins to count when its imports are done: ten seconds are theirs.
    timeout -k 5 "$seconds" "${@//@SECONDS@/$((seconds - 10))}" >>"$out/$name.log" 2>&1
    echo "== $name: exit status $?" | tee -a "$out/$name.log"
    grep -v BatchedFallback "$out/$name.log" | cut -c1-250 | tail -60
}

bench() { # bench SECONDS NAME ARGUMENTS...
    local seconds=$1 name=$2
    shift 2
    # shellcheck disable=SC2086  # options are words
    share "$seconds" "$name" "$python" tests/bench/bench_gpu.py "$@" --seconds @SECONDS@ --json "$out/$name.json" $options
}

compiled="gradient;hessfn linearized_hvp;hessfn linearized_hvp, compiled;hessfn linearized_hvp, reduce-overhead"
tf32="gradient;hessfn hvp;hessfn linearized_hvp;hessian-eigenthings"
images=${IMAGES:-2000}

# What has never run comes first, and in it the bits of the probes.
share 100 tests "$python" -m pytest -q -p no:cacheprovider -n 0 -m gpu tests/test_gpu.py
bench 190 products resnet18 nanogpt vit resnet50 --no-compile
bench 160 job_gpt gpt --job --cell 30 --products 60
# A product takes as long as the images it is of: numbers and errors are of 2000, the seconds of a product also of 10,000.
bench 140 job_resnet18 resnet18 --job --cell 30 --products 60 --images "$images"
bench 45 blocks mlp resnet18 nanogpt --blocks 1,2,4,8,16
bench 45 job_product resnet18 --job --products 0 --images "$((5 * images))"
bench 90 compiled resnet18 nanogpt --cell 45 --ways "$compiled"
bench 40 tf32 nanogpt --precision high --ways "$tf32"
bench 25 mlp mlp --no-compile
ls -l "$out"
