# make demo   quantize the embedded network by all five methods: table, results, plots
# make test   lint and all tests
# make lint   ruff and pyright;  make type, bench: one thing each
# make docs   the site, in build/site; docs-serve shows it at http://127.0.0.1:8000
# make notebooks  executes them and writes their outputs (NOTEBOOKS="quickstart deploy": these)
# make matrix the same as test, on every Python that is found, each with its JAX
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin/python
JAX ?= jax
BUILT_FROM := pyproject.toml $(wildcard CMakeLists.txt gpu_ops/CMakeLists.txt gpu_ops/*.cc gpu_ops/*/*.cc gpu_ops/*/*.cu gpu_ops/*/*.h)
# Neither needs the CUDA handlers, which take minutes to compile: GPU_OPS_CUDA=AUTO builds them.
export GPU_OPS_CUDA ?= OFF
# What is installed here runs here: a wheel for other machines has GPU_OPS_NATIVE=OFF.
export GPU_OPS_NATIVE ?= ON
# Bytecode is kept whatever the environment says: without it every process compiles all it imports.
export PYTHONDONTWRITEBYTECODE =
OPTIMIZED_TESTS := tests/arithmetic tests/gpu_ops/test_backend.py \
  $(addprefix tests/layers/test_,golden_codes.py rematerialize.py)
MATRIX := 3.11-0.10 3.12-0.11 3.13-0.12
DEMO_PRESETS := nearest,adaround,brecq,qdrop,aquant

.PHONY: demo notebooks test optimized-tests lint type bench docs docs-serve matrix gpu gpu-here clean module
.PHONY: dependencies
.DEFAULT_GOAL := test

demo: $(VENV)/.report
	$(RUN) -m launch.sweep --config=configs/digits.py:w2a2 --presets=$(DEMO_PRESETS) --workdir=runs/demo

notebooks: $(VENV)/.test
	$(RUN) notebooks/execute.py $(NOTEBOOKS)

# Pyright takes half a minute of one core, beside the first tests. Of three workers on two cores one
# may wait for the processes that it has started.
test: $(VENV)/.test
	$(RUN) -m ruff check .
	$(MAKE) --no-print-directory -j 2 type optimized-tests
	$(RUN) -m pytest -n 3 --fast-compile $(addprefix --ignore=,$(OPTIMIZED_TESTS))

# Where a product may be contracted with a sum, or memory depends on what XLA optimizes, tests compile
# as users do.
optimized-tests: $(VENV)/.test
	$(RUN) -m pytest -n 2 $(OPTIMIZED_TESTS)

lint: $(VENV)/.test
	$(RUN) -m ruff check .
	$(MAKE) --no-print-directory type

type: $(VENV)/.test
	$(RUN) -m pyright --pythonpath $(RUN)

bench: $(VENV)/.test
	$(RUN) -m launch.bench.calibrate

# Warnings are errors (strict): a broken link ends the build with the name of its page.
docs docs-serve: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(RUN) -m mkdocs build

docs-serve: $(VENV)/.docs
	$(RUN) -m mkdocs serve

matrix: $(addprefix matrix-,$(MATRIX))

matrix-%:
	@version=$(word 1,$(subst -, ,$*)); \
	for python in python$$version $$HOME/.pyenv/versions/$$version.*/bin/python; do \
	  $$python -c '' 2>/dev/null && break; python=; \
	done; \
	test -n "$$python" || { echo "matrix: there is no Python $$version here: skipped"; exit 0; }; \
	$(MAKE) test PYTHON=$$python VENV=build/matrix/$* JAX='jax==$(word 2,$(subst -, ,$*)).*'

# On a machine with an NVIDIA GPU and nvcc: all that docs/results.md marks as not run there.
gpu: GPU_OPS_CUDA := ON
gpu: $(VENV)/.test
	$(RUN) -m pip install --quiet --editable '.[test,cuda]'
	$(MAKE) gpu-here

# The same with what is installed already: make gpu-here RUN=python3
gpu-here:
	$(RUN) -c 'import jax, sys; jax.default_backend() == "gpu" or sys.exit("JAX finds no GPU")'
	JAX_PLATFORMS=cpu $(RUN) -m pytest tests/gpu_ops/test_cuda_build.py tests/gpu_ops/test_cuda_twin.py
	$(RUN) -m pytest tests/gpu_ops/test_cuda_device.py
	compute-sanitizer --error-exitcode 1 $(RUN) -m pytest tests/gpu_ops/test_cuda_device.py
	compute-sanitizer --tool racecheck --error-exitcode 1 $(RUN) -m pytest \
	  tests/gpu_ops/test_cuda_device.py -k "tuned or one_call"
	$(RUN) -m launch.bench.latency --model=resnet18 --batch_size=32 --rounds=100 \
	  --out=docs/measurements/latency_resnet18_gpu.json
	-command -v nsys && nsys profile --force-overwrite true --output build/latency_resnet18 \
	  $(RUN) -m launch.bench.latency --model=resnet18 --batch_size=32 --rounds=10
	$(RUN) -m launch.bench.calibrate --out=docs/measurements/calibrate_gpu.json
	$(RUN) -m launch.bench.calibrate --model=resnet18 \
	  --out=docs/measurements/calibrate_resnet18_gpu.json

clean:
	rm -rf $(VENV) build dist

$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is $$($(PYTHON) --version 2>&1), but Python 3.11 or newer is needed;" \
	       "name one: make PYTHON=python3.12" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --upgrade 'pip>=26.3'
	@touch $@

# The stamps depend on these, so what is installed follows what they ask for. The C++ module compiles
# while pip unpacks the rest; Python compiles the few packages of it that are imported.
$(VENV)/.report $(VENV)/.test $(VENV)/.docs: $(VENV)/.created $(BUILT_FROM)
	@$(MAKE) --no-print-directory -j 2 module dependencies EXTRA=$(subst .,,$(notdir $@))
	@touch $@

module:
	$(RUN) -m pip install --quiet --no-deps --editable .

dependencies:
	$(RUN) -m pip install --quiet --no-compile '$(JAX)'
	$(RUN) -m pip install --quiet --no-compile --only-deps '.[$(EXTRA)]'
