#!/usr/bin/env bash
# Install a wheel into a new environment and step its CPU engines, with no compiler on the PATH.
#
#   build_backend/try_wheel.sh PYTHON WHEEL FOLDER
#
# PYTHON is that of an environment with PyTorch. The new one, in FOLDER, holds the wheel alone and
# borrows the rest by a .pth file. That does not activate an editable install of the first one: what
# is missing in the wheel is missing.
set -euo pipefail
python="$1" wheel="$2" folder="$3"

"$python" -m venv "$folder"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
  >"$(echo "$folder"/lib/python*/site-packages)/borrowed.pth"
# As on a machine that has nothing: neither this one's variables nor its programs.
bare=(env -i "PATH=$folder/bin" "HOME=$folder" OMP_NUM_THREADS=1)
cd "$folder"
"${bare[@]}" bin/python -m pip install -q --disable-pip-version-check --no-deps --no-index "$wheel"
"${bare[@]}" bin/python - <<'END'
import importlib.util
import shutil
import sys

import layerlr
from layerlr import _C
from layerlr.backends import cuda

for program in ("c++", "g++", "cc", "gcc", "clang", "nvcc", "ninja"):
    assert shutil.which(program) is None, program
assert layerlr.__file__.startswith(sys.prefix), layerlr.__file__
assert importlib.util.find_spec("layerlr.kernels"), "the Triton kernels are missing"
if _C.NO_CUDA:
    print(f"without the CUDA engine: {_C.NO_CUDA}")
else:
    print("with the CUDA engine, for", *cuda.load().architectures)
assert all(finding.good for finding in layerlr.selfcheck("cpu"))
END
