#!/usr/bin/env bash
# What needs a GPU, for the minutes that there is one; every finding is written at once.
#
#   bench/gpu.sh check      is it right, how fast is it: most valuable first
#   bench/gpu.sh times      is it right, and the step times of every model
#   bench/gpu.sh tune       the tests that failed, then times under each choice of the CUDA engine
#   bench/gpu.sh papers     a language model under every rule, beside Singh's table of CIFAR-10
#   bench/gpu.sh --dry-run  anywhere: prints the commands and checks that they would start
#
# TOTAL: seconds for all stages (540; 200 see what matters most). PYTHON: the interpreter (python3).
# OUT: where the findings go (build/gpu), eight files at most. STOP=1: stop where the cuda backend
# disagrees with the reference. .gpu/, made by bench/gpu_pack.sh, spares the build. DATA: folder of
# data sets for papers (that of .gpu/data, unpacked). WORKERS: processes of each program (12; 6 of
# papers). DEVICE=cpu rehearses papers, MORE="--quick" shorter.
set -uo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
check | times | tune | papers) dry= ;;
--dry-run) dry=1 ;;
*) sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
python="${PYTHON:-python3}" out="${OUT:-build/gpu}" total="${TOTAL:-540}" work=build/gpu-work
export OMP_NUM_THREADS=1 MPLBACKEND=Agg PYTHONUNBUFFERED=1 PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONPATH="$PWD:$PWD/.gpu/site${PYTHONPATH:+:$PYTHONPATH}"
[ ! -f .gpu/commit ] || export BENCH_COMMIT="$(cat .gpu/commit)"
rm -rf "$work" && mkdir -p "$out" "$work"
[ -n "$dry" ] || rm -f "$out"/{verdicts.txt,machine.txt,tests.jsonl,steps.json,ncu.csv,tune.json,stalls.csv,logs.tgz,char_gpt.json,singh_cifar10{,_50000}.json}

left() { echo $((total - SECONDS)); }
note() { echo "$SECONDS s: $*" | tee -a "$out/verdicts.txt"; }

# stage NAME LIMIT COMMAND...: in a process group of its own, for LIMIT seconds at most, its output
# in a log; a line on how it ended, whatever the others do.
stage() {
  local name="$1" limit="$2" begun=$SECONDS code pid
  shift 2
  if [ -n "$dry" ]; then
    echo "[$name, $limit s]$(printf ' %q' "$@")" | tee -a "$work/commands"
    return 0
  fi
  [ "$limit" -le "$(left)" ] || limit=$(left)
  [ "$limit" -gt 4 ] || { note "$name: no time left"; return 125; }
  timeout -k 3 "$limit" "$@" >>"$work/$name.log" 2>&1 &
  pid=$!
  wait $pid
  code=$?
  kill -KILL -- "-$pid" 2>/dev/null # what it may have left running
  local over=
  [ $code -ne 124 ] && [ $code -ne 137 ] || over=" (over $limit s)"
  note "$name: exit $code$over after $((SECONDS - begun)) s; $(tail -n 1 "$work/$name.log" | cut -c1-160)"
  return $code
}

# tests NAME LIMIT ARGUMENT...: a hang, a crash or a spoiled context costs one test each.
tests() {
  local name="$1" limit="$2"
  shift 2
  TEST_LOG="$out/tests.jsonl" stage "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider \
    --tb short -n "${WORKERS:-12}" --dist worksteal --timeout 20 --timeout-method thread \
    --max-worker-restart 60 "$@"
  [ -n "$dry" ] || note "tests so far: $(counted passed) passed, $(counted failed) failed," \
    "$(counted skipped) skipped"
}
counted() { cat "$out/tests.jsonl" 2>/dev/null | grep -c "\"$1\""; }

# steps LIMIT DTYPE MODEL...: step times, a process for each model.
steps() {
  local limit="$1" dtype="$2" model
  shift 2
  for model in "$@"; do
    stage "steps-$dtype-$model" "$limit" "$python" -m bench.step_time --device cuda \
      --models "$model" --dtype "$dtype" --repeats "${ROUNDS:-9}" --seconds $((limit - 10)) \
      --only "$main" --backend "$engines" --out "$work/steps-$dtype-$model.json"
    merged & # meanwhile: it imports torch, which takes seconds
  done
}
main='fused|foreach|memory copy|^layerlr \w+ \w+( triton)?$'

