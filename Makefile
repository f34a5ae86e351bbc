# make venv    makes .venv with everything that the other targets need, and builds the native libraries in place
# make demo    runs a ResNet-50 with five units on a photo, with the fused kernels and with the reference
# make test    runs the tests (PYTEST_FLAGS="-k layouts" selects some of them)
# make test-slow   runs the tests that compile or interpret for minutes, which make test leaves out
# make lint    runs ruff, clang-format, mypy, and the check that no CPU variant's code replaces another's
# make bench   runs all benchmarks, and writes docs/benchmarks.md and its pictures (BENCH_FLAGS, RUN, PAGE, IMAGES);
#              with BENCH_FLAGS=--quick all output goes to build/bench
# make train   trains a small ResNet with and without attention on handwritten digits
# make gpu-report   builds the CUDA library for this machine's GPU, runs the GPU suite and the benchmarks on it, and writes
#              one file in benchmarks/results/ (REPORT_FLAGS)
# make docs    builds the site of the documentation into build/site, and fails on a broken link or reference
# make clean   removes all built files and .venv
#
# PYTHON is the interpreter that makes .venv. STEAM_KERNELS_BUILD is `require` here, so that make stops if a library
# cannot be built; `make test STEAM_KERNELS_BUILD=auto` continues without it. The CUDA library is built if nvcc is
# found, only for the GPUs of this machine (80-real if there is none), because all major architectures take minutes.
# setup.py finds the GPUs; CMAKE_CUDA_ARCHITECTURES=90-real chooses another architecture.

PYTHON ?= python3
STEAM_KERNELS_BUILD ?= require
CMAKE_CUDA_ARCHITECTURES ?= native
export STEAM_KERNELS_BUILD CMAKE_CUDA_ARCHITECTURES

VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
LIBRARY := steam_kernels/libsteam_cpu.so
NATIVE_SOURCES := $(shell find csrc include cmake -type f 2>/dev/null) CMakeLists.txt setup.py
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
REPORT_FLAGS ?=
# The times of a quick run mean nothing, so its output must not replace the committed run.
QUICK := $(filter --quick,$(BENCH_FLAGS))
RUN ?= $(if $(QUICK),build/bench/results,benchmarks/results/latest)
PAGE ?= $(if $(QUICK),build/bench/benchmarks.md,docs/benchmarks.md)
IMAGES ?= $(if $(QUICK),build/bench/images,docs/images)

.PHONY: venv demo test test-slow lint bench train gpu-report clean
.DELETE_ON_ERROR:

venv: $(INSTALLED) $(LIBRARY)

# The stamp is written last, so that make repeats an interrupted installation. venv and pip keep the parts that are
# complete. If pip itself is incomplete, the environment is made again.
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steam_kernels needs Python 3.10 or newer; PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	$(PYTHON) -m venv $(VENV) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	STEAM_KERNELS_BUILD=skip $(PY) -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@touch $@

$(LIBRARY): $(NATIVE_SOURCES) $(INSTALLED)
	$(PY) setup.py --quiet build_ext --inplace
	@if test -e $@; then touch $@; fi

demo: venv
	$(PY) examples/quickstart.py

test: venv
	$(PY) -m pytest tests -m "not slow" -n 2 --dist loadgroup $(PYTEST_FLAGS)

test-slow: venv
	$(PY) -m pytest tests -m slow -n 2 --dist loadgroup $(PYTEST_FLAGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	find csrc include examples/cpp tests/support/ptx -name '*.[ch]*' -o -name '*.cu*' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(PY) -m mypy
	$(PY) .ci/check_symbols.py build/cmake

# After a wrong or failed row, make still runs the other benchmarks and writes the page, and fails at the end.
bench: venv
	@mkdir -p $(RUN)
	rm -f $(addprefix $(RUN)/,unit.json unit.csv end_to_end.json host.json scaling.json)
	@failed=; \
	$(PY) -m pytest benchmarks --benchmark-only -q --json $(RUN)/unit.json $(BENCH_FLAGS) || failed="$$failed unit"; \
	for part in end_to_end host scaling; do \
		$(PY) -m benchmarks.$$part --json $(RUN)/$$part.json $(QUICK) || failed="$$failed $$part"; \
	done; \
	$(PY) -m benchmarks.report --run $(RUN) --page $(PAGE) --images $(IMAGES) || failed="$$failed report"; \
	if test -n "$$failed"; then echo "failed:$$failed"; exit 1; fi

train: venv
	$(PY) examples/train_digits.py --images $(IMAGES) --results benchmarks/results/train_digits.json

# The build runs each time, because the library in place may be for another GPU. Without the library there is still a
# report, which has the reason.
gpu-report: $(INSTALLED)
	STEAM_KERNELS_BUILD=auto $(PY) setup.py --quiet build_ext --inplace
	$(PY) -m benchmarks.gpu_report $(REPORT_FLAGS)

clean:
	rm -rf $(VENV) build dist *.egg-info steam_kernels/libsteam_*.so steam_kernels/_build.txt .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The site needs neither torch nor the package, so it has an environment of its own: the extra `docs` of pyproject.toml.
# mkdocs counts no warning with --quiet, and --strict would then pass.
DOCS := build/docs-venv
.PHONY: docs
docs: $(DOCS)/.installed
	NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict --clean
	@echo "the site is build/site/index.html"

$(DOCS)/.installed: pyproject.toml
	$(PYTHON) -m venv --clear $(DOCS)
	sed -n '/^docs = /{s/^docs = \[\(.*\)\]$$/\1/;s/", "/" "/g;p;}' pyproject.toml | \
		xargs $(DOCS)/bin/python -m pip install --disable-pip-version-check --quiet
	@touch $@
