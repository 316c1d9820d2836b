"""bench/gpu.sh, rehearsed without a GPU."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def bash(*arguments, **environment):
    if shutil.which("bash") is None:
        pytest.skip(reason="there is no bash")
    command = ["bash", *arguments]
    # The package under test may be an installed one, beside which there is no bench folder.
    where = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run(command, cwd=ROOT, env=where, capture_output=True, text=True)


def test_gpu_script_is_bash():
    assert bash("-n", "bench/gpu.sh").returncode == 0


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_dry_run(tmp_path):
    done = bash("bench/gpu.sh", "--dry-run", CUDA_VISIBLE_DEVICES="", OUT=str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for module in ("agree", "step_time", "repeat", "sanitize_step", "profile_step", "tune"):
        assert f"bench.{module} imports and reads its arguments" in done.stdout
    stages = [line[1:].partition(",")[0] for line in done.stdout.splitlines() if line[0] == "["]
    assert stages[0] == "self-check" and set(stages[1:3]) == {"agree-triton", "agree-cuda"}
    assert stages[3:5] == ["steps-float32-resnet50", "steps-float32-vit_b"]
    assert {"memcheck", "racecheck", "repeat", "tests-first", "tests-rest"} == set(stages[5:10])
    assert stages[10] == "counters" and stages[-7:-5] == ["tune", "stalls"]
    papers = {"agree-cuda", "char_gpt", "unpack", "singh_cifar10-60", "singh_cifar10-50"}
    assert set(stages[-5:]) == papers
    assert "bench.papers.char_gpt imports and reads its arguments" in done.stdout
    assert "--dist worksteal --timeout 20 --timeout-method thread" in done.stdout
    assert not list(tmp_path.iterdir())


FAKE = """\
#!/usr/bin/env bash
# Python on a machine with a GPU
echo "$*" >>"$ASKED"
case "$*" in
*"-m bench.agree --backend triton"*) echo "52 of 52 agree" ;;
*"-m bench.agree"*) echo "$AGREE of 78 agree"; [ "$AGREE" -eq 78 ] || exit 2 ;;
*"-m pytest"*)
  echo '["tests/test_a.py::test_a", "passed", 0.1]' >>"$TEST_LOG"
  echo '["tests/test_a.py::test_b", "failed", 0.1, "why"]' >>"$TEST_LOG"
  exit 1 ;;
*"-m bench.step_time"*" $HANGS "*) (trap "" TERM; sleep 300) ;;
*"-m bench.step_time"*) for last; do :; done; echo {} >"$last" ;;
*"-m bench.papers.$HANGS "*) (trap "" TERM; sleep 300) ;;
*"-m bench.papers."*)
  case "$*" in *--step-down*) name=singh_cifar10_50000 ;; *) name="${2##*.}" ;; esac
  for kind in json md png; do echo {} >"$OUT/$name.$kind"; done; echo "trained $name" ;;
*"-m bench.merge"*) for last; do :; done; echo {} >"$last"; echo the table ;;
*"-m "*|*setup.py*|-c*) echo ran ;;
*) exec "$REAL" "$@" ;;
esac
"""


@pytest.fixture
def gpu_script(tmp_path):
    """Run the script with a Python that says it has a GPU, and does nothing."""
    fake, root = tmp_path / "python", tmp_path / "root"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    for folder in ("bench", "tests", "layerlr", ".gpu/data/text"):
        (root / folder).mkdir(parents=True)
    shutil.copy(ROOT / "bench/gpu.sh", root / "bench")

    def run(call="check", **environment):
        where = {"AGREE": "78", "HANGS": "none", "OUT": str(root / "out"), "TOTAL": "60"}
        where |= {"PYTHON": str(fake), "REAL": sys.executable, "ASKED": str(tmp_path / "asked")}
        done = bash(str(root / "bench/gpu.sh"), call, **where | environment)
        lines = (root / "out/verdicts.txt").read_text().splitlines()
        found = dict(line.partition(" s: ")[2].split(": ", 1) for line in lines)
        return done, found, (tmp_path / "asked").read_text()

    return run


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_verdicts(gpu_script, tmp_path):
    done, found, asked = gpu_script()
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["agree-cuda"].endswith("78 of 78 agree")
    assert found["tests-rest"].startswith("exit 1 ")
    assert found["tests so far"] == "2 passed, 2 failed, 0 skipped"
    assert "steps-bfloat16-llama3_8b_16of32" in found and "--backend cuda,triton" in asked
    last = done.stdout[done.stdout.index("of the tests that failed") :]
    assert '::test_b", "failed", 0.1, "why"]' in last and "the table" in last
    assert "agree-cuda" in last[last.index("verdicts:") :]
    assert len(list((tmp_path / "root/out").iterdir())) <= 8


@pytest.mark.full("the script for a GPU")
def test_gpu_script_without_an_engine(gpu_script):
    done, found, asked = gpu_script(AGREE="0")
    assert done.returncode == 0 and found["agree-cuda"].startswith("exit 2 ")
    assert "--backend triton --out" in asked and "-k triton and" in asked
    assert "cuda does not agree at all" in found
    done, found, _ = gpu_script(AGREE="0", STOP="1")
    assert done.returncode == 1 and not any(name.startswith("steps") for name in found)
    assert "verdicts:" in done.stdout


@pytest.mark.full("the script for a GPU")
def test_gpu_script_ends_what_hangs(gpu_script):
    done, found, _ = gpu_script(HANGS="resnet50", TOTAL="8")
    assert "(over" in found["steps-float32-resnet50"]
    assert found["steps-float32-vit_b"] == "no time left"
    assert "the table" not in done.stdout and "verdicts:" in done.stdout


@pytest.mark.full("the script for a GPU")
def test_gpu_script_s_papers(gpu_script, tmp_path):
    """The language model and CIFAR-10 run beside each other; a hang costs one of them."""
    done, found, asked = gpu_script("papers")
    assert done.returncode == 0, done.stdout + done.stderr
    assert found["char_gpt"].endswith("trained char_gpt") and "unpack" in found
    assert found["singh_cifar10-50"].endswith("trained singh_cifar10_50000")
    out = tmp_path / "root/out"
    kept = {"char_gpt.json", "singh_cifar10.json", "singh_cifar10_50000.json"}
    assert kept <= {path.name for path in out.iterdir()} and len(list(out.iterdir())) <= 8
    assert "unpack.py build/gpu-data" in asked and "--data build/gpu-data" in asked
    done, found, asked = gpu_script("papers", HANGS="char_gpt", TOTAL="16", DATA="there")
    assert "(over" in found["char_gpt"] and found["singh_cifar10-60"].startswith("exit 0")
    assert "--data there" in asked and "unpack" not in found
    assert not (out / "char_gpt.json").exists() and (out / "singh_cifar10.json").exists()


def test_gpu_script_refuses_what_it_does_not_know():
    done = bash("bench/gpu.sh", "--fast")
    assert done.returncode == 2 and "--dry-run" in done.stdout
