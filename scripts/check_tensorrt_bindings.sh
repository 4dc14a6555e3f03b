#!/usr/bin/env bash
# Runs check_tensorrt_bindings.py with the real Python bindings of every supported TensorRT, over a null backend (no GPU needed).
#   scripts/check_tensorrt_bindings.sh [PYTHON]      (x86-64 Linux, CPython 3.11; the bindings come from the package index)
# WITH_BINDINGS names the script that runs a command with the bindings of one version; it is part of the shared data, not of this project.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}
with_bindings=${WITH_BINDINGS:-${CMT_EDGE_SHARED:-$here/../../shared}/trt/with_bindings.sh}
[ -f "$with_bindings" ] || { echo "error: $with_bindings is not there; set WITH_BINDINGS" >&2; exit 3; }
failed=0
for version in 10.3.0 10.13.3.9 10.16.1.11 11.0.0.114 11.4.0.106; do
  bash "$with_bindings" "$version" "$python" "$here/check_tensorrt_bindings.py" || { echo "tensorrt $version: FAILED" >&2; failed=1; }
done
exit $failed
