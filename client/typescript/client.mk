# The TypeScript SDK's part of the Makefile.

TS := client/typescript
TS_READY := $(TS)/node_modules/.ready
TS_FILES := $(sort $(patsubst proto/%,%,$(wildcard proto/lowbit/v1/*.proto proto/lowbit/status/v1/*.proto)))

# $(call ts_stubs,FOLDER) writes the stubs into FOLDER.
define ts_stubs
	@rm -rf $(1) && mkdir -p $(1)
	$(BIN)/python -m grpc_tools.protoc --descriptor_set_in=$(LIGHT) \
		--plugin=$(TS)/node_modules/.bin/protoc-gen-es --es_out=$(1) --es_opt=target=ts \
		--es_opt=import_extension=js $(TS_FILES)
endef

.PHONY: client-typescript build-typescript generate-typescript checkgenerate-typescript

ifeq ($(shell command -v npm),)
client-typescript build-typescript generate-typescript checkgenerate-typescript:
	$(call missing,npm)
else
client-typescript: $(READY) build-typescript ## Check, build and test the TypeScript SDK
	cd $(TS) && npm run --silent lint && npm test --silent

build-typescript: $(TS_READY)
	cd $(TS) && npm run --silent build

generate-typescript: $(LIGHT) $(TS_READY)
	$(call ts_stubs,$(TS)/src/gen)
	$(BIN)/python client/generate.py typescript $(TS)/src

checkgenerate-typescript: $(LIGHT) $(TS_READY)
	$(call ts_stubs,$(GENERATED)-typescript)
	diff -r $(GENERATED)-typescript $(TS)/src/gen
	$(BIN)/python client/generate.py typescript $(TS)/src --check

$(TS_READY): $(TS)/package.json $(TS)/package-lock.json
	cd $(TS) && npm ci --silent --no-progress
	@touch $@
endif

generate: generate-typescript
checkgenerate: checkgenerate-typescript
test: client-typescript
