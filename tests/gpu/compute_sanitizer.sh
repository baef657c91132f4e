#!/usr/bin/env bash
# The GPU tests of the kernels under compute-sanitizer: memory, races, uninitialised reads, barriers.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 3; }
for tool in memcheck racecheck initcheck synccheck; do
  echo "== $tool"
  compute-sanitizer --tool "$tool" --error-exitcode 9 --kernel-name-exclude regex:'.*cudnn.*|.*at::.*' \
    "${PYTHON:-python}" -m pytest -q -p no:cacheprovider tests/gpu/test_group_norm_silu.py \
    "tests/gpu/test_loop.py::test_noise_and_update_have_the_cpus_bits" -k "float32 or dtype0"
done
