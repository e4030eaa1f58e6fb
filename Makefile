# The doors. No logic and no dependency graph but the virtual environment: finished work is found
# in the store. `make` alone explains itself.

RECIPE ?= w4a16
MODEL ?= builtin/tiny-wan
PROMPT ?= a red circle moving right on a black background
BUILD ?= build
PYTHON ?= python3
VENV ?= .venv
# rocm or migraphx put that build of ONNX Runtime in place of the CPU one; for torch on ROCm also
# say TORCH_INDEX=https://download.pytorch.org/whl/rocm<version> before the first install
EXTRA ?=
# of `release`: a private key in PEM
KEY ?=
# of `bench-failures`: a folder of videos, beside drawn scenes
REAL ?=
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH ?= torch==2.13.0 torchvision==0.28.0
# of bench-scale's random checkpoints; 5B needs 10 GB of disk for the checkpoint, as much for results,
# and two hours with the calibrated recipe; TI2V-5B, with UMT5-XXL and VAE, 40 GB
SIZES ?= 0.3B 1.3B 5B
SCALED ?= w4a16-fast w4a16

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
HBXT := $(BIN)/hbxt
STORE := $(BUILD)/store
NAME := $(patsubst %.yaml,%,$(notdir $(RECIPE)))
ARTIFACT := $(BUILD)/$(NAME)/artifact
REPORT := $(BUILD)/$(NAME)/report

.DEFAULT_GOAL := help
.PHONY: help setup quantize evaluate release generate recipes browser test check bench bench-quality bench-scale bench-speed bench-students bench-gate bench-failures bench-light bench-w8a8 bench-fit bench-fuzz cards amd-wheels reference-model clean

help: ## explain these targets
	@echo "make quantize RECIPE=w4a16 compresses the built-in model; nothing else has to be run first."
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile
	@echo "Variables: RECIPE=$(RECIPE) MODEL=$(MODEL) BUILD=$(BUILD) EXTRA=$(EXTRA) PYTHON=$(PYTHON)"

setup: $(VENV)/installed ## only install, into .venv; EXTRA=rocm or EXTRA=migraphx for AMD GPUs
ifneq ($(EXTRA),)
	$(PIP) install -e ".[$(EXTRA)]"
	$(PIP) uninstall --yes onnxruntime onnxruntime-rocm onnxruntime-migraphx
	$(PIP) install --no-deps "onnxruntime-$(EXTRA)"
endif

# PyTorch's own index has the small CPU build. It is asked for these two packages only, and briefly:
# where it cannot be reached pip takes what its usual index has.
$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_INDEX) $(TORCH)
	$(PIP) install -e ".[dev]"
	@touch $@

quantize: $(VENV)/installed ## compress MODEL by RECIPE, measure the loss: build/<recipe>/{artifact,report}
	$(HBXT) quantize $(RECIPE) --model $(MODEL) --store $(STORE) --out $(ARTIFACT)
	$(HBXT) evaluate $(ARTIFACT) --store $(STORE) --out $(REPORT)

evaluate: $(VENV)/installed ## measure the loss again
	$(HBXT) evaluate $(ARTIFACT) --store $(STORE) --out $(REPORT)

release: $(VENV)/installed ## artifact, report, card and licences in one folder: build/<recipe>/release; KEY=key.pem signs it
	rm -rf $(BUILD)/$(NAME)/release
	$(HBXT) release $(ARTIFACT) --report $(REPORT) --out $(BUILD)/$(NAME)/release $(if $(KEY),--key $(KEY))

generate: $(VENV)/installed ## a clip of PROMPT with the compressed model: build/<recipe>/clip.mp4
	$(HBXT) generate $(ARTIFACT) --prompt "$(PROMPT)" --out $(BUILD)/$(NAME)/clip.mp4

recipes: $(VENV)/installed ## list the recipes
	$(HBXT) recipes

