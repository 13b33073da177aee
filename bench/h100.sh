#!/usr/bin/env bash
# Everything that takes a GPU, in one command of under nine minutes: see usage() below.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

usage() {
    cat <<'TEXT'
usage: bench/h100.sh [PART ...] [--wheels DIR] [--out DIR] [--minutes N] [--python PATH] [--tiny] [--dry-run]

parts, in this order (default: all of them)
  tests     the tests marked gpu
  kernels   python -m bench kernels, against every peer that is installed
  lora      the same of adapted linears and of an adapted layer of Llama, with and without adapters, and what these cost
  fp8       the same of linears by 8-bit products, for weights that train and frozen ones, and what they gain
  e2e       python -m bench e2e, the most telling runs first, as many as there is time for
  table     one table of all rows, OUT/summary.md, and a picture of the trainings, OUT/e2e.png
all shares the time among them, and takes fewer sizes of the kernels; a part given alone has all of it. A part that is done
stands in OUT/done and is skipped the next time. A part that fails or runs out of time leaves its rows so far, and the next
one runs.

  --wheels DIR   peers as wheels, installed without their dependencies and without a registry into build/h100; each that
                 does not install is said. DIR may also hold documents.json (see bench/wheels.sh) and
                 libtransformer_engine-sm90.zip, the pruned core library of Transformer Engine.
  --out DIR      where rows and table go (default: $OUT, or out)
  --minutes N    for everything (default 9)
  --python PATH  (default python3)
  --tiny         seconds instead of minutes, on any machine: to see that it works
  --dry-run      print the commands and run none

examples
  bench/h100.sh --wheels wheels
  bench/h100.sh e2e --wheels wheels --minutes 9
  bench/h100.sh --tiny --out out/tiny
TEXT
}

refuse() {
    echo "bench/h100.sh: $1; see bench/h100.sh --help" >&2
    exit 2
}

wheels="" out="${OUT:-out}" minutes=9 python=python3 tiny="" dry="" parts=()
while (($#)); do
    case $1 in
        --wheels | --out | --minutes | --python)
            (($# > 1)) || refuse "$1 takes a value"
            declare "${1#--}=$2"
            shift
            ;;
        --tiny) tiny=yes ;;
        --dry-run) dry=yes ;;
        -h | --help) usage && exit 0 ;;
        all) parts+=(tests kernels lora fp8 e2e table) ;;
        tests | kernels | lora | fp8 | e2e | table) parts+=("$1") ;;
        *) refuse "unknown argument $1" ;;
    esac
    shift
