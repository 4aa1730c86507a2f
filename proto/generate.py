"""Generate the Python stubs and the descriptor images for other tools.

    python proto/generate.py OUT_DIR [--image FILE] [--light FILE] [--proto DIR]

buf checks the full image. The light one has no import of the validation rules and is
what the other languages' plugins generate from (protoc's --descriptor_set_in).

The schema of the validation rules is read from the installed protovalidate
package. The stubs keep the rules as option bytes, where the server's validator
finds them, but do not import that package: SDKs stay light (docs/adr/0002). The
schema of the conformance scenarios is in the image only; its runner reads it as it is.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import grpc_tools
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_tools import protoc

PROTO = Path(__file__).parent
RULES = "buf/validate/validate.proto"
NO_STUBS = "lowbit/conformance/"


def rules_descriptor() -> bytes:
    """Return the serialized FileDescriptorSet of buf/validate/validate.proto."""
    module = import_module("protovalidate._gen.buf.validate.validate_pb")
    return b"\x0a" + _delimited(module.desc().proto.to_binary())


def _delimited(data: bytes) -> bytes:
    size, prefix = len(data), bytearray()
    while size > 0x7F:  # noqa: PLR2004 - a varint's seven bits
        prefix.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*prefix, size]) + data


def run(*args: str) -> None:
    """Run protoc; raise SystemExit with its code when it fails."""
    if code := protoc.main(["protoc", *args]):
        raise SystemExit(code)


def main() -> None:
    """Generate into the folder that the command line names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--image", type=Path, help="write the full descriptor image here")
    parser.add_argument("--light", type=Path, help="write the image without rules here")
    parser.add_argument("--proto", type=Path, default=PROTO, help="read the schema from here")
    args = parser.parse_args()
    files = sorted(
        str(path.relative_to(args.proto)) for path in (args.proto / "lowbit").rglob("*.proto")
    )
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        rules, image = Path(folder, "rules.binpb"), Path(folder, "image.binpb")
        rules.write_bytes(rules_descriptor())
        run(
            f"-I{args.proto}",
            f"-I{well_known}",
            f"--descriptor_set_in={rules}",
            "--include_imports",
            "--include_source_info",
            f"--descriptor_set_out={image}",
            *files,
        )
        descriptors = FileDescriptorSet.FromString(image.read_bytes())
        if args.image:
            args.image.write_bytes(image.read_bytes())
        light = FileDescriptorSet(file=[file for file in descriptors.file if file.name != RULES])
        for file in light.file:
            if RULES in file.dependency:
                file.dependency.remove(RULES)
        image.write_bytes(light.SerializeToString())
        if args.light:
            args.light.write_bytes(image.read_bytes())
        args.out.mkdir(parents=True, exist_ok=True)
        out = [
            f"--{kind}_out={args.out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")
        ]
        bin_ = Path(sys.executable).parent  # this environment's plugins, whatever PATH says
        plugins = [
            f"--plugin=protoc-gen-{kind}={bin_}/protoc-gen-{kind}" for kind in ("mypy", "mypy_grpc")
        ]
        stubs = [name for name in files if not name.startswith(NO_STUBS)]
        run(f"--descriptor_set_in={image}", *plugins, *out, *stubs)


if __name__ == "__main__":
    main()
