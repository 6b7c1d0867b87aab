# make demo: text on this machine -> tokenizer -> model -> samples, about three minutes on two cores
# make lifecycle: text -> model -> chat -> preferences -> student, some seventeen minutes on two cores
# make test: every test, a process a core, each test file in one of them
# make bench: the tables of RESULTS.md

# An active virtual environment is used as it is; otherwise .venv is made and used.
VENV := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)
PYTHON := $(VENV)/bin/python
BASE := $(or $(shell command -v python3),python)

.PHONY: demo lifecycle test bench clean

demo: $(VENV)/.handmade-run
	$(PYTHON) data/prepare.py
	$(PYTHON) train.py config/demo.py
	$(PYTHON) sample.py --out_dir=out/demo --num_samples=3 --max_new_tokens=150

lifecycle: $(VENV)/.handmade-run
	$(PYTHON) lifecycle.py

test: $(VENV)/.handmade-test
	$(PYTHON) -m pytest tests -q -n auto --maxprocesses=8 --dist loadfile

bench: $(VENV)/.handmade-test
	$(PYTHON) bench.py tokenizer
	$(PYTHON) bench.py train

$(VENV)/bin/python:
	$(BASE) -m venv $(VENV)

# A stamp each: installing again only when the list changed
$(VENV)/.handmade-run: requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m pip install -q -r requirements.txt
	touch $@

$(VENV)/.handmade-test: requirements-test.txt requirements.txt | $(VENV)/bin/python
	$(PYTHON) -m pip install -q -r requirements-test.txt
	touch $@

clean:
	rm -rf out .pytest_cache __pycache__ */__pycache__
