//! Generates the stubs from the image of the schema, without `protoc`.

use std::error::Error;

const IMAGE: &str = "src/generated/descriptors.binpb";

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed={IMAGE}");
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .file_descriptor_set_path(IMAGE)
        .skip_protoc_run()
        .compile_with_config::<&str>(config, &[], &[])?;
    Ok(())
}
