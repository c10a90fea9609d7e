# Python 3.11 and make are all that these need:
#
#   make demo                     a hospital and its clinics train together through a server that can't read them
#   make test                     every check and test
#
# PY is the Python to build with, VENV the environment, which is made once and kept.

PY ?= python3
VENV ?= .venv
EXTRAS ?= cli,torch,he,paillier,server,otel,demo,lightning,edge,optimize,dicom,dev
JOBS ?= auto
ARGS ?=

BIN := $(VENV)/bin
PROTO := proto/blindsum/proto/v1

.DEFAULT_GOAL := help
.PHONY: help demo test check test-core run-core test-slow proto clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

demo: $(VENV)/.stamp ## the clinics example; options in ARGS="--scheme bfv --rounds 10"
	$(BIN)/blindsum demo clinics $(ARGS)

test: check ## every check, then every test but the slow ones
	$(BIN)/pytest -n $(JOBS) --dist worksteal $(ARGS)

check: $(VENV)/.stamp ## lint, format, strict types, import rules, dependencies, wire format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry .
	$(BIN)/buf lint

test-core: ## all tests that need no torch, in an environment of their own: make test-core PY=python3.12
	@$(MAKE) --no-print-directory run-core EXTRAS=cli,he,paillier,server,otel,dev \
		VENV=.venv-core-$$($(PY) -c 'import sys; print("%d.%d" % sys.version_info[:2])')

run-core: $(VENV)/.stamp
	TESTS_WITHOUT=torch $(BIN)/pytest -n $(JOBS) --dist worksteal -m "not torch and not slow" $(ARGS)

test-slow: $(VENV)/.stamp ## the long tests: soaks, large cohorts, fuzzing
	$(BIN)/pytest -m slow --timeout 3600 $(ARGS)

proto: $(VENV)/.stamp ## generate the wire code again from proto/
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m grpc_tools.protoc -Iproto --python_out=proto \
		--grpc_python_out=proto --mypy_out=proto --mypy_grpc_out=proto $(PROTO)/*.proto

clean: ## remove the environments and everything that tools left behind
	rm -rf .venv .venv-core-* .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip settings (index, find-links, certificates) are the user's; uv is used where it is installed, and since it
# doesn't read pip's settings, pip goes on where it can't. An environment of one's own (VENV=...) keeps its torch.
$(VENV)/.stamp: pyproject.toml constraints.txt
	@set -eu; \
	if [ ! -x "$(BIN)/python" ]; then \
		$(PY) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || { \
			echo "Blindsum needs Python 3.11, 3.12 or 3.13; '$(PY)' is $$($(PY) --version 2>&1 | head -n 1)." >&2; \
			echo "Install one (Debian, Ubuntu: apt install python3.11 python3.11-venv; macOS: brew install" >&2; \
			echo "python@3.11; elsewhere: https://www.python.org/downloads), then: make PY=python3.11 ..." >&2; \
			exit 1; }; \
		echo "Making $(VENV) (once; it takes about a minute and 1 GB with the CPU build of torch)"; \
		$(PY) -m venv "$(VENV)" || { \
			echo "This Python can't make environments (Debian, Ubuntu: apt install python3-venv)." >&2; \
			rm -rf "$(VENV)"; exit 1; }; \
	fi; \
	pins=constraints.txt; \
	if [ "$(VENV)" != .venv ] && [ ! -e "$@" ] && "$(BIN)/python" -c 'import torch' 2>/dev/null; then \
		pins="$(VENV)/constraints.txt"; grep -v '^torch==' constraints.txt > "$$pins"; \
	fi; \
	installed=; \
	if command -v uv >/dev/null 2>&1; then \
		if [ -n "$${PIP_FIND_LINKS:-}" ] && [ -z "$${UV_FIND_LINKS:-}" ]; then \
			UV_FIND_LINKS="$$(echo "$$PIP_FIND_LINKS" | tr ' ' ',')"; export UV_FIND_LINKS; fi; \
		if uv pip install --python "$(BIN)/python" -c "$$pins" -e '.[$(EXTRAS)]'; then installed=yes; \
		else echo "uv couldn't; going on with pip" >&2; fi; \
	fi; \
	if [ -z "$$installed" ]; then \
		"$(BIN)/python" -m pip install --disable-pip-version-check -c "$$pins" -e '.[$(EXTRAS)]'; \
	fi; \
	touch "$@"
