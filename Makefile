# Two commands for everyone: `make score`, `make test`. Both set up their own .venv first.
PYTHON ?= python3
VENV   := .venv
PY     := $(VENV)/bin/python

export OMP_WAIT_POLICY ?= PASSIVE  # threads that spin while waiting make tests many times slower on a busy machine

JUDGE        := .cache/judge
JUDGE_PYTHON ?= $(shell python3.10 --version >/dev/null 2>&1 && echo python3.10 || echo $(PYTHON))

.PHONY: score test test-judge lint setup clean
score: setup
	@$(PY) -m submit score all --explain; status=$$?; \
	[ $$status -gt 1 ] || $(PY) -m submit report || status=$$?; \
	exit $$status

test: setup lint
	@$(PY) -m pytest -q --durations=8

# The three packages in a second environment with the judge's versions (torch 2.4.0, numpy 1.26.4; about 6 GB more).
test-judge: setup
	@mkdir -p $(JUDGE)
	@$(PY) -m submit.judge_requirements > $(JUDGE)/requirements.txt
	@cmp -s $(JUDGE)/requirements.txt $(JUDGE)/requirements.installed || { \
	  $(JUDGE_PYTHON) -m venv --clear $(JUDGE)/venv && \
	  $(JUDGE)/venv/bin/python -m pip install --quiet --disable-pip-version-check -r $(JUDGE)/requirements.txt && \
	  cp $(JUDGE)/requirements.txt $(JUDGE)/requirements.installed; }
	@rm -rf $(JUDGE)/packages
	@for task in retrieval anomaly backdoor; do \
	  $(PY) -m submit package $$task --out $(JUDGE)/packages/$$task && \
	  $(PY) -m submit check $(JUDGE)/packages/$$task && \
	  $(PY) -m submit run $(JUDGE)/packages/$$task.zip --python $(JUDGE)/venv/bin/python || exit 1; done

lint: setup
	@$(PY) -m ruff check .

# Redone only when the text of requirements.txt differs from what was installed last.
setup:
	@cmp -s requirements.txt $(VENV)/requirements.installed || $(MAKE) --no-print-directory install

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "$(PYTHON): expected Python >= 3.10, found " + sys.version.split()[0])'
	@echo "Setting up $(VENV) (once; several minutes, about 6 GB with the CUDA build of torch) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@cp requirements.txt $(VENV)/requirements.installed

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
