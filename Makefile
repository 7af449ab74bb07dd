# What this checkout can do; `make` alone lists it. A Python of 3.11 or newer is all it needs.
PYTHON ?= python3
VENV ?= .venv
MINUTES ?= 9
BIN := $(abspath $(VENV))/bin
export PATH := $(BIN):$(PATH)
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test slurm-campaign studies lint format bench peers peers-install gpu-check gpu-bench fuzz chaos resume clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED) ## make the virtual environment with the locked versions

$(INSTALLED): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -e .
	@# pip compiles on one core; and src too, or with PYTHONDONTWRITEBYTECODE each process would compile it again
	@$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib src || true  # what is meant for other Pythons does not compile
	@touch $(INSTALLED)

demo: install ## run the default study on this machine's CPU and write its report
	snakemake --profile profiles/local --quiet rules
	@echo
	@echo "The report: $(abspath results/quickstart/report.html)"

test: install lint ## run every test
	OMP_NUM_THREADS=1 pytest --numprocesses auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

slurm-campaign: install ## disturb runs on a real Slurm, run whole studies there (an hour), print what a job costs
	python tests/slurm/cluster.py install || true
	pytest -m slow_slurm tests/slurm
	python benchmarks/slurm_overhead.py

studies: install ## run every study of config/studies at its CPU scale to its report (an hour), print what became of them
	python -m tests.workflow.studies_campaign --output benchmarks/results/studies-cpu.csv

lint: install ## format, style, types, and Snakemake's own linter
	ruff check .
	ruff format --check .
	mypy
	snakefmt --check Snakefile workflow
	snakemake --lint

bench: install ## print most tables of docs/performance.md, and planned beside measured memory; writes none of them
	python benchmarks/overhead.py
	python benchmarks/gora_throughput.py
	python benchmarks/agreement.py
	python benchmarks/extraction.py
	python benchmarks/planner.py
	python benchmarks/lean_step.py
	python benchmarks/waterfall.py
	python benchmarks/planner.py --published
	python benchmarks/planner.py --large
	python benchmarks/report.py
	python benchmarks/scale.py
	python benchmarks/executed.py
	python benchmarks/tokenisation.py
	python benchmarks/alternatives.py
	python benchmarks/startup.py --peers trainer

peers-install: install ## make the environments of the training loops to race against; needs the network
	python benchmarks/peers.py --install

peers: peers-install ## race the training loop against TRL, the Trainer, PEFT's loop and optimum-benchmark (an hour)
	python benchmarks/peers.py

gpu-check: install ## run every test that needs a CUDA device, and say so where there is none
	python -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else "torch finds no CUDA device here")'
	pytest -m gpu -rs

gpu-bench: install ## the ceiling, the step, the settings and the race on a GPU, in MINUTES (9); results in benchmarks/results
	python benchmarks/gpu.py --minutes $(MINUTES)

fuzz: install ## mutate 10,000 study files, 2,000 dataset files and 1,000 traces, and look how each is handled
	python -m tests.fuzz.campaign --output benchmarks/results/fuzz.csv

chaos: install ## kill, starve and damage every stage of a small study 500 times; nothing may be lost
	python -m tests.chaos.campaign
	python -m tests.chaos.workflow

resume: install ## kill runs of every method, strategy and optimizer; each must go on bit for bit
	python -m tests.distributed.resume_campaign

format: install ## rewrite the sources in the project's format
	ruff check --fix .
	ruff format .
	snakefmt Snakefile workflow

clean: ## remove results, logs and the environment
	rm -rf results/*/ logs .snakemake $(VENV)
