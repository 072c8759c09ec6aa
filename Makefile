# Two commands: `make demo` and `make test`. Both set up .venv with the tested versions first.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python

.PHONY: demo reproduce test mutants mutants-wide test-all benchmark gpu lint clean

demo: $(VENV)/.installed
	$(RUN) train.py configs/quickstart.yaml
	$(RUN) eval.py runs/quickstart
	@echo "open runs/quickstart/report.html, then try:"
	@echo "  $(RUN) eval.py runs/quickstart --ask deepseek distillation"

# Train again from scratch, under another name, and compare with the committed results.
reproduce: $(VENV)/.installed
	rm -rf runs/trace-float64-again runs/quickstart-again
	$(RUN) train.py configs/trace-float64.yaml --fresh name=trace-float64-again
	$(RUN) eval.py runs/trace-float64-again --check trace-float64
	$(RUN) train.py configs/quickstart.yaml --fresh name=quickstart-again
	$(RUN) eval.py runs/quickstart-again --check quickstart

test: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2 --dist loadgroup -m "not slow"

# The known bugs of distillation code, planted one by one: the tests must go red.
mutants: $(VENV)/.installed-test
	$(RUN) -m pytest -n 2 -m slow tests/test_mutants.py

# A few hundred generated changes: the share that the tests notice, by module.
mutants-wide: $(VENV)/.installed-test
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[mutants]"
	$(RUN) -m tests.mutants_wide

test-all: $(VENV)/.installed-test
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[llama-cpp]"
	$(RUN) -m pytest

benchmark: $(VENV)/.installed-test
	$(RUN) -m tests.benchmarks.speed
	$(RUN) -m tests.benchmarks.busy

# One GPU; 8 minutes.
gpu: $(VENV)/.installed-test
	$(RUN) -m tests.benchmarks.gpu

lint: $(VENV)/.installed-test
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .

SUPPORTED := import sys; sys.version_info >= (3, 11) or sys.exit(f"error: {sys.executable} is \
	Python {sys.version.split()[0]}; 3.11 or later is needed: make PYTHON=/path/to/python3.11")

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c '$(SUPPORTED)'
	@$(RUN) -c '$(SUPPORTED)' 2> /dev/null || rm -rf $(VENV)  # made with an older one
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt -e .
	$(RUN) -m experiment.install
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(RUN) -m pip install --quiet -c constraints.txt -e ".[test]"
	touch $@

clean:
	rm -rf $(VENV) *.egg-info .pytest_cache .ruff_cache
