# Every target sets up what it needs: a virtual environment in .venv, the development set of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: test test-triton36 test-compat test-clients test-gpu-software nightly scan architectures lint demo bench gpu-cache gpu-rehearsal hub dist clean

test: $(VENV)/.installed
	# A file stays in one worker, so that kernels are compiled once; files go by name, because the longest comes early so.
	# One thread per worker: small tensors wait longer for a second thread than it saves.
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The kernels under the oldest supported Triton. Its interpreter needs numpy < 2.4; torch's own pin names another triton.
test-triton36: .venv36/.installed
	.venv36/bin/pytest -q tests/test_guards.py tests/test_kernels.py tests/test_fft.py tests/test_ops.py tests/test_aot.py

# The oldest supported libraries around torch, together.
test-compat: .venv-compat/.installed
	OMP_NUM_THREADS=1 .venv-compat/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# The programs that people train and serve with (docs/recipes.md). Axolotl has an environment of its own: it wants one
# release each of transformers, PEFT and TRL. A test whose program another environment has is skipped.
test-clients: .venv-clients/.installed .venv-axolotl/.installed
	OMP_NUM_THREADS=1 .venv-clients/bin/pytest -q tests/clients
	OMP_NUM_THREADS=1 .venv-axolotl/bin/pytest -q tests/clients/test_axolotl.py

# What a rented GPU machine has installed, rehearsed without a GPU: the tests that touch one, with an H100's tiles and
# choices of backends, in the interpreter; then all others without the interpreter, which is off there (one of them
# compiles all kernels).
PYTHON312 ?= python3.12
SESSION = OMP_NUM_THREADS=1 .venv-gpu/bin/pytest -q -n 2 --dist loadfile --no-loadscope-reorder
test-gpu-software: .venv-gpu/.installed
	PYTHONPATH=$(CURDIR)/.venv-gpu/numpy-for-triton $(SESSION) --timeout 300 --card sm_90 -m 'native and not nightly'
	TRITON_INTERPRET=0 $(SESSION) --timeout 1800 -m 'not native and not nightly'

# What takes too long for every change: kills at a hundred moments each, every byte of a file flipped, all cases compiled
# for all cards, 5,000 sequences of operations, 20,000 steps, experts over four processes, the GPU machine's software,
# other people's programs, ten minutes of fuzzing, under atheris where it installs (it has no wheels for every Python and
# machine), and the scan over all architectures.
FUZZ_SECONDS ?= 600
nightly: $(VENV)/.installed
	NIGHTLY=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -s tests/faults tests/test_aot.py
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m nightly
	$(MAKE) test-gpu-software
	$(MAKE) test-clients
	$(BIN)/pip install -q atheris || true
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/fuzz.py --seconds $(FUZZ_SECONDS)
	$(MAKE) scan

# Adapters on every architecture that transformers builds small, a process each. An interrupted scan goes on where it
# was (delete $(SCAN) to begin anew); it fails where something differs without a word.
SCAN ?= out/architectures.jsonl
scan: $(VENV)/.installed
	nice -n 15 $(BIN)/python tests/architectures/scan.py --out $(SCAN)

# The scan, and its results, good or bad, as the committed record and the tables of docs/reliability.md.
architectures:
	-$(MAKE) scan
	$(BIN)/python tests/architectures/table.py $(SCAN) --summary out/architectures.md --docs

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: $(VENV)/.installed
	$(BIN)/python examples/demo.py

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

