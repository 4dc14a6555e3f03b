# Two commands do all on a fresh machine: `make demo` and `make test`. `make quick` is for every change.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
COMPILER := $(VENV)/.compiler
LIGHT := $(VENV)-light
REAL := $(VENV)-real
PROVIDERS := $(VENV)-providers
SERVERS := $(VENV)-servers
TRITON := $(VENV)-triton
RAY_SERVE := $(VENV)-ray-serve
SUPPLY := $(VENV)-supply
DOCS := $(VENV)-docs
RTX_TESTS := tests/deploy/test_rtx_parser.py tests/deploy/test_rtx_bundle.py tests/export/test_rtx.py
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
STEP := @$(PYTHON) scripts/show_step.py
SHOWN_PIP := $(BIN)/python -m pip install --progress-bar off --disable-pip-version-check

.PHONY: axe demo quick check test test-light test-real test-rtx test-providers test-servers test-triton test-ray-serve coverage docs supply lock advisories clean

demo: $(READY)
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh examples/demo.sh

# Under two minutes: the checks, and the fast tests of what changed, the nearest first.
quick: check
	PYTHONPATH="scripts:$$PYTHONPATH" $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -p quick_deadline \
		-rs -m "not slow and not giant" $$($(BIN)/python scripts/quick_tests.py)

# The order of the modules is that of tests/conftest.py, the longest first. NVIDIA's compiler takes part.
test: check $(COMPILER)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# Lint, formatting, the direction of imports, types.
check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy
	$(BIN)/basedpyright --pythonpath $(BIN)/python

# What a device needs, without torch, on any interpreter: make test-light PYTHON=python3.13
test-light:
	$(PYTHON) -m venv --clear $(LIGHT)
	$(LIGHT)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light]"
	$(LIGHT)/bin/python -m pytest -n 2 --dist loadfile -m "not slow and not giant" tests/deploy tests/test_docs.py

# Checkpoints that Lightning and timm write themselves; timm's own need of torchvision is left out.
test-real:
	$(PYTHON) -m venv --clear $(REAL)
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test]" lightning pyyaml huggingface_hub
	$(REAL)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps timm
	$(REAL)/bin/python -m pytest -rs tests/cmt/test_real_programs.py

# The tests that NVIDIA's compiler takes part in, without a GPU.
test-rtx: $(COMPILER)
	$(BIN)/python -m pytest -rs $(RTX_TESTS)

# ONNX Runtime with OpenVINO's provider, whose package takes the place of onnxruntime.
test-providers:
	$(PYTHON) -m venv --clear $(PROVIDERS)
	$(PROVIDERS)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light]"
	$(PROVIDERS)/bin/python -m pip uninstall --quiet --yes onnxruntime
	$(PROVIDERS)/bin/python -m pip install --quiet --disable-pip-version-check onnxruntime-openvino
	$(PROVIDERS)/bin/python -m pytest -rs tests/deploy/test_providers.py

# A real server of KServe's protocol, MLServer, which demands an older FastAPI than other tests; MLPerf LoadGen; and
# the schemas of Kubernetes.
test-servers:
	$(PYTHON) -m venv --clear $(SERVERS)
	$(SERVERS)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light,kserve,loadgen]" mlserver kubernetes-validate
	$(SERVERS)/bin/python -m pytest -rs tests/deploy/test_mlserver.py tests/deploy/test_kserve.py tests/deploy/test_serving.py \
		tests/deploy/test_loadgen.py tests/examples/test_kubernetes.py

# NVIDIA's own server, from the wheel of PyTriton: x86-64 Linux with glibc 2.35, and a shared libpython.
test-triton:
	$(PYTHON) -m venv --clear $(TRITON)
	$(TRITON)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light,kserve]" nvidia-pytriton
	$(TRITON)/bin/python -m pytest -rs tests/deploy/test_triton.py

