# Each target sets up all that it needs in .venv; nothing else has to be installed but Python 3.11 or newer.
PYTHON ?= python3
DATA ?= $(or $(CLFRAME_DATA),$(HOME)/.cache/clframe)
BIN := .venv/bin
# What the many processes of the tests import is compiled once, and not by each of them.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo check test test-lowest docs docs-reference bench bench-full clean

demo: .venv/installed
	@rm -rf runs/demo
	$(BIN)/clframe compare --scenario permuted-digits --method ewc --method er --set ewc.form=online \
		--set train.iterations=200 --seeds 3 --output runs/demo
	@echo "Curves of every run: $(BIN)/tensorboard --logdir runs/demo/cells"

# In seconds, as mypy keeps its cache in .mypy_cache. Links lay the folders out as the packages that they are installed as.
check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python tests/prose.py
	@rm -rf build/typed && mkdir -p build/typed/clframe
	@ln -s $(patsubst %,../../../%,$(wildcard clframe/*) plugins scenarios cli) build/typed/clframe
	cd build/typed && ../../$(BIN)/mypy --cache-dir ../../.mypy_cache --config-file ../../pyproject.toml clframe ../../tests

test: check
	$(BIN)/python -m pytest -n 2 --dist loadgroup

test-lowest: build/lowest/installed
	build/lowest/bin/python -m pytest -n 2 --dist loadgroup

# Brings the generated parts of the pages up to date with the code; a test says when they are not.
docs-reference: .venv/installed
	$(BIN)/python docs/generate.py

docs: .venv/docs docs-reference
	@rm -rf build/docs
	$(BIN)/python docs/generate.py build/docs
	$(BIN)/zensical build --strict --config-file build/docs/mkdocs.yml
	@echo "Read it: build/docs/site/index.html"

bench: .venv/installed
	$(BIN)/python benchmarks/run.py short --data-root "$(DATA)"

bench-full: .venv/installed
	$(BIN)/python benchmarks/run.py full --data-root "$(DATA)"
	$(BIN)/python -m pytest -m long

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $@

# The lowest versions that pyproject.toml allows of what it names, in an environment of their own.
build/lowest/installed: pyproject.toml .venv/installed
	$(PYTHON) -m venv build/lowest
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	@touch $@

.venv/docs: .venv/installed
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[docs]'
	@touch $@

clean:
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
