# make demo [DATA=dir]   the demonstration          make test [ARGS="-k layca"]   the tests
# make test-all          every test                 make proofs                   record tests/proofs.json
# make bench             step times                 make lint                     all linters
# make format            rewrite to our format      make clean                    remove what was built
# make install           .venv alone               make test-torch TORCH=2.11.0   the tests, there
# make wheels            a wheel in dist/, tried without a compiler
# make docs              the documentation site in build/site; a broken link or name fails it
#
# On a fresh machine each of them first makes .venv, with PyTorch and layerlr (editable) in it; an
# environment of your own serves as well: make test VENV=path. A torch that is there is kept.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= 2.13.0

PY := $(VENV)/bin/python
PIP := $(PY) -m pip install -q --disable-pip-version-check

CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inc' \
                                     -o -name '*.cu' -o -name '*.cuh')
# What an installation is made of beyond the Python files, which an editable one reads in place.
BUILT_FROM := setup.py pyproject.toml $(wildcard build_backend/*.py) $(wildcard kernels/__init__.py) \
              $(filter csrc/%,$(CXX_FILES))

.PHONY: demo test test-all test-torch proofs bench lint format install wheels docs clean
.DELETE_ON_ERROR:

# Two threads that spin for each other can cost milliseconds per step on a shared machine, and
# nothing here is large enough to gain from them. The step-time benchmark sets its own.
demo test test-all proofs: export OMP_NUM_THREADS = 1
demo test test-all proofs: export MPLBACKEND = Agg

# Hashes of what mutants and sanitizers depend on; those whose inputs have changed are run.
proofs: export LAYERLR_PROOFS = write
proofs: $(VENV)/.test
	$(PY) -m pytest -q -n auto --maxprocesses 8 \
		-k "simt_native or simt_shim or test_sanitizers or test_adding"

# Its last line says what the full run adds.
test: $(VENV)/.test
	$(PY) -m pytest -q -n auto --maxprocesses 8 -m "not full" $(ARGS)

test-all: $(VENV)/.test
	$(PY) -m pytest -q -n auto --maxprocesses 8 $(ARGS)

# In a copy with an environment of its own: the libraries in layerlr/ are built for one PyTorch.
test-torch:
	mkdir -p build/torch$(TORCH)
	git ls-files -z | xargs -0 cp -pu --parents -t build/torch$(TORCH)
	$(MAKE) -C build/torch$(TORCH) test TORCH=$(TORCH)

demo: $(VENV)/.layerlr
	$(PY) -m bench.demo $(if $(DATA),--data "$(DATA)") $(ARGS)

bench: $(VENV)/.layerlr
	$(PY) -m bench.step_time $(ARGS)

lint: $(VENV)/.lint
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_FILES)
	$(PY) -m mypy

format: $(VENV)/.lint
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(CXX_FILES)

install: $(VENV)/.layerlr

# For the torch and the Python of the environment (docs/wheels.md). What setuptools left in build/ of
# files that are gone by now would go into the wheel.
wheels: $(VENV)/.torch
	rm -rf build/lib.* build/bdist.* build/wheel dist
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .
	build_backend/try_wheel.sh $(abspath $(PY)) "$$(realpath dist/*.whl)" $(CURDIR)/build/wheel

docs: export NO_MKDOCS_2_WARNING = 1
# Pages keep their places among the folders that they link to (mkdocs.yml). Not --quiet: it would
# keep warnings from --strict too.
docs: $(VENV)/.docs
	rm -rf build/pages build/site
	mkdir -p build/pages
	ln -s $(foreach it,docs bench csrc README.md CHANGELOG.md,$(CURDIR)/$(it)) build/pages
	$(PY) -m mkdocs build --strict
	@echo build/site/docs/index.html

# The stamps are files in the environment, so that they vanish with it.
$(VENV)/.torch:
	$(PIP) --help >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	$(PY) -c "import torch" 2>/dev/null || $(PIP) torch==$(TORCH)
	$(PIP) "setuptools>=77" ninja
	touch $@

# --no-build-isolation compiles against the torch just installed and needs no second download.
$(VENV)/.layerlr: $(VENV)/.torch $(BUILT_FROM)
	$(PIP) --no-build-isolation -e ".[bench]"
	touch $@

# The emulated CUDA engine is compiled here, so that two workers do not compile it at once later on.
$(VENV)/.test: pyproject.toml | $(VENV)/.layerlr
	$(PIP) --no-build-isolation -e ".[test]"
	PYTHONPATH=tests $(PY) -c "from simt_engine import build, unavailable; unavailable() or build()"
	touch $@

$(VENV)/.lint: pyproject.toml | $(VENV)/.test
	$(PIP) --no-build-isolation -e ".[lint]"
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/.layerlr
	$(PIP) --no-build-isolation -e ".[docs]"
	touch $@

clean:
	rm -rf build dist *.egg-info layerlr/*.so .pytest_cache .ruff_cache .mypy_cache $(VENV)/.layerlr
	find . -name .venv -prune -o -name __pycache__ -exec rm -rf {} +
