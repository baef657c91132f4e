#!/usr/bin/env bash
# Builds the extension with the address and undefined-behavior sanitizers, in a copy, and runs the
# engine's and the kernels' small tests on it; a finding ends them. Takes GCC, and a Python with
# torch, pybind11, ninja, pytest and hypothesis. Arguments replace the tests that are run.
# Races are looked for by tests/native/thread_sanitizer.py.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT
cd "$checkout"
cp -r advkd csrc kernels tests setup.py pyproject.toml README.md LICENSE "$temp"
cd "$temp"
rm -f advkd/_C*.so
export ADVKD_CUDA=0 ADVKD_SANITIZE=1  # also of what the tests build themselves
"${PYTHON:-python}" setup.py --quiet build_ext --inplace

compiler=${CXX:-g++}
# libstdc++ too, or exceptions would be unknown to the sanitizer.
preload=$($compiler -print-file-name=libasan.so):$($compiler -print-file-name=libstdc++.so.6)
if [ $# -eq 0 ]; then
  set -- tests/engine/test_lowering.py tests/native tests/kernels/test_thread_pool.py \
    tests/kernels/test_sampling_loop.py tests/kernels/test_group_norm_affine.py \
    tests/kernels/test_convolution.py tests/kernels/test_convolution_int8.py \
    tests/kernels/test_conv3x3.py tests/kernels/test_normed_conv3x3.py \
    tests/kernels/test_attention.py tests/kernels/test_group_norm_silu.py \
    tests/kernels/test_sampling_step.py tests/kernels/test_philox.py
fi
for path in "$@"; do
  [[ $path == -* || -e ${path%%::*} ]] || { echo "$path does not exist" >&2; exit 1; }
done
# Python's own allocator would hide what lies next to what; leaks are Python's and torch's.
PYTHONPATH=$temp PYTHONMALLOC=malloc LD_PRELOAD=$preload \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 \
  "${PYTHON:-python}" -m pytest -q -p no:cacheprovider "$@"
