PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test slow device check versions bench notebooks docs dist release nightly clean
.DELETE_ON_ERROR:
.PRECIOUS: .venv-%/.ready

# The net is so small that threads would mostly wait for each other.
demo: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/hessfn report --out demo-report

test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

# What takes long, and at the end one at a time what measures memory or time. With the packages of others that hessfn meets.
slow: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[families,lightning]" tensorboard || echo "not all packages can be had: what needs the rest is skipped"
	$(BIN)/python -m pytest -m "slow and not alone" --numprocesses auto --timeout 1200
	$(BIN)/python -m pytest -m "slow and alone" --timeout 1200

# The tests of a device, on one that every machine with a compiler has (tests/devices.py): `make device DEVICE=cuda` on a GPU.
DEVICE ?= second
device: $(READY)
	HESSFN_TEST_DEVICE=$(DEVICE) $(BIN)/python -m pytest -m gpu tests/test_gpu.py tests/test_device_parity.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --doctest-modules hessfn

# The core of the suite (tests/conftest.py) on the oldest versions that pyproject.toml allows, and on the newest, each in an
# environment of its own. `make versions-2.12 PYTHON=python3.12` runs it on that torch. On Linux the package index has torch
# with CUDA alone, gigabytes of it; where it can be reached, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu has it
# without.
versions: versions-oldest versions-newest

versions-%: .venv-%/.ready
	OMP_NUM_THREADS=1 .venv-$*/bin/python -m pytest --numprocesses auto -m core

.venv-%/.ready: pyproject.toml tools/versions.py
	$$($(PYTHON) tools/versions.py python $*) -m venv --clear .venv-$*
	$(PYTHON) tools/versions.py constraints $* > .venv-$*/constraints.txt
	.venv-$*/bin/python -m pip install --quiet --constraint .venv-$*/constraints.txt -e ".[demo,dev]"
	.venv-$*/bin/python -m pip list | grep -iwE "torch|numpy|scipy"
	touch $@

# Peers are compared where they are installed: .venv/bin/pip install -e ".[bench]"
bench: $(READY)
	@set -e; for file in $(wildcard tests/bench/bench_*.py); do echo "== $$file"; $(BIN)/python $$file; done
	@$(if $(wildcard tests/bench/bench_*.py),:,echo "no benchmarks yet in tests/bench")

NOTEBOOKS := $(wildcard notebooks/*.ipynb)
notebooks: $(READY)
ifeq ($(NOTEBOOKS),)
	@echo "no notebooks yet in notebooks/"
else
	$(BIN)/python -m pip install --quiet -e ".[notebooks]"
	$(BIN)/python -m nbconvert --to notebook --execute --inplace $(NOTEBOOKS)
endif

# Strict: a link, a role or a formula that fails, fails the build. Then every page is looked at in a browser, if there is one.
docs: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[docs]"
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	HESSFN_SITE=build/docs $(BIN)/python -m pytest -q -n 0 tests/test_site.py
	@echo "documentation: build/docs/index.html, or served: $(PYTHON) -m http.server --directory build/docs"

# The source distribution and the wheel of this folder in dist/, checked and tried; `release` tests them, too (RELEASING.md).
dist: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[release]"
	$(BIN)/python tools/release.py --draft --skip-tests

release: $(READY)
	$(BIN)/python -m pip install --quiet -e ".[release]"
	$(BIN)/python tools/release.py

# What the next torch will change: make nightly VENV=.venv-nightly keeps it out of the usual environment.
TORCH_NIGHTLY ?= https://download.pytorch.org/whl/nightly/cpu
nightly: $(READY)
	-$(BIN)/python -m pip install --quiet --upgrade --pre torch torchvision --index-url $(TORCH_NIGHTLY)
	@$(BIN)/python -c "import torch; exit('dev' not in torch.__version__)" || \
	  { echo "nightly: no nightly build of torch can be had from $(TORCH_NIGHTLY), so nothing is tested"; exit 1; }
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

clean:
	rm -rf demo-report build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find hessfn tests -name __pycache__ -prune -exec rm -rf {} +

# Done once, and again when what is to be installed changes.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[demo,vision,transformers,dev]"
	touch $@