merged() { # of all models so far
  [ -n "$dry" ] || ! compgen -G "$work/steps-*.json" >/dev/null ||
    "$python" -m bench.merge "$work"/steps-*.json --out "$out/steps.json" >"$work/table.txt" 2>&1
}

pack() { [ -n "$dry" ] || tar czf "$out/logs.tgz" -C "$work" . 2>/dev/null; }

# --- machine and build ---

loads() {
  timeout 60 "$python" -c '
import torch
from layerlr.backends import cuda

major, minor = torch.cuda.get_device_capability()
built = [int(x) for x in cuda.load().architectures]
fits = any(x // 10 == major and x % 10 <= minor for x in built)
assert fits, f"the library has kernels for {built}, the GPU is {major}.{minor}"
print(cuda.load().device_info(0))'
}

machine() {
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  "$python" -c 'import sys, torch; print(sys.version.split()[0], torch.__version__, torch.version.cuda)'
  echo "commit ${BENCH_COMMIT:-unknown}"
}

load() {
  [ -z "$dry" ] || return 0
  machine 2>&1 | tee -a "$out/machine.txt"
  cp .gpu/layerlr/*.so layerlr/ 2>/dev/null
  "$python" -c 'import layerlr.kernels' 2>/dev/null || ln -sfn ../kernels layerlr/kernels
  if loads >"$work/load.log" 2>&1; then
    note "load: $(tail -n 1 "$work/load.log")"
    return 0
  fi
  note "load: $(tail -n 1 "$work/load.log" | cut -c1-160); building for this GPU"
  LAYERLR_CUDA_ARCH=$("$python" -c 'import torch
print("%d%d" % torch.cuda.get_device_capability())')
  export LAYERLR_CUDA_ARCH
  stage build 240 "$python" setup.py -q build_ext --inplace || finish 3
}

# --- the end: what is read first comes last ---

finish() {
  if [ -z "$dry" ]; then
    wait
    merged
    pack
    [ "$(counted failed)" -gt 0 ] && echo "of the tests that failed:"
    grep -h '"failed"' "$out/tests.jsonl" 2>/dev/null | head -n 20 | cut -c1-240
    grep -h -E 'WRONG|FAILED|DIFFERS' "$work"/{agree,repeat}*.log 2>/dev/null | cut -c1-180 | head -n 20
    cat "$work/table.txt" 2>/dev/null
    echo "verdicts:"
    cat "$out/verdicts.txt"
  fi
  exit "$1"
}
trap pack EXIT

# --- the calls ---

engines=cuda,triton
on_gpu="(cuda or triton) and not reference_cuda and not test_several_devices"
first=(tests/gpu/test_cuda_runtime.py tests/core/test_{parity,precision,precision_state}.py
  tests/torch_contract/test_{amp,torch_infra}.py)
san=(compute-sanitizer --error-exitcode 1 --print-limit 10)

# What looks at the device's accesses is slow, and runs beside the tests.
checkers() {
  # Without torch's cache every tensor is an allocation of its own, with bounds of its own.
  stage memcheck 150 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "${san[@]}" --tool memcheck \
    "$python" -m bench.sanitize_step --blocks 4
  stage racecheck 100 "${san[@]}" --tool racecheck \
    "$python" -m bench.sanitize_step --dtypes float32 --blocks 4
  stage repeat 60 "$python" -m bench.repeat --runs 10
}

check() {
  local beside agreed
  load
  stage self-check 60 "$python" -m layerlr
  stage agree-triton 60 "$python" -m bench.agree --backend triton --shapes small resnet50 \
    --threads 4 --seconds 40 & # no times are taken meanwhile
  beside=$!
  stage agree-cuda 60 "$python" -m bench.agree --threads 8 --seconds 40
  agreed=$?
  wait $beside
  if [ $agreed -gt 1 ]; then # hangs, dies, or is wrong everywhere: the others go on without it
    note "cuda does not agree at all: step times and tests are of triton alone"
    engines=triton on_gpu="triton and not test_several_devices"
  fi
  [ $agreed -eq 0 ] || [ -z "${STOP:-}" ] || finish 1

  steps 45 float32 resnet50 vit_b # the first figures
  checkers &
  beside=$!
  tests tests-first 110 "${first[@]}" -k "$on_gpu"
  tests tests-rest 80 tests -k "$on_gpu or test_parts" --ignore tests/gpu/test_cuda_build.py \
    --ignore tests/engines/test_triton.py --ignore tests/house/test_packaging.py --ignore tests/bench \
    $(printf ' --ignore %s' "${first[@]}")
  pack
  wait $beside
  stage counters 45 ncu --profile-from-start off --nvtx --clock-control none --csv --page raw \
    --log-file "$out/ncu.csv" \
    --metrics dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum \
    "$python" -m bench.profile_step --models resnet50 vit_b
  steps 35 bfloat16 resnet50 vit_l llama3_8b_16of32 vit_b
  steps 35 float32 llama3_8b_16of32 vit_l gpt2_xl tiny300 tiny1500 tiny128
}

times() {
  load
  stage agree-cuda 40 "$python" -m bench.agree --threads 8 --seconds 20 --shapes small large
  steps 35 float32 resnet50 vit_b vit_l gpt2_xl tiny300 tiny1500 tiny128 llama3_8b_16of32
  steps 35 bfloat16 resnet50 vit_b vit_l
}

tune() {
  load
  if [ -s .gpu/failed.txt ]; then # a test a line, as in tests.jsonl
    tests tests-again 60 --tb long @.gpu/failed.txt
  fi
  stage tune 240 "$python" -m bench.tune --models resnet50,vit_b,vit_l,gpt2_xl --seconds 220 \
    --out "$out/tune.json"
  stage stalls 60 ncu --profile-from-start off --nvtx --clock-control none --csv --page raw \
    --log-file "$out/stalls.csv" --section WarpStateStats --section Occupancy \
    --section MemoryWorkloadAnalysis "$python" -m bench.profile_step --models vit_l
}

# paper NAME ARGUMENT...: an experiment, for what time is left; its JSON file grows run by run.
paper() {
  local name="$1"
  shift
  # shellcheck disable=SC2086
  stage "$name" $(($(left) - 8)) "$python" -m "bench.papers.${name%%-*}" --data "$data" \
    --out "$out" --device "${DEVICE:-cuda}" --workers "${WORKERS:-6}" "$@" ${MORE:-}
  # At most eight files: tables and plots are made anew from the runs; a writer may have been ended.
  [ -n "$dry" ] || rm -f "$out"/*.md "$out"/*.png "$out"/.*.json-*
}

papers() {
  local beside
  [ -n "${DEVICE:-}" ] || load
  if [ -z "${DATA:-}" ]; then
    mkdir -p "$data"
    [ -n "$dry" ] || cp -r .gpu/data/text "$data"
  fi
  paper char_gpt --limit 320 &
  beside=$!
  [ -n "${DEVICE:-}" ] || stage agree-cuda 60 "$python" -m bench.agree --threads 2 --seconds 45 \
    --shapes small large &
  [ -n "${DATA:-}" ] || stage unpack 90 "$python" .gpu/data/unpack.py "$data"
  paper singh_cifar10-60 --seeds 3 --iterations 7000 --only '^(SGD|AdaGrad)' --limit 175
  paper singh_cifar10-50 --seeds 3 --iterations 6000 --only '^(SGD|AdaGrad)' --limit 175 \
    --step-down 50000
  wait $beside
}
data="${DATA:-build/gpu-data}"

if [ -n "$dry" ]; then
  check
  tune
  papers
  "$python" - "$work/commands" <<'END' || exit 1
import importlib, shlex, sys

for line in open(sys.argv[1]):
    words = shlex.split(line.partition("]")[2])
    module = words[words.index("-m") + 1] if "-m" in words else ""
    if module.startswith("bench."):
        program, given = importlib.import_module(module), words[words.index(module) + 1 :]
        if module.startswith("bench.papers."):
            runner = importlib.import_module("bench.papers.runner")
            runner.parser(None, program.arguments).parse_args(given)
        else:
            program.parser().parse_args(given)
        print(module, "imports and reads its arguments")
END
  exit 0
fi
"$1"
finish 0
