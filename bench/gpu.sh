#!/usr/bin/env bash
# Everything that needs a GPU, in one command and under nine minutes: build, tests, memory and race
# checks, repeatability, step times, roofline. It goes on past what fails and says so in the end.
#
#   bench/gpu.sh              on a machine with a GPU, nvcc, Python and PyTorch; needs no network
#   bench/gpu.sh --dry-run    anywhere: prints the commands and checks that they would start
#
# PYTHON: the interpreter (python3). MODELS, DTYPES, ROUNDS: of bench.step_time.
# Results go to bench/results/, and with the log to the folder OUT as well where it is set.
set -uo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
--dry-run) dry=1 ;;
"") dry= ;;
*) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2 ;;
esac
python="${PYTHON:-python3}"
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}" MPLBACKEND=Agg PIP_DISABLE_PIP_VERSION_CHECK=1
export PYTHONUNBUFFERED=1
if [ -n "${OUT:-}" ] && [ -z "$dry" ]; then
  mkdir -p "$OUT" && exec > >(tee "$OUT/gpu.log") 2>&1
fi

readonly TOTAL=530 # seconds that all stages have between them
reserve=210        # of which so many are kept for the later ones
failed=() left_out=() commands=() verdicts=()
say() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
left() { echo $((TOTAL - SECONDS)); }
least() { echo $(($1 < $2 ? $1 : $2)); }
skip() { left_out+=("$1"); echo "left out: $1"; }
has() { "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"; }

# stage NAME LIMIT COMMAND...: run it for LIMIT seconds at most; a failure is noted, not fatal.
stage() {
  local name="$1" limit code
  limit=$(least "$2" $(($(left) - reserve)))
  shift 2
  say "$name"
  printf '$'
  printf ' %q' "$@"
  echo
  if [ -n "$dry" ]; then
    commands+=("$(printf ' %q' "$@")")
    return 0
  fi
  [ "$limit" -gt 5 ] || { failed+=("$name (no time left)"); return 1; }
  timeout -k 5 "$limit" "$@"
  code=$?
  [ $code -eq 124 ] && name="$name (over $limit s)"
  [ $code -eq 0 ] || failed+=("$name")
  return $code
}

# verdict NAME LIMIT ARGUMENT...: a stage of pytest, and a line about it in the end.
verdict() {
  local name="$1" limit="$2" report="build/gpu-tests/$1.xml" word counts
  shift 2
  stage "$name" "$limit" "$python" -m pytest -q -p no:cacheprovider --maxfail 20 --tb short \
    --junitxml "$report" "$@"
  word=$?
  [ -z "$dry" ] || return 0
  counts=$("$python" - "$report" <<'END'
import sys
from xml.etree import ElementTree

try:
    suite = next(ElementTree.parse(sys.argv[1]).iter("testsuite"))
except OSError:
    print(0, 0, 0)
else:
    n, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    bad = int(suite.get("failures")) + int(suite.get("errors"))
    print(n - skipped - bad, bad, skipped)
END
  )
  read -r passed bad skipped <<<"$counts"
  counts="$passed passed, $bad failed, $skipped skipped"
  if [ "$word" -ne 0 ]; then
    word=FAILED
  elif [ "$passed" -eq 0 ]; then
    word="not run"
  else
    word=passed
  fi
  verdicts+=("$name $word ($counts)")
}

# --- what is here ---

say "machine"
nvidia-smi --query-gpu=name,driver_version,memory.total,memory.used --format=csv 2>/dev/null ||
  echo "no nvidia-smi"
