# The Rust SDK's part of the Makefile.

.PHONY: client-rust generate-rust checkgenerate-rust

generate-rust: $(READY)
	$(BIN)/python client/generate.py rust client/rust/src/generated

checkgenerate-rust: $(READY)
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
