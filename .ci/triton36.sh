#!/usr/bin/env bash
# The kernels under the oldest Triton they are meant for: a few cases per stage under its interpreter (which wants numpy
# before 2.4), and one variant of every kernel compiled for sm_90.
set -euo pipefail
cd "$(dirname "$0")/.."

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PIP_DISABLE_PIP_VERSION_CHECK=1 TRITON_CACHE_DIR="$scratch/cache"
python=$scratch/venv/bin/python

"${PYTHON:-python3}" -m venv "$scratch/venv"
"$python" -m pip install -qq torch==2.13.0 'numpy<2.4' pytest hypothesis
"$python" -m pip install -qq --no-deps triton==3.6.0 # torch's wheels for GPUs ask for another
"$python" -m pip install -qq --no-deps -e .
"$python" -c 'import triton; assert triton.__version__ == "3.6.0", triton.__version__'

few='kernel_3x2 or block_by_gcd or interleaved_workspace or pointwise_block or test_phases or test_policy'
few+=' or half_precision_is or three_bfloat16'
# its interpreter makes scalars of arrays in a way that numpy 2.4 has abolished
"$python" -m pytest -q -W 'ignore:Conversion of an array:DeprecationWarning' tests/test_kernels_*.py -k "$few"
"$python" -m bench.gpu.aot --out "$scratch/aot" --target sm_90 --one
