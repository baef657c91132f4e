#!/usr/bin/env bash
# The CUDA kernels on a GPU under compute-sanitizer: memory, races, barriers, uninitialized reads.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH"; exit 3; }
ours=(--kernel-name kernel_substring=first_state_kernel --kernel-name kernel_substring=sampling_step_kernel)
for tool in memcheck racecheck synccheck initcheck; do
  echo "== $tool"
  filters=("${ours[@]}")
  # What an unchecked kernel has written would count as uninitialized.
  if [ "$tool" = initcheck ]; then filters=(); fi
  compute-sanitizer --tool "$tool" --error-exitcode 9 "${filters[@]}" \
    "${PYTHON:-python}" -m pytest -q -p no:cacheprovider \
    "tests/gpu/test_loop.py::test_noise_and_update_have_the_cpus_bits"
done
