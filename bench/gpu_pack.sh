#!/usr/bin/env bash
# Build here, once, what a machine with a GPU and no network would spend its minutes on: .gpu/
#
#   PYTHON=path/of/python bench/gpu_pack.sh    an interpreter and a torch as on that machine
#
# .gpu/layerlr: the native libraries, for the GPU's architecture alone (LAYERLR_CUDA_ARCH, 90)
# .gpu/site:    packages of tests and benchmarks that are missing there (GPU_SITE)
# .gpu/data:    data sets for `bench/gpu.sh papers` (GPU_DATA: their files and folders): text/, and
#               a program `unpack.py FOLDER` that writes the others as bench.data reads them
# .gpu/commit:  what it was built from
# Take the folder along: bench/gpu.sh uses it. A second run compiles only what has changed.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
export LAYERLR_CUDA=1 LAYERLR_CUDA_ARCH="${LAYERLR_CUDA_ARCH:-90}"

mkdir -p .gpu && rm -rf .gpu/layerlr
nice -n 5 "$python" setup.py -q build_ext --build-lib .gpu --build-temp build/gpu-pack
if [ ! -d .gpu/site ]; then
  # shellcheck disable=SC2086
  "$python" -m pip install -q --no-deps --target .gpu/site.new \
    ${GPU_SITE:-expecttest pytorch_optimizer timm}
  mv .gpu/site.new .gpu/site
fi
if [ -n "${GPU_DATA:-}" ]; then
  rm -rf .gpu/data && mkdir -p .gpu/data
  # shellcheck disable=SC2086
  cp -r $GPU_DATA .gpu/data
fi
commit="$(git rev-parse --short HEAD)"
[ -z "$(git status --porcelain)" ] || commit+=+
echo "$commit" >.gpu/commit
du -shc .gpu/*