done
((${#parts[@]})) || parts=(tests kernels lora fp8 e2e table)
[[ $minutes =~ ^[1-9][0-9]*$ ]] || refuse "--minutes $minutes is no whole number above 0"
[[ -z $wheels || -d $wheels ]] || refuse "--wheels $wheels: no such folder"

site=build/h100
end=$((SECONDS + minutes * 60 - 15)) # the rest for what comes after a part was ended
failed=0
export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

# run SECONDS COMMAND...: the command under a limit, its output on the screen and in OUT/log.txt
run() {
    local limit=$1
    shift
    if [[ $dry ]]; then
        echo "timeout $limit $*"
        return 0
    fi
    echo "+ $*" | tee -a "$out/log.txt"
    # TERM first, so that a benchmark can end the process that it measures
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee -a "$out/log.txt"
    local code=$?
    ((code != 124 && code != 137)) || echo "bench/h100.sh: ended after $limit s: $*" | tee -a "$out/log.txt"
    return $code
}

# seconds_for SHARE: a percentage of the whole time, or all that is left where one part was asked for
seconds_for() {
    local left=$((end - SECONDS)) share=$((minutes * 60 * $1 / 100))
    ((${#parts[@]} > 2 && share < left)) && left=$share
    echo $((left > 1 ? left : 1))
}

install_peers() {
    [[ $wheels && ! $dry ]] || return 0
    local wheel name
    mkdir -p "$site"
    for wheel in "$wheels"/*.whl; do
        name=$(basename "$wheel" .whl)
        [[ -e $wheel && ! -e $site/.$name ]] || continue
        if "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile --no-cache-dir \
            --upgrade --target "$site" "$wheel" >>"$out/log.txt" 2>&1; then
            touch "$site/.$name"
        else
            echo "not installed: $name: $(grep -v '^$' "$out/log.txt" | tail -n 1)"
        fi
    done
    if [[ -e $wheels/libtransformer_engine-sm90.zip && -d $site/transformer_engine ]]; then
        "$python" -m zipfile -e "$wheels/libtransformer_engine-sm90.zip" "$site/transformer_engine" &&
            mkdir -p "$site/transformer_engine/wheel_lib" &&
            mv -f "$site/transformer_engine/lte90.so" "$site/transformer_engine/wheel_lib/libtransformer_engine.so" ||
            echo "not installed: the core library of Transformer Engine."
    fi
}

tests() {
    local what=()
    [[ $tiny ]] && what=(tests/ops/test_cross_entropy.py)
    run "$(seconds_for 18)" "$python" -m pytest -m gpu -p no:cacheprovider --durations=5 ${what[@]+"${what[@]}"}
    local code=$?
    ((code == 5)) && code=0 # no test has the marker
    return $code
}

# the suite of the kernels with its rows in a folder of its own, so that bench/results stays as it is
into='import pathlib, sys; from bench import __main__, rows; rows.RESULTS = pathlib.Path(sys.argv[1]); '
into+='sys.exit(__main__.main(sys.argv[2:]))'
first=linear_cross_entropy,rms_norm,gated_linear,rope,add_rms_norm,attention,cross_entropy,layer_norm,activation

# measured SHARE ARGUMENTS...: one run of the suite, whose rows are added to OUT/kernels.jsonl
measured() {
    local share=$1 code
    shift
    run "$(seconds_for "$share")" "$python" -c "$into" "$out/kernels" kernels "$@"
    code=$?
    if [[ -d $out/kernels ]]; then
        cat "$out"/kernels/*.jsonl >>"$out/kernels.jsonl" && rm -r "$out/kernels"
    fi
    return $code
}

kernels() {
    local what=()
    # where the time is shared: the operations that matter most first, at one number of tokens
    ((${#parts[@]} > 2)) && what=(--op "$first" --tokens 8192 --seconds 1)
    [[ $tiny ]] && what=(--quick --op rms_norm --peers torch --repetitions 1 --seconds 0.1)
    measured 20 ${what[@]+"${what[@]}"}
}

lora() {
    local what=(--op "lora_layer,lora" --models "Llama-3-8B,Llama-3.2-1B" --tokens 8192)
    [[ $tiny ]] && what=(--quick --op lora --peers peft --repetitions 1 --seconds 0.1)
    measured 12 "${what[@]}"
}

fp8() {
    local what=(--op fp8 --models "Llama-3-8B,Llama-3.2-1B" --tokens "8192,2048,32768")
    ((${#parts[@]} > 2)) && what=(--op fp8 --models Llama-3-8B --tokens 8192 --seconds 1)
    [[ $tiny ]] && what=(--quick --op fp8 --peers torchao --repetitions 1 --seconds 0.1)
    measured 12 "${what[@]}"
}

# e2e_run ARGUMENTS...: one benchmark in what is left of the part's time
e2e_run() {
    local left=$((e2e_end - SECONDS)) documents=()
    ((left > 20)) || return 0
    [[ $wheels && -e $wheels/documents.json ]] && documents=(--documents "$wheels/documents.json")
    run "$left" "$python" -m bench e2e "$@" ${documents[@]+"${documents[@]}"} \
        --out "$out" --seconds $((left - 10)) || e2e_failed=1
}

e2e() {
    local e2e_end=$((SECONDS + $(seconds_for 33))) e2e_failed=0
    local small="--models Llama-3.2-1B --repetitions 1" large="--models Llama-3-8B --rows 2 --repetitions 1"
    local ours="ours ours:recompute=selective" fp8="ours:fp8=auto"
    # the flags are words without spaces
    # shellcheck disable=SC2086
    if [[ $tiny ]]; then
        e2e_run --tiny
    else
        e2e_run $small --methods full --layouts packed --variants vanilla liger $ours
        e2e_run $large --methods lora --layouts packed --variants vanilla liger unsloth $ours $fp8
        e2e_run $small --methods full --layouts padded --variants vanilla liger $ours
        e2e_run $small --methods lora --layouts packed --variants vanilla liger unsloth $ours
        e2e_run $large --methods full --layouts packed --layers 16 --variants vanilla liger $ours $fp8
        e2e_run $small --methods full --layouts packed --variants vanilla compile nemo ours
    fi
    return $e2e_failed
}

table() {
    run 25 "$python" -m bench.e2e.summary "$out"
}

if [[ ! $dry ]]; then
    mkdir -p "$out"
    touch "$out/done"
fi
install_peers
for part in "${parts[@]}"; do
    if [[ $part != table && -e $out/done ]] && grep -qx "$part" "$out/done"; then
        echo "$part: done before; delete its line in $out/done to run it again"
        continue
    fi
    if "$part"; then
        [[ $dry ]] || echo "$part" >>"$out/done"
    else
        echo "$part: failed"
        failed=1
    fi
done
exit $failed
