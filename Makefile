# make demo    runs a ResNet-50 with five units on a photo, with the fused kernels and with the reference. It installs only
#              what the demo needs, and compiles the CPU kernels for this processor alone
# make test    runs the tests that show most in the least time (PYTEST_FLAGS="-k layouts" selects some of them)
# make test-all    runs these and then all other tests; CI does so
# make venv    makes .venv with everything that all targets need, and builds the native libraries in place
# make lint    runs ruff, clang-format, mypy, and the check that no CPU variant's code replaces another's
# make bench   runs all benchmarks, and writes docs/benchmarks.md and its pictures (BENCH_FLAGS, RUN, BEFORE, PAGE,
#              IMAGES); the run that was in RUN moves to BEFORE, and the page compares both;
#              with BENCH_FLAGS=--quick all output goes to build/bench
# make bench-short   measures this machine in a few minutes, and writes benchmarks/results/<processor>/ and
#              docs/machines.md; with BENCH_FLAGS=--quick to build/bench
# make train   trains a small ResNet with and without attention on handwritten digits
# make gpu-report   builds the CUDA library for this machine's GPU, runs the GPU suite and the benchmarks on it, and writes
#              one file in benchmarks/results/ (REPORT_FLAGS)
# make wheel   writes to dist/ an sdist, and a wheel of the CPU kernels for any Python and any torch from 2.10
# make wheel-aarch64    writes to dist/ the wheel for 64-bit ARM, by a cross compiler
# make docs    builds the site of the documentation into build/site, and fails on a broken link or reference
# make clean   removes all built files and .venv
#
# PYTHON is the interpreter that makes .venv. STEAM_KERNELS_BUILD is `require` here, so that make stops if a library
# cannot be built; `make test STEAM_KERNELS_BUILD=auto` continues without it. The CUDA library is built if nvcc is
# found, only for the GPUs of this machine (80-real if there is none), because all major architectures take minutes.
# setup.py finds the GPUs; CMAKE_CUDA_ARCHITECTURES=90-real chooses another architecture. The demo builds the CUDA library
# only where there is a GPU.

PYTHON ?= python3
STEAM_KERNELS_BUILD ?= require
CMAKE_CUDA_ARCHITECTURES ?= native
export STEAM_KERNELS_BUILD CMAKE_CUDA_ARCHITECTURES
# pip writes no bytecode, which would take a minute for modules that nothing imports. So an import must keep what it
# compiles, or each process compiles torch again.
unexport PYTHONDONTWRITEBYTECODE

VENV := .venv
PY := $(VENV)/bin/python
DEMO_INSTALLED := $(VENV)/.demo-installed
INSTALLED := $(VENV)/.installed
LIBRARY := steam_kernels/libsteam_cpu.so
ALL_VARIANTS := build/.all-variants
NATIVE_SOURCES := $(shell find csrc include cmake -type f 2>/dev/null) CMakeLists.txt setup.py
MACHINE := $(shell uname -m)
WHEEL_PLATFORM ?= manylinux_2_28_$(MACHINE)
# The oldest torch that the wheel runs on, for 64-bit ARM. The cross compiler reads its headers and links to it.
AARCH64_TORCH := build/aarch64-torch-2.10.0
GPU := $(wildcard /dev/nvidia[0-9]* /dev/kfd /dev/dxg)
PYTEST_FLAGS ?=
BENCH_FLAGS ?=
REPORT_FLAGS ?=
# The times of a quick run mean nothing, so its output must not replace the committed run.
QUICK := $(filter --quick,$(BENCH_FLAGS))
RUN ?= $(if $(QUICK),build/bench/results,benchmarks/results/latest)
PAGE ?= $(if $(QUICK),build/bench/benchmarks.md,docs/benchmarks.md)
IMAGES ?= $(if $(QUICK),build/bench/images,docs/images)
BEFORE ?= $(if $(QUICK),build/bench/before,benchmarks/results/before)
RESULTS ?= $(if $(QUICK),build/bench/machines,benchmarks/results)
MACHINES ?= $(if $(QUICK),build/bench/machines.md,docs/machines.md)

