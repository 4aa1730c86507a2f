# The Go SDK's part of the Makefile.

GO_TOOLS := build/tools/go
GO_PLUGINS := $(GO_TOOLS)/protoc-gen-go $(GO_TOOLS)/protoc-gen-go-grpc
GO_FILES := $(sort $(patsubst proto/%,%,$(wildcard proto/lowbit/v1/*.proto)))
GO_FLAGS := --go_opt=module=lowbit --go-grpc_opt=module=lowbit \
	$(foreach file,$(GO_FILES),--go_opt=M$(file)=lowbit/gen/lowbitv1 --go-grpc_opt=M$(file)=lowbit/gen/lowbitv1)

# $(call go_stubs,FOLDER) writes the stubs into FOLDER/gen.
define go_stubs
	@mkdir -p $(1)
	@$(BIN)/python -m grpc_tools.protoc --descriptor_set_in=$(LIGHT) \
		$(foreach plugin,$(GO_PLUGINS),--plugin=$(plugin)) \
		--go_out=$(1) --go-grpc_out=$(1) $(GO_FLAGS) $(GO_FILES)
endef

.PHONY: client-go generate-go checkgenerate-go

ifeq ($(shell command -v go),)
client-go generate-go checkgenerate-go:
	$(call missing,go)
else
client-go: $(READY) ## Check, build and test the Go SDK
	cd client/go && test -z "$$(gofmt -l . | tee /dev/stderr)" && go vet ./... && go test ./...
	cd tests/conformance/testees/go && test -z "$$(gofmt -l . | tee /dev/stderr)" && go vet ./...

generate-go: $(LIGHT) $(GO_PLUGINS)
	@rm -rf client/go/gen
	$(call go_stubs,client/go)
	$(BIN)/python client/generate.py go client/go

checkgenerate-go: $(LIGHT) $(GO_PLUGINS)
	@rm -rf $(GENERATED)-go
	$(call go_stubs,$(GENERATED)-go)
	diff -r $(GENERATED)-go/gen client/go/gen
	$(BIN)/python client/generate.py go client/go --check

$(GO_TOOLS)/protoc-gen-go:
	GOBIN=$(abspath $(GO_TOOLS)) go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12

$(GO_TOOLS)/protoc-gen-go-grpc:
	GOBIN=$(abspath $(GO_TOOLS)) go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.5.1
endif

generate: generate-go
checkgenerate: checkgenerate-go
test: client-go
