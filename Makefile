# Main targets; `make help` lists them.
VENV ?= .venv
PYTHON := $(VENV)/bin/python
DATA_DIR ?= data
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
EXPERIMENTS := table1 table2 table3 table4 table5 table6 figure1 figure2 horizon matrix_factorization tuning_curves automatic flattening_digits flattening_movielens100k references
SIMULATIONS := smd_rayleigh
BENCHMARKS := bench-ncf bench-sweep bench-optim bench-images bench-diagnostics bench-fsdp bench-runner
.PHONY: help setup demo data report $(EXPERIMENTS) $(SIMULATIONS) test test-all lint docs format bench $(BENCHMARKS) audit clean

help: ## show this list
	@awk -F':.*## ' '/^[a-z][a-z0-9-]*:.*## / {printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "make $(EXPERIMENTS)"
	@echo "  run what is missing of a table or figure; e.g. make table4 ARGS='--short --jobs 2'"
	@echo "make $(SIMULATIONS)"
	@echo "  the same of a simulation, which needs no data; a few minutes on one core"

setup: $(READY) ## make the environment in .venv (uv where it is installed, else venv and pip)

$(READY): pyproject.toml constraints.txt
	@if command -v uv >/dev/null; then \
		uv venv --quiet --allow-existing --python '>=3.11,<3.14' $(VENV) && \
		uv pip install --quiet --compile-bytecode --python $(PYTHON) --constraint constraints.txt --editable '.[harness,baselines,references,ray,bench,dev,docs]'; \
	else \
		python3 -m venv $(VENV) && \
		$(PYTHON) -m pip install --quiet --constraint constraints.txt --editable '.[harness,baselines,references,ray,bench,dev,docs]'; \
	fi
	@touch $@

demo: $(READY) ## train Adam, Adam with decay and Adam-LAWN on real digits; table and figure in demo/
	$(PYTHON) -m experiments run demo --results demo --jobs 2 $(ARGS)

$(EXPERIMENTS): $(READY)
	$(PYTHON) -m experiments run $@ --set data_dir=$(DATA_DIR) $(ARGS)

$(SIMULATIONS): $(READY)
	$(PYTHON) -m experiments run $@ $(ARGS)

report: $(READY) ## write results/ anew from its records: pages, tables, figures, index.html
	$(PYTHON) -m experiments report $(ARGS)

data: $(READY) ## download MovieLens, Pinterest, CIFAR-10 and CIFAR-100 into DATA_DIR (default: data)
	$(PYTHON) -m lawn.data movielens100k movielens1m pinterest cifar10 cifar100 --data-dir $(DATA_DIR) $(ARGS)

test: $(READY) ## the fast test suite, about 3 minutes on 2 cores
	$(PYTHON) -m pytest -n 2 --dist worksteal $(ARGS)

test-all: $(READY) ## every test, the slow ones too
	$(PYTHON) -m pytest -n 2 --dist worksteal -m '' $(ARGS)

lint: $(READY) ## ruff, mypy, and the documentation with warnings as errors
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy
	$(MAKE) docs

docs: $(READY) ## build the documentation site in site/
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

format: $(READY) ## put the code in ruff's format
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

bench: ## all benchmarks, one after the other; results/bench/
	for name in $(BENCHMARKS); do $(MAKE) $$name || exit; done

bench-ncf: $(READY) ## time NCF's training against a plain loop, on MovieLens in DATA_DIR
	$(PYTHON) -m scripts.bench_ncf --data-dir $(DATA_DIR) $(ARGS)

bench-sweep: $(READY) ## time runs trained as one batched model against the same runs alone, on MovieLens in DATA_DIR
	$(PYTHON) -m scripts.bench_sweep --data-dir $(DATA_DIR) $(ARGS)

bench-optim: $(READY) ## time one step of every optimizer on VGG-19's parameters
	$(PYTHON) -m scripts.bench_optim $(ARGS)

bench-images: $(READY) ## time VGG-19, ResNet-50 and their input pipelines against plain loops, on generated images
	$(PYTHON) -m scripts.bench_images $(ARGS)

bench-diagnostics: $(READY) ## time training with diagnostics=on against without, on MovieLens and CIFAR-10 in DATA_DIR
	$(PYTHON) -m scripts.bench_diagnostics --data-dir $(DATA_DIR) $(ARGS)

bench-fsdp: $(READY) ## time training a transformer under FSDP2 with LAWN against AdamW, on two gloo ranks
	$(PYTHON) -m scripts.bench_fsdp $(ARGS)

bench-runner: $(READY) ## time what `experiments run` does itself, for 10 to 10,000 runs and through every executor
	$(PYTHON) -m scripts.bench_runner $(ARGS)

audit: ## known vulnerabilities of the pinned packages (asks the network; needs uv)
	uvx pip-audit --requirement constraints.txt --no-deps --disable-pip

clean: ## remove the environment, runs and caches; data stays
	rm -rf $(VENV) runs demo .pytest_cache .mypy_cache .ruff_cache .hypothesis site *.egg-info
