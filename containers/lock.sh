#!/bin/sh
# Write the lock files beside this script with uv, which resolves the requirement files (*.in)
# together, so that the versions agree: lock.sh BIN, where BIN is an environment's folder of
# commands. `make lock` runs it.
#
# Each lock holds what its own requirement file needs, less what an earlier lock already pins: a
# change of the plotting libraries leaves run.lock, and with it every run's fingerprint, untouched.
# The image is built of run.lock, cuda.lock and kernels.lock, which are whole without the others.
# A version that is locked stays as long as it fits; to take a newer one, delete its entry first.
set -eu

bin=$(cd "$1" && pwd)
cd "$(dirname "$0")"
here=.
. ./uv.sh
# A build of torch in a folder is this machine's affair, and so are the hashes of its files.
unset UV_FIND_LINKS

all=$(mktemp)
trap 'rm -f "$all"' EXIT
cat run.lock cuda.lock report.lock workflow.lock dev.lock >"$all" 2>/dev/null || true

compile() {
    uv compile --quiet --generate-hashes --no-annotate --custom-compile-command "make lock" \
        --python-version 3.11 "$@"
}
# One version of everything, for all platforms and Pythons.
everywhere() { compile --universal --fork-strategy fewest "$@"; }
with_cuda() { compile --python-platform x86_64-manylinux_2_28 "$@"; }
without() { sed -n 's/^\([^ =]*\)==.*/--no-emit-package \1/p' "$@"; }

echo uv | everywhere - --output-file installer.lock
# roc-validator asks for an earlier rich than runs have, and works with theirs.
echo "rich>=15" |
    everywhere run.in report.in workflow.in dev.in --overrides - --output-file "$all"

# Only the CUDA build of torch asks for the first, and only Windows for colorama.
everywhere run.in --constraints "$all" $(without "$all" | grep -E ' (nvidia-|cuda-|triton)') \
    --no-emit-package colorama --output-file run.lock
everywhere report.in --constraints "$all" $(without run.lock) --output-file report.lock
everywhere workflow.in --constraints "$all" $(without run.lock report.lock) \
    --output-file workflow.lock
echo "rich>=15" |
    everywhere dev.in --constraints "$all" $(without run.lock report.lock workflow.lock) \
        --overrides - --output-file dev.lock

with_cuda run.in --constraints "$all" $(without run.lock) --output-file cuda.lock
# What mamba-ssm asks for on top of kernels.in is for Mamba-3 only, whose absence is caught there.
printf '%s\n' apache-tvm-ffi quack-kernels tilelang |
    with_cuda kernels.in --constraints "$all" --excludes - \
        $(without run.lock cuda.lock) --output-file kernels.lock

# PyTorch's own index has the CPU build for Linux. It need not be reached while torch stays.
torch=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' run.lock)
if ! grep -qF "$torch+cpu " cpu.lock; then
    echo "$torch" | compile --torch-backend cpu --python-platform linux --no-deps - \
        --output-file cpu.lock
fi
