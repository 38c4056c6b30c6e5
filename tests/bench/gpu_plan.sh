#!/usr/bin/env bash
# All that a GPU is to show, in the order of its value, within twelve minutes: tests/bench/gpu_plan.sh FOLDER
# FOLDER has the logs and the JSON of the tables; what has been measured is there even if the machine is taken away.
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
    if ((seconds < 5)); then echo "== $name: no time left"; return; fi
    echo "== $name: at most $seconds s"
    timeout -k 5 $((seconds + 5)) "${@//@SECONDS@/$seconds}" 2>&1 | tee -a "$out/$name.log" | grep -v BatchedFallback | cut -c1-300 | tail -40
}

bench() { # bench SECONDS NAME ARGUMENTS...
    local seconds=$1 name=$2
    shift 2
    # shellcheck disable=SC2086  # options are words
    share "$seconds" "$name" "$python" tests/bench/bench_gpu.py "$@" --seconds @SECONDS@ --json "$out/gpu.json" $options
}

# What has never run: equal bits first.
share 20 probes "$python" -m pytest -q -p no:cacheprovider -n 0 -m gpu tests/test_gpu.py -k "probes or draws"
bench 60 products resnet18
bench 80 products nanogpt
share 90 tests "$python" -m pytest -q -p no:cacheprovider -n 0 -m gpu tests/test_gpu.py
bench 130 job --job gpt --cell 30
bench 160 job --job resnet18 --cell 30 --images "${IMAGES:-10000}"
bench 50 products vit
bench 50 products resnet50
bench 40 blocks --blocks 1,2,4,8,16 mlp resnet18
bench 30 precision nanogpt --precision high --ways "gradient;hessfn hvp;hessfn linearized_hvp;hessian-eigenthings"
bench 20 products mlp
ls -l "$out"
