# The Rust SDK's part of the Makefile.

RUST_FILES := $(sort $(patsubst proto/%,%,$(wildcard proto/lowbit/v1/*.proto proto/lowbit/status/v1/*.proto)))

# $(call rust_image,FOLDER) writes the image that the build script makes stubs from.
define rust_image
	@$(BIN)/python -m grpc_tools.protoc --descriptor_set_in=$(LIGHT) --include_imports \
		--include_source_info --descriptor_set_out=$(1)/descriptors.binpb $(RUST_FILES)
endef

.PHONY: client-rust generate-rust checkgenerate-rust

generate-rust: $(LIGHT)
	$(call rust_image,client/rust/src/generated)
	$(BIN)/python client/generate.py rust client/rust/src/generated

checkgenerate-rust: $(LIGHT)
	@mkdir -p $(GENERATED)-rust
	$(call rust_image,$(GENERATED)-rust)
	cmp $(GENERATED)-rust/descriptors.binpb client/rust/src/generated/descriptors.binpb
	$(BIN)/python client/generate.py rust client/rust/src/generated --check

ifeq ($(shell command -v cargo),)
client-rust:
	$(call missing,cargo)
else
# Clippy takes the compiler's place for our own crates, so that everything is built once.
client-rust: $(READY) ## Check, build and test the Rust SDK
	cargo fmt --all --check --manifest-path client/rust/Cargo.toml
	CARGO_TARGET_DIR=build/rust RUSTC_WORKSPACE_WRAPPER=clippy-driver \
		cargo test -q --workspace --manifest-path client/rust/Cargo.toml
endif

generate: generate-rust
checkgenerate: checkgenerate-rust
test: client-rust
