# Every target but help and clean makes .venv first: Python, make and a C compiler are all that is needed.
#   make test PYTHON=python3.12     another Python (3.11 or later)
#   make demo ARGS='--data digits'  arguments for the command

PYTHON ?= python3
ARGS ?=
BIN := .venv/bin
VENV := .venv/.stamp
PARALLEL := --numprocesses auto --dist worksteal
NUMBERS := $(patsubst %,tests/test_%.py, bad_input calibrate channel_deconv checkpoint convert distributed functional \
    fuse kernels_convolve kernels_fold kernels_inverse_sqrt kernels_layers kernels_patch_moments layers layout \
    learning_rules nothing_lost ops products properties reference running schedule schedule_host small_batches \
    torch_backend training_life transforms update_stats)

.PHONY: help demo test test-slow test-roundings bench gpu-report lint clean distclean
.DEFAULT_GOAL := help

help:
	@echo "make demo            train batch norm against network deconvolution on real images; pictures in demo-out/"
	@echo "make test            the tests"
	@echo "make test-slow       the slow tests: public models, compilers, the longer half of the kernels' cases"
	@echo "make test-roundings  the tests of numbers again, with the rounding of other CPUs"
	@echo "make bench           two minutes: time and memory against conv + batch norm + ReLU; results in bench-out/"
	@echo "make gpu-report      ten minutes on a GPU: tests, times, shares of the floors; results in bench-out/gpu/"
	@echo "make lint            ruff and mypy"
	@echo "make clean           remove what was built and measured; distclean removes .venv too"

# The stamp is written last, so an interrupted installation is taken up again.
$(VENV): pyproject.toml constraints.txt .ci/vision_hook.py
	@echo "Installing into .venv; the first time this takes minutes."
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev]'
	site=$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') && \
		cp .ci/vision_hook.py "$$site" && echo 'import vision_hook' > "$$site/vision_hook.pth"
	@touch $@

demo: $(VENV)
	$(BIN)/python -m tdeconv demo $(ARGS)

test: $(VENV)
	$(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

test-slow: $(VENV)
	$(BIN)/python -m pytest -q $(PARALLEL) --slow -m slow $(ARGS)

# First without the CPU's vector instructions, then with another library imitated (tests/rounding.py). The tests run on
# one thread in any case; OMP_NUM_THREADS reaches what is set up before them and the processes that they start.
test-roundings: $(VENV)
	ATEN_CPU_CAPABILITY=default OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) $(NUMBERS) $(ARGS)
	$(BIN)/python -m pytest -q $(PARALLEL) --rounding 1 $(NUMBERS) $(ARGS)

bench: $(VENV)
	$(BIN)/python -m tdeconv bench $(ARGS)

gpu-report: $(VENV)
	$(BIN)/python bench/gpu/report.py --out bench-out/gpu $(ARGS)

lint: $(VENV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

clean:
	rm -rf build dist *.egg-info demo-out bench-out
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf .venv