.PHONY: venv demo test test-all lint bench bench-short train gpu-report wheel wheel-aarch64 cross-compiler clean
.DELETE_ON_ERROR:

venv: $(INSTALLED) $(ALL_VARIANTS)

say = @echo "steam_kernels: $(1)"

# $(1): the extras of pyproject.toml to install; $(2): the instruction sets to compile for. The compiler works while pip
# downloads and unpacks torch, which takes about as long. pip leaves the bytecode of what the environment never imports
# uncompiled. The stamp is written last, so that make repeats an interrupted installation. venv and pip keep the parts that
# are complete. If pip itself is incomplete, the environment is made again.
define install
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "steam_kernels needs Python 3.10 or newer; PYTHON=$(PYTHON) is " + sys.version.split()[0])'
	$(call say,making $(VENV) and installing the build tools)
	@$(PYTHON) -m venv $(VENV) && $(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@$(PIP) 'setuptools>=77' 'cmake>=3.18' ninja
	$(call say,installing torch and the packages of the extra '$(1)' (minutes); compiling the CPU kernels meanwhile)
	@STEAM_KERNELS_CPU_VARIANTS=$(2) nice $(PY) setup.py --quiet build_kernels & \
		STEAM_KERNELS_BUILD=skip $(PIP) --no-build-isolation --editable '.[$(1)]'; status=$$?; wait; exit $$status
endef
PIP := $(PY) -m pip install --disable-pip-version-check --quiet --no-compile

$(DEMO_INSTALLED): pyproject.toml
	$(call install,demo,native)
	@touch $@

# The development environment contains the demo's.
$(INSTALLED): pyproject.toml
	$(call install,dev,all)
	@touch $(DEMO_INSTALLED) $@

# The library in place has the kernels of this processor, and perhaps of others.
$(LIBRARY): $(NATIVE_SOURCES) $(DEMO_INSTALLED)
	$(call say,building the library for this processor)
	@$(if $(GPU),,STEAM_KERNELS_CUDA=off) STEAM_KERNELS_CPU_VARIANTS=native $(PY) setup.py --quiet build_ext --inplace
	@if test -e $@; then touch $@; fi

# CMake keeps what $(LIBRARY) has compiled.
$(ALL_VARIANTS): $(NATIVE_SOURCES) $(INSTALLED)
	$(call say,building the libraries for all processors)
	@$(PY) setup.py --quiet build_ext --inplace
	@mkdir -p $(@D) && touch $@
	@if test -e $(LIBRARY); then touch $(LIBRARY); fi

demo: $(DEMO_INSTALLED) $(LIBRARY)
	$(call say,running the demo)
	@$(PY) examples/quickstart.py

test: venv
	$(PY) -m pytest tests -m "not slow" -n 2 --dist loadgroup $(PYTEST_FLAGS)

test-all: test
	$(PY) -m pytest tests -m slow -n 2 --dist loadgroup $(PYTEST_FLAGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	git ls-files '*.c' '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(VENV)/bin/clang-format --dry-run -Werror
	$(PY) -m mypy
	$(PY) .ci/check_symbols.py build/cmake

# After a wrong or failed row, make still runs the other benchmarks and writes the page, and fails at the end.
# A whole run in the folder becomes the run before, with which the page compares the new one.
bench: venv
	@if test -f $(RUN)/conditions.json; then rm -rf $(BEFORE) && mv $(RUN) $(BEFORE); fi
	@mkdir -p $(RUN)
	rm -f $(addprefix $(RUN)/,unit.json unit.csv end_to_end.json latency.json host.json scaling.json conditions.json)
	@failed=; \
	$(PY) -m pytest benchmarks --benchmark-only -q --json $(RUN)/unit.json $(BENCH_FLAGS) || failed="$$failed unit"; \
	for part in end_to_end latency host scaling conditions; do \
		$(PY) -m benchmarks.$$part --json $(RUN)/$$part.json $(QUICK) || failed="$$failed $$part"; \
	done; \
	$(PY) -m benchmarks.report --run $(RUN) --before $(BEFORE) --page $(PAGE) --images $(IMAGES) || failed="$$failed report"; \
	if test -n "$$failed"; then echo "failed:$$failed"; exit 1; fi

# The fused unit at the 16 rows of ResNet-50's stages, the price of attention, and the host's overhead.
bench-short: venv
	@folder=$$($(PY) -m benchmarks.machines --folder --results $(RESULTS)) && mkdir -p $$folder || exit 1; \
	rm -f $$folder/unit.json $$folder/end_to_end.json $$folder/host.json; failed=; \
	$(PY) -m pytest benchmarks --benchmark-only -q --size 56,28,14,7 --batch 32 --contender fused \
		--json $$folder/unit.json $(QUICK) || failed="$$failed unit"; \
	$(PY) -m benchmarks.end_to_end --mode eager --contender steam --seconds 10 --json $$folder/end_to_end.json $(QUICK) \
		|| failed="$$failed end_to_end"; \
	$(PY) -m benchmarks.host --json $$folder/host.json $(QUICK) || failed="$$failed host"; \
	$(PY) -m benchmarks.machines --results $(RESULTS) --page $(MACHINES) || failed="$$failed machines"; \
	if test -n "$$failed"; then echo "failed:$$failed"; exit 1; fi

train: venv
	$(PY) examples/train_digits.py --images $(IMAGES) --results benchmarks/results/train_digits.json

# The build runs each time, because the library in place may be for another GPU. Without the library there is still a
# report, which has the reason.
gpu-report: $(INSTALLED)
	STEAM_KERNELS_BUILD=auto $(PY) setup.py --quiet build_ext --inplace
	$(PY) -m benchmarks.gpu_report $(REPORT_FLAGS)

# auditwheel checks that the wheel needs no newer glibc and libstdc++ than torch's own wheels. CUDA kernels would make it
# ten times as large; users with a GPU have the Triton kernels, or build the sdist.
repair := repair --only-plat --exclude libtorch_cpu.so --wheel-dir dist

wheel: venv
	rm -rf build/wheel dist/steam_kernels-*.tar.gz dist/steam_kernels-*_$(MACHINE).whl
	@mkdir -p build/wheel dist
	STEAM_KERNELS_CUDA=off $(PY) -m build --no-isolation --sdist --wheel --outdir build/wheel .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -m auditwheel $(repair) --plat $(WHEEL_PLATFORM) --strip build/wheel/*.whl
	mv build/wheel/*.tar.gz dist

# auditwheel knows only the platforms of the machine that Python names, and would call that machine's strip. So the linker
# strips the library, and Python names the other machine.
wheel-aarch64: cross-compiler $(INSTALLED) $(AARCH64_TORCH)/.installed
	rm -rf build/wheel-aarch64 dist/steam_kernels-*_aarch64.whl
	@mkdir -p build/wheel-aarch64 dist
	STEAM_KERNELS_CUDA=off STEAM_KERNELS_TORCH=$(AARCH64_TORCH)/torch CMAKE_TOOLCHAIN_FILE=cmake/aarch64.cmake \
		LDFLAGS=-s $(PY) -m build --no-isolation --wheel --config-setting=--build-option=--plat-name=linux_aarch64 \
		--outdir build/wheel-aarch64 .
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(PY) -c 'import platform, sys; platform.machine = lambda: "aarch64"; \
		from auditwheel.main import main; sys.exit(main())' $(repair) --plat manylinux_2_28_aarch64 build/wheel-aarch64/*.whl

cross-compiler:
	@command -v aarch64-linux-gnu-g++ >/dev/null || \
		{ echo "steam_kernels: aarch64-linux-gnu-g++ was not found (apt-get install g++-aarch64-linux-gnu)"; exit 1; }

$(AARCH64_TORCH)/.installed: | $(INSTALLED)
	rm -rf $(@D)
	$(PIP) --target $(@D) --no-deps --platform manylinux_2_28_aarch64 --python-version 311 --only-binary :all: torch==2.10.0
	@touch $@

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
