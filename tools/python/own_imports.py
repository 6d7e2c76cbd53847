"""Moves generated modules into the package outbox_client._gen: own_imports.py DIRECTORY.

protoc writes absolute imports ("from outbox.v1 import …") and a check that the protobuf runtime is not older than protoc. The
first would claim the top-level name "outbox". The second is stricter than what pyproject.toml promises and the tests prove:
the generated code runs with the oldest protobuf that is allowed there.
"""

import pathlib
import re
import sys

CHECK = re.compile(
    r"from google\.protobuf import runtime_version as _runtime_version\n|_runtime_version\.ValidateProtobufRuntimeVersion\(.*?\n\)\n",
    re.DOTALL,
)

root = pathlib.Path(sys.argv[1])
for path in sorted([*root.rglob("*.py"), *root.rglob("*.pyi")]):
    text = path.read_text()
    text = re.sub(r"^from outbox\.v1 import ", "from outbox_client._gen.outbox.v1 import ", text, flags=re.MULTILINE)
    path.write_text(CHECK.sub("", text))
for directory in [root, *(p for p in root.rglob("*") if p.is_dir())]:
    (directory / "__init__.py").write_text("")
