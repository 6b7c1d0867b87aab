# make demo: text on this machine -> tokenizer -> model -> samples, about three minutes on two cores
# make lifecycle: text -> model -> chat -> preferences -> student, some seventeen minutes on two cores
# make test: every test, one process per core, each test file in one of them
# make lint: ruff, and the layout of the tree
# make bench: the tables of RESULTS.md
# make stress: kills, signals, damaged files and simultaneous runs, at most twenty minutes

# An active virtual environment is used unchanged; otherwise .venv is made and used. Its path may have
# spaces: it is quoted in commands, and never the name of a target.
VENV := $(or $(VIRTUAL_ENV),.venv)
PYTHON := "$(VENV)/bin/python"
BASE := "$(or $(shell command -v python3),python)"

.PHONY: demo lifecycle test lint bench stress clean packages test-packages

demo: packages
	$(PYTHON) data/prepare.py
	$(PYTHON) train.py config/demo.py
	$(PYTHON) sample.py --out_dir=out/demo --num_samples=3 --max_new_tokens=150

lifecycle: packages
	$(PYTHON) benchmarks/lifecycle.py

test: test-packages
	$(PYTHON) -m pytest tests -q -n auto --maxprocesses=8 --dist loadfile

lint: test-packages
	$(PYTHON) -m ruff check .
	$(PYTHON) -m pytest tests/test_layout.py -q

bench: test-packages
	$(PYTHON) bench.py tokenizer
	$(PYTHON) bench.py train

stress: test-packages
	$(PYTHON) tests/stress.py

# A stamp in the environment for each list: installing again only when the list has changed
packages:
	@test -x $(PYTHON) || $(BASE) -m venv "$(VENV)"
	@test "$(VENV)/.handmade-run" -nt requirements.txt || \
		{ $(PYTHON) -m pip install -q -r requirements.txt && touch "$(VENV)/.handmade-run"; }

test-packages: packages
	@test "$(VENV)/.handmade-test" -nt requirements-test.txt || \
		{ $(PYTHON) -m pip install -q -r requirements-test.txt && touch "$(VENV)/.handmade-test"; }

clean:
	rm -rf out .pytest_cache __pycache__ */__pycache__
