//! Generates the stubs from the schema in `proto/`, in pure Rust.
//!
//! The rules for the server's validator are left out, and with them the import of their
//! schema: a client does not check them.

use std::{env, error::Error, fs, path::Path};

use prost::Message as _;
use protox::file::{ChainFileResolver, File, FileResolver, GoogleFileResolver};

const FILES: [&str; 8] = [
    "lowbit/status/v1/status.proto",
    "lowbit/v1/errors.proto",
    "lowbit/v1/generation.proto",
    "lowbit/v1/job.proto",
    "lowbit/v1/model.proto",
    "lowbit/v1/quality.proto",
    "lowbit/v1/quantization.proto",
    "lowbit/v1/runtime.proto",
];
const RULES: &str = "buf/validate/validate.proto";

struct WithoutRules;

impl FileResolver for WithoutRules {
    fn open_file(&self, name: &str) -> Result<File, protox::Error> {
        let Ok(source) = fs::read_to_string(Path::new("proto").join(name)) else {
            return Err(protox::Error::file_not_found(name));
        };
        let mut file = protox_parse::parse(name, &source)?;
        file.dependency.retain(|import| import != RULES);
        for message in &mut file.message_type {
            strip(message);
        }
        Ok(file.into())
    }
}

/// Removes the options that the parser left unresolved: the rules of fields and oneofs.
fn strip(message: &mut prost_types::DescriptorProto) {
    for options in message.field.iter_mut().filter_map(|f| f.options.as_mut()) {
        options.uninterpreted_option.retain(is_no_rule);
    }
    for options in message.oneof_decl.iter_mut().filter_map(|o| o.options.as_mut()) {
        options.uninterpreted_option.retain(is_no_rule);
    }
    message.nested_type.iter_mut().for_each(strip);
}

fn is_no_rule(option: &prost_types::UninterpretedOption) -> bool {
    !option.name.iter().any(|part| part.name_part.contains("buf.validate"))
}

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo:rerun-if-changed=proto/lowbit");
    let mut resolver = ChainFileResolver::new();
    resolver.add(GoogleFileResolver::new());
    resolver.add(WithoutRules);
    let mut compiler = protox::Compiler::with_file_resolver(resolver);
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let descriptors = compiler.file_descriptor_set();
    let out = Path::new(&env::var("OUT_DIR")?).join("descriptors.binpb");
    fs::write(out, descriptors.encode_to_vec())?;
    let mut config = prost_build::Config::new();
    config.enable_type_names();
    tonic_prost_build::configure()
        .build_server(false)
        .build_transport(false)
        .compile_fds_with_config(descriptors, config)?;
    Ok(())
}
