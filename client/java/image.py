"""Name the Java packages in a descriptor image: python image.py IN OUT.

The schema itself says nothing about Java, so that it need not change for one language.
The bytes of the validation rules go: Java's generator refuses options that it cannot name.
"""

import sys
from pathlib import Path

from google.protobuf.descriptor_pb2 import FileDescriptorSet

source, target = map(Path, sys.argv[1:])
image = FileDescriptorSet.FromString(source.read_bytes())
image.DiscardUnknownFields()  # type: ignore[no-untyped-call]
for file in image.file:
    if file.package.startswith("lowbit."):
        file.options.java_package = f"io.{file.package}"
        file.options.java_multiple_files = True
        # Not Runtime and Model, which would hide java.lang's or the message.
        file.options.java_outer_classname = f"{Path(file.name).stem.title()}Proto"
data = image.SerializeToString(deterministic=True)
if not target.exists() or target.read_bytes() != data:  # an old date spares the compiler work
    target.write_bytes(data)