browser: $(VENV)/installed ## a Chromium for the tests of pages, if one can be had: Debian's, or Playwright's
	@command -v chromium >/dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get -qq update && apt-get -qq install -y --no-install-recommends chromium >/dev/null; } \
		|| $(BIN)/python -m playwright install --with-deps chromium </dev/null \
		|| echo "no Chromium can be had here, tests/browser will be skipped"

test: $(VENV)/installed ## run every test, on up to four cores
	$(BIN)/python -m pytest -n logical --maxprocesses 4 --dist loadfile

check: $(VENV)/installed ## formatting, lint, types, architecture
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy tests/bench/*.py
	$(BIN)/python -m pytest -q tests/test_architecture.py

bench: $(VENV)/installed ## time RECIPE from an empty store
	rm -rf $(BUILD)/timing
	@began=$$(date +%s); $(HBXT) quantize $(RECIPE) --model $(MODEL) --store $(BUILD)/timing && \
		echo "$(RECIPE): $$(( $$(date +%s) - began )) s"

bench-quality: $(VENV)/installed ## this project's recipes against the other toolkits: build/bench/quality.{json,md,svg}
	$(BIN)/python tests/bench/quality.py

bench-scale: $(VENV)/installed ## time and memory at SIZES against the machine's floor: build/bench/scale.{json,md,svg}
	$(BIN)/python tests/bench/scale.py --sizes $(SIZES) --recipes $(SCALED) --out $(BUILD)/bench

bench-speed: $(VENV)/installed ## a step of every component beside torch, and recipes beside float32: build/bench/speed.{json,md}
	$(BIN)/python tests/bench/speed.py --out $(BUILD)/bench

bench-students: $(VENV)/installed ## students beside their teacher, 256 clips each: build/bench/students.{json,md}
	$(BIN)/python tests/bench/students.py --out $(BUILD)/bench

bench-gate: $(VENV)/installed ## how often the gate fails full precision disturbed by rounding: build/bench/gate.json
	$(BIN)/python tests/bench/gate.py --store $(STORE) --out $(BUILD)/bench

bench-failures: $(VENV)/installed ## what the failure detectors catch and let pass: drawn scenes, and videos in REAL=folder
	$(BIN)/python tests/bench/failures.py $(if $(REAL),--real $(REAL)) --out $(BUILD)/bench/failures

bench-w8a8: $(VENV)/installed ## a step with 8-bit activations against the float32 graph, ONNX Runtime CPU
	$(BIN)/python tests/bench/w8a8_speed.py --json $(BUILD)/bench/w8a8.json

bench-fit: $(VENV)/installed ## memory of ONNX Runtime CPU as foretold and as measured
	$(BIN)/python tests/bench/fit.py --models $(BUILD)/bench/hollow

bench-fuzz: $(VENV)/installed ## 1000 malformed inputs through the command line: a table of how each kind ended
	$(BIN)/python tests/bench/fuzz.py --n 1000

bench-light: $(VENV)/installed ## the light decoder in the folder STUDENT against the full one: speed, PSNR, temporal error
	$(BIN)/python tests/bench/light_decoder.py $(STUDENT) --json $(BUILD)/bench/light.json --sheet $(BUILD)/bench/light.png

cards: $(VENV)/installed ## which card takes which recipe, as a Markdown table; nothing is run
	$(BIN)/python tests/bench/cards.py --models $(BUILD)/bench/hollow

amd-wheels: $(VENV)/installed ## run the artifact on onnxruntime-rocm and -migraphx, CPU only, in venvs of their own
	tests/amd_wheels.sh $(ARTIFACT) $(PYTHON)

reference-model: $(VENV)/installed ## train the built-in model again from nothing (about two hours)
	$(BIN)/python -m hbxt_compress.reference.train

clean: ## remove results and caches, keep the installation
	rm -rf $(BUILD) .hbxt dist .pytest_cache .mypy_cache .ruff_cache