# What the GPU job would spend its time on compiling, compiled ahead of time into out/gpu (docs/gpu.md), by the versions
# that its machine has. Tests run in the interpreter with that card's tiles; what they launch is compiled, too, whether
# they pass or not.
gpu-cache: .venv-gpu/.installed
	rm -rf out/gpu-tests && mkdir -p out/gpu-tests
	-PYTHONPATH=$(CURDIR)/.venv-gpu/numpy-for-triton:$(CURDIR)/tests OMP_NUM_THREADS=1 .venv-gpu/bin/pytest -q -n 2 \
		--dist loadfile --no-loadscope-reorder -m 'native and not nightly' --card sm_90 \
		-p record_launches --specialisations out/gpu-tests/launches.jsonl
	.venv-gpu/bin/python -m bench.precompile --tests out/gpu-tests/*.jsonl

# The GPU job's two commands on tiny sizes, in the interpreter, with the cache that gpu-cache made.
REHEARSED = PYTHONPATH=$(CURDIR)/.venv-gpu/numpy-for-triton .venv-gpu/bin/python -m bench.gpu
gpu-rehearsal: .venv-gpu/.installed
	rm -rf out/rehearsal
	$(REHEARSED) right --device cpu --tiny --out out/rehearsal
	$(REHEARSED) tune --device cpu --tiny --out out/rehearsal --right out/rehearsal/right.json

# The operators for the hub's kernel loader (`kernels.get_local_kernel("out/hub")`), copied from the package.
hub:
	$(PYTHON) hub/assemble.py out/hub

dist: $(VENV)/.installed
	$(BIN)/python -m build

# torch first and alone: with torch present, nothing below pulls another build of it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv36/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv36
	.venv36/bin/pip install -q -c constraints.txt torch
	.venv36/bin/pip install -q 'numpy<2.4' safetensors regex einops hypothesis pytest
	.venv36/bin/pip install -q --no-deps triton==3.6.0
	.venv36/bin/pip install -q --no-deps -e .
	touch $@

.venv-compat/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-compat
	.venv-compat/bin/pip install -q -c constraints.txt torch
	.venv-compat/bin/pip install -q transformers==4.57.6 peft==0.17.0 accelerate 'numpy<2.4' safetensors regex \
		einops scipy platformdirs shtab matplotlib rich hypothesis pytest pytest-xdist
	.venv-compat/bin/pip install -q --no-deps triton==3.6.0
	.venv-compat/bin/pip install -q --no-deps -e .
	touch $@

.venv-clients/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-clients
	.venv-clients/bin/pip install -q -c constraints.txt torch
	.venv-clients/bin/pip install -q -c constraints.txt -e '.[clients]'
	touch $@

# Axolotl by itself, and what its training on a CPU imports, by its own pins: all that it names (xFormers, gradio, clouds'
# file systems) would be gigabytes.
.venv-axolotl/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-axolotl
	.venv-axolotl/bin/pip install -q -c constraints.txt torch
	.venv-axolotl/bin/pip install -q --no-deps axolotl==0.19.0
	.venv-axolotl/bin/pip install -q transformers==5.16.1 peft==0.20.0 trl==1.9.0 accelerate==1.13.0 datasets==4.8.4 \
		huggingface_hub==1.17.0 kernels==0.16.2 bitsandbytes==0.50.2 torchao==0.17.0 mistral-common==1.11.5 \
		axolotl-contribs-lgpl==0.0.7 axolotl-contribs-mit==0.0.6 pydantic==2.12.5 posthog==6.7.11 wandb addict art \
		colorama evaluate==0.4.1 fastcore fire python-dotenv==1.0.1 schedulefree==1.4.1 numba scipy
	.venv-axolotl/bin/pip install -q pytest -e .
	touch $@

# torch brings its triton, 3.6.0. That one's interpreter needs numpy < 2.4, which lies beside the newer one.
.venv-gpu/.installed: pyproject.toml
	$(PYTHON312) -m venv .venv-gpu
	.venv-gpu/bin/pip install -q torch==2.11.0 triton==3.6.0 transformers==5.17.0 accelerate==1.15.0 peft==0.21.2 \
		numpy==2.5.2 setuptools==81.0.0 safetensors regex einops scipy matplotlib rich hypothesis \
		pytest pytest-xdist pytest-timeout
	.venv-gpu/bin/pip install -q --no-deps --target .venv-gpu/numpy-for-triton numpy==2.3.5
	.venv-gpu/bin/pip install -q --no-deps -e .
	touch $@

clean:
	rm -rf .venv .venv36 .venv-compat .venv-clients .venv-axolotl .venv-gpu
	rm -rf build dist out *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
