"""Takes the validation rules out of a descriptor set: strip_validation.py IN OUT.

The Python SDK ships no buf.validate. Its descriptors would share the process-wide pool with those of any other package that
brings the same file in another version, and importing one of them would fail.
"""

import sys

from google.protobuf import descriptor_pb2

VALIDATE = "buf/validate/validate.proto"


def strip_message(message: descriptor_pb2.DescriptorProto) -> None:
    message.ClearField("options")
    for field in message.field:
        field.ClearField("options")
    for oneof in message.oneof_decl:
        oneof.ClearField("options")
    for nested in message.nested_type:
        strip_message(nested)


def main(source: str, target: str) -> None:
    with open(source, "rb") as f:
        files = descriptor_pb2.FileDescriptorSet.FromString(f.read())
    kept = descriptor_pb2.FileDescriptorSet()
    for file in files.file:
        if file.name == VALIDATE:
            continue
        if VALIDATE in file.dependency:
            dependencies = [name for name in file.dependency if name != VALIDATE]
            del file.dependency[:]
            file.dependency.extend(dependencies)
            file.ClearField("options")
            for message in file.message_type:
                strip_message(message)
        kept.file.append(file)
    with open(target, "wb") as f:
        f.write(kept.SerializeToString())


main(*sys.argv[1:])
