# Everything runs inside .venv, which is made on first use and made again whenever the
# declared dependencies change.
PYTHON ?= python3
BIN := .venv/bin
ORACLE := curvlinops-for-pytorch backpack-for-pytorch unfoldNd einconv einops linear_operator opt_einsum
STAMP := .venv/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check lint docs bench bench-peers bench-gpu bench-training bench-landscape bench-pruning train-gpu notebooks clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "flatvalley needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	# The oracle of the tests. With its dependencies would come a torchvision that fits no CPU build of torch.
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps $(ORACLE)
	touch $(STAMP)

demo: $(STAMP)   ## the main study on built-in data: figures, tables and report in runs/demo
	$(BIN)/flatvalley verify --out runs/demo

# A file stays in one process: its tests share what takes long to set up.
test: $(STAMP)   ## every test, notebooks included
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: $(STAMP)   ## style, types and import layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(STAMP)   ## the documentation, warnings as errors, into docs/_build
	$(BIN)/sphinx-build -q -W --keep-going -b html docs docs/_build

check: lint docs test   ## exactly what CI runs

bench: $(STAMP)  ## the benchmarks, results printed as ratios within one run
	$(BIN)/python benchmarks/eigensolvers.py
	$(BIN)/python benchmarks/grda_step.py
	$(BIN)/python benchmarks/traces.py
	$(BIN)/python benchmarks/solver_overhead.py
	$(BIN)/python benchmarks/sparse_latency.py

# The peers live apart from .venv, and without their dependencies, which would replace torch.
PEERS := .peers/.installed
$(PEERS): benchmarks/peers.txt constraints.txt
	rm -rf .peers
	$(PYTHON) -m venv .peers
	.peers/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[data]'
	.peers/bin/python -m pip install --quiet --no-deps --requirement benchmarks/peers.txt
	touch $(PEERS)

bench-peers: $(PEERS)  ## whole libraries against ours; hours, goes on where it was stopped
	.peers/bin/python benchmarks/hessian_peers.py --direct mlp
	.peers/bin/python benchmarks/landscape_peers.py

bench-gpu: $(PEERS)  ## the same on a CUDA device
	.peers/bin/python benchmarks/hessian_gpu.py

bench-training: $(STAMP)  ## sparsity and accuracy on MNIST and CIFAR-10; hours, goes on where it was stopped
	$(BIN)/python benchmarks/target_sparsity.py
	$(BIN)/python benchmarks/resnet20_sparsity.py
	$(BIN)/python benchmarks/training_throughput.py

bench-landscape: $(STAMP)  ## batch norm's policies, ways of evaluating, adaptive surfaces, the gallery
	$(BIN)/python benchmarks/landscape_batch_norm.py
	$(BIN)/python benchmarks/landscape_plans.py
	$(BIN)/python benchmarks/landscape_adaptive.py
	$(BIN)/python benchmarks/landscape_connect.py
	$(BIN)/python benchmarks/gallery.py

bench-pruning: $(STAMP)  ## every method of pruning on the same networks; hours, goes on where it was stopped
	$(BIN)/python benchmarks/pruning_tables.py --choose
	$(BIN)/python benchmarks/pruning_tables.py
	$(BIN)/python benchmarks/pruning_start.py
	$(BIN)/python benchmarks/resnet20_scores.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/net_trim_layer.py
	$(BIN)/python benchmarks/net_trim_recovery.py
	$(BIN)/python benchmarks/net_trim_workers.py
	$(BIN)/python benchmarks/net_trim_study.py
	$(BIN)/python benchmarks/net_trim_balls.py

train-gpu: $(STAMP)  ## the paper's networks on a CUDA device; hours, goes on where it was stopped
	$(BIN)/python benchmarks/train_gpu.py

notebooks: $(STAMP)   ## execute the notebooks and renew the .ipynb beside each source
	cd notebooks && ../$(BIN)/jupytext --to ipynb [0-9]*.py && ../$(BIN)/jupyter-execute --inplace [0-9]*.ipynb

clean:           ## remove everything the other targets made
	rm -rf .venv .peers runs docs/_build docs/_notebooks .pytest_cache .mypy_cache .ruff_cache
