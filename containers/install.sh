#!/bin/sh
# Install lock files with the hashes of every file checked, where pip is: install.sh PIP LOCK...
# With TORCH=cuda, torch is its CUDA build also where pip's settings offer another.
set -eu

pip=$1
shift
here=$(dirname "$0")
install="$pip install --quiet --quiet --require-hashes --no-deps"

# Among files with the right hash pip prefers one whose index says so over one in a folder, even
# where the folder holds the build of torch that is meant for this machine. So pip chooses torch's
# file without hashes, and the hash is checked when that file is installed.
pin=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$here/run.lock")
if ! "$pip" freeze | grep -qE "^$pin(\+|\$)"; then
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    # `===` means this version as it is written, so no build with a label such as +cpu behind it.
    if [ "${TORCH:-}" = cuda ]; then wanted="torch===${pin#torch==}"; else wanted=$pin; fi
    "$pip" download --quiet --quiet --no-deps --dest "$scratch" "$wanted"
    awk '/^[^ ]/ { torch = /^torch==/ } torch' "$here/run.lock" >"$scratch/torch.lock"
    PIP_CONFIG_FILE=/dev/null PIP_FIND_LINKS=$scratch \
        $install --no-index --requirement "$scratch/torch.lock"
fi

for lock in "$@"; do set -- "$@" --requirement "$lock"; shift; done
$install "$@"

# The CUDA build asks for CUDA's libraries; other builds do without.
library=$("$(dirname "$pip")/python" -c \
    'import sysconfig; print(sysconfig.get_path("platlib") + "/torch/lib/libtorch_cuda.so")')
if [ -f "$library" ]; then
    $install --requirement "$here/cuda.lock"
fi