nvcc --version 2>/dev/null | tail -n 2 || echo "no nvcc"
"$python" -c '
import sys, torch
print(f"python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))' || exit 1
for package in pytest hypothesis expecttest numpy triton timm pytorch_optimizer matplotlib tqdm; do
  has $package || skip "what needs $package, which is not installed"
done
gpu=$("$python" -c '
import re, torch
name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
print(re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-"))')
if [ -z "$gpu" ] && [ -z "$dry" ]; then
  echo "no CUDA device: nothing to measure"
  exit 1
fi
work=build/gpu # so that nothing of an older run is taken for one of this
result="$work/${gpu:-gpu}"
[ -n "$dry" ] || { rm -rf "$work" build/gpu-tests && mkdir -p "$work" build/gpu-tests; }

# --- build, in place ---

if ! stage "build" 200 "$python" -m pip install -q --no-build-isolation --no-deps -e . &&
  stage "build, without pip" 200 "$python" setup.py -q build_ext --inplace; then
  failed=()
  skip "pip install -e .: it failed, setup.py built in place instead"
fi

# --- right: tests, checkers, repeatability ---

if has pytest; then
  on_gpu="cuda or triton"
  verdict "graphs" 40 tests/test_cuda_runtime.py -k graph
  verdict "streams" 30 tests/test_cuda_runtime.py tests/test_step_in_backward.py \
    tests/test_telemetry.py -k "stream or wait or allocates or devices"
  verdict "AMP" 30 tests/test_amp.py -k "$on_gpu or scaler"
  verdict "precision" 40 tests/test_precision.py -k "$on_gpu"
  verdict "sharding" 60 tests/test_sharding.py -k test_parts
  verdict "optimizer infrastructure" 60 tests/test_torch_infra.py -k "cuda_float64"
  verdict "other tests" 90 --continue-on-collection-errors -k "$on_gpu" tests \
    --ignore tests/test_cuda_runtime.py --ignore tests/test_amp.py \
    --ignore tests/test_torch_infra.py --ignore tests/test_precision.py \
    --ignore tests/test_sharding.py
else
  verdicts+=("tests not run (no pytest)")
fi
if [ -n "$dry" ] || command -v compute-sanitizer >/dev/null; then
  sanitizer=(compute-sanitizer --error-exitcode 1 --print-limit 10)
  # Without torch's cache every tensor is an allocation of its own, with bounds of its own.
  stage "memory check" 40 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    "${sanitizer[@]}" --tool memcheck "$python" -m bench.sanitize_step
  stage "race check" 40 "${sanitizer[@]}" --tool racecheck \
    "$python" -m bench.sanitize_step --dtypes float32
else
  skip "memory and race checks: there is no compute-sanitizer"
fi
stage "repeatability" 60 "$python" -m bench.repeat

# --- fast: step times, roofline ---

reserve=0
timed=$(least 200 $(($(left) - 130))) # what is begun by then has 40 seconds to end
stage "step times" $((timed + 40)) "$python" -m bench.step_time --device cuda \
  ${MODELS:+--models "$MODELS"} --dtype "${DTYPES:-float32,bfloat16}" \
  --repeats "${ROUNDS:-9}" --seconds "$timed" --out "$result.json"
stage "precisions" 40 "$python" -m bench.step_time --device cuda --families held --models vit_b \
  --dtype bfloat16 --repeats 5 --seconds 20 --out "$result-precisions.json"
stage "roofline" 20 "$python" -m bench.roofline "$result.json" \
  --out "$result-roofline.json" --plot "$result-roofline.png"
stage "page" 20 "$python" -m bench.summary "$result.json" "$result.md"
if has matplotlib; then
  stage "bars" 30 "$python" -m bench.plot_step_time "$result.json" "$result-step-time.png"
fi

# --- the end ---

if [ -n "$dry" ]; then
  say "dry run"
  printf '%s\n' "${commands[@]}" "$python -m bench.goals $result.json" | "$python" -c '
import importlib, shlex, sys

for line in sys.stdin:
    words = shlex.split(line)
    module = words[words.index("-m") + 1] if "-m" in words else ""
    if module.startswith("bench."):
        program = importlib.import_module(module)
        program.parser().parse_args(words[words.index(module) + 1 :])
        print(module, "imports and reads its arguments")' || exit 1
  [ -n "$gpu" ] || echo "no CUDA device: stopped here"
  exit 0
fi

say "done"
for folder in bench/results ${OUT:+"$OUT"}; do
  mkdir -p "$folder" && cp "$work"/* "$folder"/
done
for item in "${left_out[@]}"; do echo "left out: $item"; done
for item in "${failed[@]}"; do echo "FAILED: $item"; done
for item in "${verdicts[@]}"; do echo "verdict: $item"; done
"$python" -m bench.goals "$result.json"
[ ${#failed[@]} -eq 0 ] # the exit status is about what ran, not about goals
