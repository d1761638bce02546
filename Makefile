# What a developer does: demo, test, measure, package. Needs python3 (3.10 to 3.13) with venv, make and a C++ compiler.
# Environments are made below $(VENV): torch first, everything else under a constraint that keeps it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEVICE ?= cuda
MINUTES ?= 30
EXAMPLES ?= 3000
STEPS ?= 100000
KILLS ?= 200

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
INSTALL := $(PIP) install --no-build-isolation --constraint $(VENV)/constraints.txt
CXX_FILES = $(shell find csrc tests benchmarks \( -name '*.c' -o -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
BUILD_INPUTS = setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: help demo test test-all kernels fuzz sanitize soak kills lint format docs bench bench-peers gpu-report wheel clean

help:
	@echo 'make demo      train on digits, plain and regularized side by side; writes demo/comparison.png'
	@echo 'make test      lint and tests in an environment of its own'
	@echo 'make test-all  second tier: sanitizers, long fuzzing, the zoo, GPU kernels compiled, the wheel'
	@echo 'make kernels   every configuration of the GPU kernels, for all architectures; after a change of kernels/'
	@echo 'make fuzz      random architectures against plain autograd, MINUTES=30; inputs, files and commands, EXAMPLES=3000'
	@echo 'make sanitize  tests of the CPU library under address and thread sanitizers, inside of Python; half an hour'
	@echo 'make soak      STEPS=100000 steps in which nothing may grow        make kills  KILLS=200 runs that are killed and go on'
	@echo 'make lint      ruff, clang-format, mypy          make format  rewrite the sources in form'
	@echo 'make docs      the documentation site into build/site; SERVE=1 shows it and what changes'
	@echo 'make bench     benchmarks/ into benchmarks/results/'
	@echo 'make bench-peers  other libraries beside this one, in an environment of their own; 20 minutes'
	@echo 'make gpu-report  this GPU, into benchmarks/results/gpu/; DEVICE=cpu tries the report out'
	@echo 'make wheel     sdist and wheel in dist/, tried in an empty environment'
	@echo 'make clean     remove all that these make, the environment too'

demo: $(VENV)/.demo
	$(BIN)/bootgrad compare --data digits --train-size 256 --batch-size 32 --epochs 40 --lr 0.0005 \
		--reg1 0.01 --reg2 0.03 --center ema --out demo --overwrite

test: lint
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

test-all: $(VENV)/.dev
	$(BIN)/pytest -m slow --numprocesses 2 --dist loadfile
	$(MAKE) gpu-report DEVICE=cpu
	$(MAKE) wheel

kernels: $(VENV)/.dev
	mkdir -p build && rm -f build/kernel_resources
	EVERY_CONFIGURATION=1 KERNEL_RESOURCES=$(CURDIR)/build/kernel_resources \
		$(BIN)/pytest tests/kernels tests/cuda -m slow --numprocesses 2 --dist loadfile
	$(BIN)/python -m benchmarks.kernel_resources build/kernel_resources
	$(BIN)/python -m tests.proved

fuzz: $(VENV)/.dev
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES)
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/pytest tests/trust -k drawn --numprocesses 2

sanitize: $(VENV)/.dev
	$(BIN)/python -m tests.trust.sanitize

soak: $(VENV)/.dev
	$(BIN)/python -m tests.trust.soak --steps $(STEPS) --model small --json benchmarks/results/trust/soak.json

kills: $(VENV)/.dev
	$(BIN)/python -m tests.trust.kills --kills $(KILLS) --json benchmarks/results/trust/kills.json

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

# NO_MKDOCS_2_WARNING: an advertisement, which --strict would not count but readers would.
docs: $(VENV)/.dev
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs $(if $(SERVE),serve,build --strict --quiet)
	@$(if $(SERVE),,echo 'build/site/index.html')

bench: $(VENV)/.dev
	$(BIN)/pytest benchmarks --benchmark-only
	for model in reference mixed; do $(BIN)/python -m benchmarks.training_step --model $$model; done
	$(BIN)/python -m benchmarks.training_step --parts 8
	$(BIN)/python -m benchmarks.training_step --model resnet18 --batch 64 --rounds 7 --processes 1
	$(BIN)/python -m benchmarks.training_step --model encoder --batch 16 --rounds 7 --processes 1
	$(BIN)/python -m benchmarks.training_step --model words
	for model in encoder reference; do $(BIN)/python -m benchmarks.compiled --model $$model; done
	$(BIN)/python -m benchmarks.cost_model
	$(BIN)/python -m benchmarks.ceilings
	$(BIN)/python -m benchmarks.growth
	$(BIN)/python -m benchmarks.distributed
	$(BIN)/python -m benchmarks.numerics
	$(BIN)/python -m benchmarks.monitoring
	$(BIN)/python -m benchmarks.normalization_track

# PEERS: options, as --quick or --data cifar.npz; --help names them.
bench-peers:
	$(MAKE) VENV=$(VENV)-peers $(VENV)-peers/.peers
	$(VENV)-peers/bin/python -m benchmarks.peers $(PEERS)

# On a GPU: with the python that is there, without a network. REPORT: options, as --sections ops; --help names them.
gpu-report: $(if $(filter cpu,$(DEVICE)),$(VENV)/.dev)
	$(if $(filter cpu,$(DEVICE)),$(BIN)/python,$(PYTHON)) -m benchmarks.gpu_report --device $(DEVICE) $(REPORT)

# The libraries of torch come with torch, and are left out of the wheel; its tag is the oldest glibc that the build allows.
wheel: $(VENV)/.dev
	rm -rf dist build/lib.* build/temp.* build/bdist.* build/wheel
	BOOTGRAD_REQUIRE_EXT=1 $(BIN)/python -m build --no-isolation --outdir build/wheel
	mkdir -p dist && mv build/wheel/*.tar.gz dist
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' \
		--wheel-dir dist build/wheel/*-py3-none-linux_*.whl
	$(BIN)/twine check --strict dist/*
	$(BIN)/check-wheel-contents dist/*.whl
	wc -c dist/* && test "$$(cat dist/*.whl | wc -c)" -lt 20000000
	empty=$$(mktemp -d) && trap 'rm -rf "$$empty"' EXIT && \
		$(PYTHON) -m venv "$$empty/env" && \
		"$$empty/env/bin/python" -m pip --disable-pip-version-check --quiet install '$(TORCH)' && \
		cp tests/wheel_smoke.py "$$empty" && began=$$(date +%s) && \
		CC=/bin/false CXX=/bin/false "$$empty/env/bin/python" -m pip --disable-pip-version-check --quiet install \
			--constraint $(VENV)/constraints.txt dist/*.whl && \
		cd "$$empty" && env/bin/python wheel_smoke.py && \
		echo "from the wheel to the first Γ: $$(( $$(date +%s) - began )) s" && env/bin/bootgrad info

clean:
	rm -rf $(VENV) $(VENV)-peers build dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find bootgrad kernels tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
	rm -f bootgrad/*.so

# torch alone, so that nothing that comes after can choose another one
$(VENV)/constraints.txt:
	$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(None if (3, 10) <= v < (3, 14) else f"Python 3.10 to 3.13 is needed; {sys.executable} is {v[0]}.{v[1]}: set PYTHON=")'
	$(PYTHON) -m venv $(VENV)
	echo '*' > $(VENV)/.gitignore
	$(PIP) install '$(TORCH)'
	$(PIP) install --upgrade 'setuptools>=77' wheel ninja numpy
	$(BIN)/python -c 'import torch; print("torch==" + torch.__version__.partition("+")[0])' > $@

$(VENV)/.demo: $(VENV)/constraints.txt $(BUILD_INPUTS)
	if [ -e $(VENV)/.dev ]; then $(MAKE) $(VENV)/.dev; else BOOTGRAD_CUDA=0 $(INSTALL) --editable '.[cli]'; fi
	touch $@

$(VENV)/.dev: $(VENV)/constraints.txt $(BUILD_INPUTS)
	BOOTGRAD_REQUIRE_EXT=1 $(INSTALL) --editable '.[dev,cli,triton]'
	touch $@

# BackPACK asks for torchvision, which would bring another torch: it comes alone, with the rest of what it asks for.
$(VENV)/.peers: $(VENV)/constraints.txt $(BUILD_INPUTS)
	BOOTGRAD_REQUIRE_EXT=1 BOOTGRAD_CUDA=0 $(INSTALL) --editable '.[cli]'
	$(INSTALL) opacus==1.6.0 torchjd==0.18.0 einops==0.8.2 unfoldNd==0.2.3
	$(INSTALL) --no-deps backpack-for-pytorch==1.7.1
	touch $@
