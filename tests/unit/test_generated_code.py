"""The committed gRPC code is what proto/ generates, and proto/ explains itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    EnumDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
)
from grpc_tools import protoc

ROOT = Path(__file__).parents[2]
PROTO = ROOT / "proto"
FILES = sorted(str(path.relative_to(PROTO)) for path in PROTO.glob("csps/v1/*.proto"))


def run_protoc(*arguments: str) -> None:
    """protoc on all of proto/, with the flags of `make proto` for where it looks."""
    assert protoc.main(["protoc", f"--proto_path={PROTO}", *arguments, *FILES]) == 0


def test_generated_code_is_current(tmp_path: Path) -> None:
    run_protoc(f"--python_out={tmp_path}", f"--pyi_out={tmp_path}", f"--grpc_python_out={tmp_path}")
    fresh = {path.name: path.read_bytes() for path in (tmp_path / "csps/v1").iterdir()}
    committed = {
        path.name: path.read_bytes()
        for path in (ROOT / "csps/v1").glob("*.py*")
        if path.name != "__init__.py"
    }
    assert committed.keys() == fresh.keys(), "run: make proto"
    for name, content in fresh.items():
        assert committed[name] == content, f"csps/v1/{name} is stale; run: make proto"


@pytest.mark.parametrize("name", FILES)
def test_everything_in_proto_has_a_comment(name: str, tmp_path: Path) -> None:
    output = tmp_path / "set.binpb"
    run_protoc("--include_source_info", f"--descriptor_set_out={output}")
    files = {file.name: file for file in FileDescriptorSet.FromString(output.read_bytes()).file}
    file = files[name]
    commented = {
        tuple(place.path)
        for place in file.source_code_info.location
        if place.leading_comments.strip()
    }
    bare = [full_name for path, full_name in elements(file) if path not in commented]
    assert not bare, f"without a comment: {bare}"


# Paths of elements in source info are (field number, index) pairs: descriptor.proto, message
# SourceCodeInfo.Location.


def elements(file: FileDescriptorProto) -> Iterator[tuple[tuple[int, ...], str]]:
    """(path, name) of every service, method, message, oneof, field, enum and value."""
    for i, service in enumerate(file.service):
        at = (FileDescriptorProto.SERVICE_FIELD_NUMBER, i)
        yield at, service.name
        for j, method in enumerate(service.method):
            yield (*at, service.METHOD_FIELD_NUMBER, j), f"{service.name}.{method.name}"
    for i, message in enumerate(file.message_type):
        yield from in_message((FileDescriptorProto.MESSAGE_TYPE_FIELD_NUMBER, i), message)
    for i, enum in enumerate(file.enum_type):
        yield from in_enum((FileDescriptorProto.ENUM_TYPE_FIELD_NUMBER, i), enum)


def in_message(
    at: tuple[int, ...], message: DescriptorProto
) -> Iterator[tuple[tuple[int, ...], str]]:
    if message.options.map_entry:
        return
    yield at, message.name
    for i, field in enumerate(message.field):
        yield (*at, message.FIELD_FIELD_NUMBER, i), f"{message.name}.{field.name}"
    for i, oneof in enumerate(message.oneof_decl):
        if not oneof.name.startswith("_"):  # made up by protoc for each `optional` field
            yield (*at, message.ONEOF_DECL_FIELD_NUMBER, i), f"{message.name}.{oneof.name}"
    for i, nested in enumerate(message.nested_type):
        yield from in_message((*at, message.NESTED_TYPE_FIELD_NUMBER, i), nested)
    for i, enum in enumerate(message.enum_type):
        yield from in_enum((*at, message.ENUM_TYPE_FIELD_NUMBER, i), enum)


def in_enum(
    at: tuple[int, ...], enum: EnumDescriptorProto
) -> Iterator[tuple[tuple[int, ...], str]]:
    yield at, enum.name
    for i, value in enumerate(enum.value):
        yield (*at, enum.VALUE_FIELD_NUMBER, i), f"{enum.name}.{value.name}"
