# Tools that nobody here wrote, run against a real server.

FOREIGN := $(addprefix $(GO_TOOLS)/,grpcurl grpc-health-probe ghz)

.PHONY: clients

ifeq ($(shell command -v go),)
clients:
	$(call missing,go)
else
clients: $(READY) $(FOREIGN) ## Run grpcurl, grpc-health-probe, ghz and buf curl against a real server
	$(BIN)/python -m pytest tests/clients

$(GO_TOOLS)/grpcurl: PACKAGE := github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.4
$(GO_TOOLS)/grpc-health-probe: PACKAGE := github.com/grpc-ecosystem/grpc-health-probe@v0.4.61
$(GO_TOOLS)/ghz: PACKAGE := github.com/bojand/ghz/cmd/ghz@v0.121.0

$(FOREIGN): tests/clients/client.mk
	GOBIN=$(abspath $(GO_TOOLS)) go install $(PACKAGE)
	@touch $@
endif

test: clients