# A real cluster of Ray on this machine.
test-ray-serve:
	$(PYTHON) -m venv --clear $(RAY_SERVE)
	$(RAY_SERVE)/bin/python -m pip install --quiet --disable-pip-version-check -e ".[test-light]" "ray[serve]>=2.60,<3"
	$(RAY_SERVE)/bin/python -m pytest -rs tests/examples/test_ray_serve.py

# The accessibility checks of the HTML reports, in Chromium; fetches axe-core by npm into out/.
AXE := out/axe
axe: $(READY)
	npm install --no-audit --no-fund --prefix $(AXE) axe-core@4.14.1
	CMT_EDGE_AXE="$(CURDIR)/$(AXE)/node_modules/axe-core/axe.min.js" $(BIN)/python -m pytest -n 0 -rs tests/deploy/test_browser.py

# A figure, not a gate. The pages lie in htmlcov/.
coverage: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-report=html

# The pages as a site in out/docs/index.html. A warning is an error, and so is a page that would load anything from a network.
docs: $(DOCS)/.ready
	$(DOCS)/bin/python -m sphinx -W --keep-going --fresh-env --quiet --builder html docs out/docs
	$(DOCS)/bin/python scripts/check_site.py out/docs

$(DOCS)/.ready: requirements/docs.txt
	$(PYTHON) -m venv --clear $(DOCS)
	$(DOCS)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/docs.txt
	touch $@

# All packages but torch must have a hash of requirements/locked.txt (docs/supply-chain.md). The second command adds torch,
# from the index that pip is set up with, and the links to this checkout.
$(READY): pyproject.toml constraints.txt requirements/locked.txt
	$(STEP) "[1/3] make $(VENV)                     " $(PYTHON) -m venv $(VENV)
	$(STEP) "[2/3] install the locked packages   " $(SHOWN_PIP) --require-hashes --no-deps -r requirements/locked.txt
	$(STEP) "[3/3] install torch, this checkout  " $(SHOWN_PIP) --no-build-isolation -c constraints.txt -e ".[test]"
	@touch $(READY)

# NVIDIA's compiler is proprietary, so no extra but rtx brings it. NVIDIA has it for x86-64 alone; elsewhere its tests are skipped.
$(VENV)/.compiler: $(READY) requirements/rtx.txt
	@case "$$(uname -sm)" in \
	"Linux x86_64") echo "install TensorRT for RTX, under NVIDIA's licence" && \
		$(PIP) --require-hashes --no-deps -r requirements/rtx.txt ;; \
	*) echo "NVIDIA has no TensorRT for RTX (cu12) for $$(uname -sm): the tests that it takes part in are skipped" ;; \
	esac
	@touch $@

# The lists of docs/supply-chain.md, made by tools in an environment of their own, and a build that is done twice.
supply: $(READY) $(SUPPLY)/.ready
	$(SUPPLY)/bin/python scripts/lock.py --check
	$(SUPPLY)/bin/python scripts/licences.py
	$(SUPPLY)/bin/python scripts/sbom.py out/supply/cmt-edge.cdx.json
	$(BIN)/python scripts/build_release.py --twice out/supply

# Writes the hashes again, after a change of constraints.txt.
lock: $(SUPPLY)/.ready
	$(SUPPLY)/bin/python scripts/lock.py

# Asks the package index for advisories about the pins. Without --strict it succeeds even if no package was found.
advisories: $(SUPPLY)/.ready
	$(SUPPLY)/bin/pip-audit --strict --progress-spinner off --no-deps --disable-pip -r constraints.txt

$(SUPPLY)/.ready: requirements/supply.txt
	$(PYTHON) -m venv --clear $(SUPPLY)
	$(SUPPLY)/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements/supply.txt
	touch $@

clean:
	rm -rf $(VENV) $(LIGHT) $(REAL) $(PROVIDERS) $(SERVERS) $(TRITON) $(RAY_SERVE) $(SUPPLY) $(DOCS) out build htmlcov .coverage* *.egg-info src/*.egg-info
	rm -rf .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
