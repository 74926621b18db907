# make demo   a real model pair, built and answering a prompt
# make test   the tests          make lint   ruff, pyright, pins      make bench   the three modes timed side by side
# make serve  the demo's engine behind a Triton Inference Server and an OpenAI-compatible port; make serve-env sets that up
# make soak   ten minutes of load on a served engine, every answer checked; make faults  kill, stop and damage every part
# make clean  remove what the other targets made here: the environment, fetched models, the demo's engine, caches
#
# Each target sets up what it needs the first time and does nothing again the next. Variables to override:
#   PYTHON=python3.12     the interpreter of the virtual environment (3.11 to 3.13)
#   PIP_FLAGS=...         further options of pip install, such as --extra-index-url or --find-links
#   PROMPT="..."          what the demo asks
#   TESTS="tests/build"   what to test, and with which options of pytest
#   WORKERS=0             test in that many processes at once; 0 in this one. Three keep two cores busy: the tests of
#                         servers and of ranks mostly wait
#   SOAK="--seconds 60"   how long to soak; --engine DIR soaks that one instead of a tiny random one
#   FAULTS="--only stub"  which faults

PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo $$python && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)

TARGET := .models/smollm2-135m-instruct
DRAFT := .models/smollm2-draft
SHIPPED := $(wildcard models/smollm2-draft/*)
ENGINE := engines/smollm2-tp1
BUILD := --particles 16 --draft-tokens 8 --max-seq-len 2048
WORKERS ?= 3
PROMPT ?= Why is the sky blue? Answer in two sentences.
RUN := --n 8 --k 4 --temperature 0.7 --seed 2 --max-tokens 120
HASHED := --no-deps --require-hashes
DEV_REQUIREMENTS := $(patsubst %,requirements/%.txt,dev fp8 mpi serve-test tensorrt)
CHECKED := build smc_plugin engines triton_repo scripts tests
SERVE_ENV := .venv-serve
SERVE := --openai-port 8080
SOAK := --seconds 600

.PHONY: demo test lint bench serve serve-env soak faults models hashes audit clean
.DELETE_ON_ERROR:

demo: $(ENGINE)/manifest.json
	@$(BIN)/smc-run --engine $(ENGINE) $(RUN) "$(PROMPT)"

test: $(VENV)/.dev-installed $(DRAFT)/config.json $(SERVE_ENV)/.installed
	@$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(VENV)/.dev-installed
	$(BIN)/ruff check $(CHECKED)
	$(BIN)/ruff format --check $(CHECKED)
	$(BIN)/pyright
	$(BIN)/python scripts/check_requirements.py

bench: $(ENGINE)/manifest.json
	$(BIN)/smc-bench --engine $(ENGINE)

serve: $(ENGINE)/manifest.json serve-env
	@$(BIN)/smc-serve --engine $(ENGINE) $(SERVE)

soak: serve-env
	@$(BIN)/python scripts/soak.py $(SOAK)

faults: serve-env
	@$(BIN)/python scripts/faults.py $(FAULTS)

serve-env: $(VENV)/.serve-installed $(SERVE_ENV)/.installed

models: $(DRAFT)/config.json

# what the hashed requirements are made of lies beside them
hashes:
	@for file in $(basename $(notdir $(wildcard requirements/*.in))); do \
		uv pip compile requirements/$$file.in --no-deps --generate-hashes --no-annotate --python-version 3.11 --quiet \
			--custom-compile-command "make hashes" --output-file requirements/$$file.txt || exit 1; done

audit:
	pip-audit --disable-pip --progress-spinner off $(patsubst %.in,-r %.txt,$(wildcard requirements/*.in))

clean:
	rm -rf $(VENV) $(SERVE_ENV) .models $(ENGINE) .pytest_cache .ruff_cache .hypothesis dist
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +

# Hashed and complete, so nothing is resolved. Then torch, of which each kind of machine has a build of its own.
$(VENV)/.runtime-installed: requirements/torch.txt requirements/runtime.txt pyproject.toml
ifeq ($(PYTHON),)
	$(error no Python 3.11, 3.12 or 3.13 was found, one is needed: install it, or name it with make PYTHON=/path/to/python3.11)
endif
	@echo "setting up $(VENV) with $(PYTHON) (some minutes the first time)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo "$(PYTHON) could not make a virtual environment: install its venv package (python3-venv)" >&2; exit 1; }
	@$(PIP) $(HASHED) -r requirements/runtime.txt
	@$(PIP) -r requirements/torch.txt
	@$(PIP) --no-deps -e .
	@touch $@

$(VENV)/.dev-installed: $(VENV)/.serve-installed $(DEV_REQUIREMENTS)
	@echo "adding what tests and lint need"
	@$(PIP) $(HASHED) $(DEV_REQUIREMENTS:%=-r %)
	@touch $@

$(VENV)/.serve-installed: $(VENV)/.runtime-installed requirements/serve.txt
	@echo "adding what serving needs"
	@$(PIP) $(HASHED) -r requirements/serve.txt
	@touch $@

# an environment of its own, because the server's Python backend needs numpy below 2
$(SERVE_ENV)/.installed: requirements/serve-stub.txt requirements/serve-server.txt | $(VENV)/.runtime-installed
	@echo "setting up $(SERVE_ENV) with the Triton Inference Server"
	@test -x $(SERVE_ENV)/bin/python || $(PYTHON) -m venv $(SERVE_ENV)
	@$(SERVE_ENV)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) $(HASHED) \
		-r requirements/serve-stub.txt -r requirements/serve-server.txt
	@touch $@

# fetch_models.py keeps a folder that is there, so other shipped layers need the draft assembled anew
$(DRAFT)/config.json: $(SHIPPED) | $(VENV)/.runtime-installed
	@rm -rf $(DRAFT)
	@$(BIN)/python scripts/fetch_models.py --output $(dir $(TARGET))

$(ENGINE)/manifest.json: $(DRAFT)/config.json $(wildcard build/*.py) | $(VENV)/.runtime-installed
	@$(BIN)/smc-build --checkpoint $(TARGET) --draft $(DRAFT) --output $(ENGINE) $(BUILD) --force
