#!/bin/sh
# Make an environment hold what lock files pin, and nothing else, the hash of every file checked:
# install.sh BIN LOCK..., where BIN is the environment's folder of commands. TORCH=cpu and
# TORCH=cuda choose the build of torch; without, it is the one that suits the machine.
set -eu

bin=$1
shift
here=$(dirname "$0")
. "$here/uv.sh"
# Once, and here: where Python may not write, as in an image, every process would compile anew.
export UV_COMPILE_BYTECODE=1

pin() { sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$here/$1.lock"; }
found() { uv install --quiet --dry-run --no-deps "$@" "$(pin cpu)" 2>/dev/null; }

build=${TORCH:-cpu}
if [ -z "${TORCH:-}" ] && nvidia-smi -L >/dev/null 2>&1; then build=cuda; fi
if [ "$build" = cpu ] && [ "$(uname -s)" = Linux ] && ! found --no-index; then
    # No folder that pip looks at holds it, so it comes from PyTorch's own index.
    if UV_HTTP_RETRIES=0 found --torch-backend cpu; then
        set -- --torch-backend cpu "$@"
    elif [ -z "${TORCH:-}" ]; then
        echo "No CPU build of torch is within reach; its CUDA build runs without a GPU too."
        build=cuda
    else
        echo "install.sh: TORCH is cpu, and neither a folder that pip looks at nor PyTorch's index" \
            "of CPU builds is within reach. TORCH=cuda runs without a GPU too." >&2
        exit 1
    fi
fi

# `===` means this version as it is written, so no build with a label such as +cpu behind it.
torch=$(pin run | sed 's/==/===/')
takes="0.5 GB to download, 2 GB on disk, about 2 minutes"
case "$build-$(uname -s)" in
cpu-Linux)
    torch=$(pin cpu)
    set -- "$@" "$here/cpu.lock"
    ;;
cpu-*) ;;
cuda-*)
    set -- "$@" "$here/cuda.lock"
    takes="3 GB to download, 6 GB on disk, about 4 minutes"
    ;;
*)
    echo "install.sh: TORCH is '$TORCH'; it has to be cpu or cuda" >&2
    exit 2
    ;;
esac
echo "Installing the locked versions, torch for $build: $takes ..."
echo "$torch" | uv sync --require-hashes --constraints - "$@"
