# `make help` lists the targets. They need Python 3.10 or later, GNU make and, for the kernels, a C++
# compiler; everything else is installed into $(VENV).
PYTHON ?= python3
VENV ?= .venv
# The torch that pip installs; `make TORCH=torch==2.13.0 test` picks another.
TORCH ?= torch==2.14.1

BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --disable-pip-version-check -qq
# CUDA kernels are a third of the compile time, and useless without an NVIDIA GPU.
ifeq ($(findstring GPU,$(shell nvidia-smi -L 2>/dev/null)),)
FUSEDLOSS_CUDA ?= 0
endif
INSTALL = $(if $(FUSEDLOSS_CUDA),FUSEDLOSS_CUDA=$(FUSEDLOSS_CUDA)) $(PIP) install --no-build-isolation -e
# bench/tune.cu as a program, and the GPU that it is for: this machine's, or such as sm_90.
TUNE ?= build/tune
ARCH ?= native
NVCC ?= nvcc
SOURCES := $(shell find csrc -type f) setup.py fusedloss/_version.py

.DELETE_ON_ERROR:
.PHONY: help demo test test-compiled test-triton test-cuda-emulated bench gpu gpu-bench tune figures build docs dist lint clean

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## /make \1	/p' $(MAKEFILE_LIST)

demo: $(VENV)/build.stamp ## train with torch's losses and with ours, then a short speed table: minutes
	$(BIN)/python -m bench.demo
	$(BIN)/python -m bench --quick

test: test-compiled test-triton ## all tests

test-compiled: $(VENV)/build.stamp
	$(BIN)/python -m pytest tests

test-triton: $(VENV)/build.stamp
	TRITON_INTERPRET=1 FUSEDLOSS_TEST_BACKEND=triton $(BIN)/python -m pytest tests

test-cuda-emulated: $(VENV)/torch.stamp ## the CUDA kernels on the CPU, plain and under sanitizers
	@$(PIP) install 'pytest>=8' hypothesis numpy scikit-learn scipy
	$(BIN)/python -m pytest tests/cuda_emulator
	$(BIN)/python tests/cuda_emulator/extension.py

bench: $(VENV)/build.stamp ## the whole speed table
	$(BIN)/python -m bench

gpu: ## on an NVIDIA GPU: build, tests, sanitizers and bench, in the environment of PYTHON; installs nothing
	PYTHON=$(PYTHON) .ci/gpu

gpu-bench: ## on an NVIDIA GPU: the cases of the bench that match ONLY, beside PEERS; PACKAGE saves the build
	@test -n "$(ONLY)" || { echo >&2 "make gpu-bench ONLY='speed: cross_entropy' [PEERS=eager,compile]"; exit 2; }
	PYTHON=$(PYTHON) ONLY='$(ONLY)' PEERS='$(PEERS)' .ci/gpu

tune: $(TUNE) ## compile the program that times and checks CUDA kernels on a GPU; ARCH=sm_90 names one that is not here

$(TUNE): bench/tune.cu $(SOURCES)
	@mkdir -p $(@D)
	$(NVCC) $$($(PYTHON) -c 'import runpy; print(*runpy.run_path("fusedloss/_toolkit.py")["NVCC_FLAGS"])') \
	  -arch=$(ARCH) --threads 0 bench/tune.cu csrc/cuda/pointwise.cu -o $@

figures: $(VENV)/build.stamp ## write the figures of README and docs, from bench/results
	$(BIN)/python -m bench figures

build: $(VENV)/build.stamp ## the environment and the extension

docs: $(VENV)/docs.stamp ## the pages, into build/site; a broken link fails
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --site-dir build/site

dist: $(VENV)/torch.stamp ## sdist and wheel for the torch in the environment, into dist/
	@$(PIP) install build
	$(BIN)/python -m build --no-isolation

lint: $(VENV)/lint.stamp ## ruff, mypy and clang-format, changing nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	find csrc bench tests/cuda_emulator -name '*.h' -o -name '*.c*' | grep -v pycache | xargs $(BIN)/clang-format --dry-run -Werror

clean: ## remove what was built; the environment stays
	rm -rf build dist fusedloss/*.so *.egg-info $(VENV)/build.stamp

# A stamp is written when its step has succeeded, so an interrupted step runs again.

ifneq ($(shell $(BIN)/python -c 'import pip; print("works")' 2>/dev/null),works)
.PHONY: $(VENV)/python.stamp
endif
$(VENV)/python.stamp:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { echo >&2 \
	  'fusedloss needs Python 3.10 or later as $(PYTHON); PYTHON=... picks another'; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo >&2 \
	  '$(PYTHON) cannot make environments: install its venv module (Debian: python3-venv)'; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

ifneq ($(shell cat $(VENV)/torch.stamp 2>/dev/null),$(TORCH))
.PHONY: $(VENV)/torch.stamp
endif
$(VENV)/torch.stamp: $(VENV)/python.stamp
	@echo 'installing $(TORCH), which can take minutes'
	@$(PIP) install $(TORCH) 'setuptools>=77' ninja
	@echo '$(TORCH)' > $@

ifneq ($(shell cat $(VENV)/build.stamp 2>/dev/null),$(FUSEDLOSS_CUDA))
.PHONY: $(VENV)/build.stamp
endif
$(VENV)/build.stamp: $(VENV)/torch.stamp pyproject.toml $(SOURCES)
	@echo 'installing fusedloss, compiling what has changed'
	@$(INSTALL) '.[test,bench]'
	@echo '$(FUSEDLOSS_CUDA)' > $@

$(VENV)/lint.stamp: $(VENV)/build.stamp pyproject.toml
	@$(INSTALL) '.[dev]'
	@touch $@

# No torch: the API reference is read from the sources.
$(VENV)/docs.stamp: $(VENV)/python.stamp docs/requirements.txt
	@$(PIP) install -r docs/requirements.txt
	@touch $@
