"""The walk over WebDataset tars: members of one key are a sample, one of them its picture.

A member's key is its path up to the first dot of the base name, what follows is its field:
`n01440764/10026.seg.png` is field `seg.png` of `n01440764/10026`. A tar in a tar counts as a folder
of its name.
"""

import json
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import IO, NamedTuple

from cache.files import place
from eupe.errors import BadInput
from pipelines.images.aside import Aside
from pipelines.images.walks import (
    IMAGE_SUFFIXES,
    NOT_UTF8,
    Candidate,
    Piece,
    class_label,
    is_hidden,
    sample_id,
    shown,
    text,
    wanted,
)
from pipelines.recipe.config import SourceConfig

SUFFIX = ".tar"
LABEL_SUFFIXES = frozenset((".cls", ".json", ".txt"))
NO_SAMPLES = "members that are no samples, by field"
_LINKS = 40  # that may lead to one another, as on Linux
_READ_BYTES = 1 << 20


class _Member(NamedTuple):
    """A file in a tar, or in a tar in it.

    Attributes:
        name: its path, with the names of the tars that it lies in.
        offset: of its bytes in the outer file.
        bytes: how many.
        target: the path that it is a link to, else None.
        fault: why its bytes cannot be read in one piece, else None.
    """

    name: str
    offset: int
    bytes: int
    target: str | None = None
    fault: str | None = None


def candidates(config: SourceConfig, piece: Piece, aside: Aside) -> Iterator[Candidate]:
    """Walk over the images of one WebDataset tar: see `walks.Walk`."""
    with place.opened(piece.path) as data:
        try:
            members = _members(data, piece, aside)
        except (tarfile.TarError, EOFError) as error:
            raise BadInput(
                f"{piece.path}: no whole uncompressed tar file ({error}); write it again"
            ) from error
        yield from _samples(config, piece, members, data, aside)


def _samples(
    config: SourceConfig,
    piece: Piece,
    members: Mapping[str, _Member],
    data: IO[bytes],
    aside: Aside,
) -> Iterator[Candidate]:
    """Yield the picture of each key, with the labels that are its fields."""
    fields: dict[str, list[tuple[str, _Member]]] = {}
    for name, member in members.items():
        key, field = _split(config, name)
        if field:
            fields.setdefault(key, []).append((field, member))
        else:
            aside.count(NO_SAMPLES, "none")
    for key, own in fields.items():
        beside = [each for each in own if _is_label(config, each[0])]
        pictures = [each for each in own if each not in beside]
        chosen = _picture(config, piece, key, pictures)
        for field, other in own if chosen is None else pictures:
            if other is not chosen:
                aside.count(NO_SAMPLES, field)
        if chosen is None:
            continue
        labels, unreadable = _read_labels(data, beside)
        labels = _class(config, piece, chosen.name) | labels
        if not unreadable and not wanted(config, labels):
            continue
        identity, fault = _identity(config, piece, key), chosen.fault or unreadable
        if shown(chosen.name) != chosen.name:
            identity, fault = shown(chosen.name), NOT_UTF8
        address = identity, piece.uri, chosen.offset
        if fault:
            yield Candidate(*address, 0, labels, b"", fault=f"{piece.uri}: {fault}")
        else:
            yield Candidate(*address, chosen.bytes, labels, _read(data, chosen))


def _read_labels(
    data: IO[bytes], fields: Sequence[tuple[str, _Member]]
) -> tuple[dict[str, str], str | None]:
    """Return the labels in the fields of a key, and why one of them cannot be read, else None."""
    labels: dict[str, str] = {}
    fault = None
    for field, member in fields:
        try:
            labels |= _labels(field, _read(data, member))
        except ValueError as error:
            fault = f"member {shown(member.name)} is no JSON ({error})"
        fault = member.fault or fault
    return labels, fault


def _split(config: SourceConfig, name: str) -> tuple[str, str]:
    """Return key and field of a member; no field where its name has no dot."""
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if config.key == "path":
        stem, _, field = parts[-1].rpartition(".")
    else:
        stem, _, field = parts[-1].partition(".")
    return "/".join([*parts[:-1], stem]), field.lower()


def _is_label(config: SourceConfig, field: str) -> bool:
    return field not in _choice(config) and PurePosixPath(f"x.{field}").suffix in LABEL_SUFFIXES


def _choice(config: SourceConfig) -> list[str]:
    """Return the fields that may be the picture, in order of preference; none: any image."""
    return config.image_member.lower().split(";") if config.image_member else []


def _picture(
    config: SourceConfig, piece: Piece, key: str, fields: Sequence[tuple[str, _Member]]
) -> _Member | None:
    """Choose the picture of a key; None: it has none.

    Raises:
        BadInput: there are several, and the source does not say which one it is.
    """
    if choice := _choice(config):
        ordered = (member for name in choice for field, member in fields if field == name)
        return next(ordered, None)
    images = [each for each in fields if PurePosixPath(f"x.{each[0]}").suffix in IMAGE_SUFFIXES]
    plain = [each for each in images if "." not in each[0]]
    if len(images) > 1 and len(plain) != 1:
        names = ", ".join(shown(member.name) for _, member in images)
        raise BadInput(
            f"{piece.path}: {shown(key)} has {len(images)} pictures, {names}; "
            f"source.image_member={images[0][0]} would take the first of them; where each is a "
            "sample of its own, source.key=path"
        )
    return next((member for _, member in plain or images), None)


def _identity(config: SourceConfig, piece: Piece, key: str) -> str:
    if config.key == "shard":
        return f"{piece.uri.removesuffix(SUFFIX)}/{key}"
    return key


def _class(config: SourceConfig, piece: Piece, name: str) -> dict[str, str]:
    """Return the class as label: the top folder in the tar, or the tar's own name."""
    if config.classes == "tar":
        return {"label": PurePosixPath(piece.uri).stem}
    return class_label(sample_id(shown(name)))


def _labels(field: str, content: bytes) -> dict[str, str]:
    """Read a field of labels: plain values of a JSON object, or the text of .cls and .txt.

    Raises:
        ValueError: it is no JSON.
    """
    value = content.decode(errors="replace").strip()
    if PurePosixPath(f"x.{field}").suffix != ".json":
        return {field: value}
    try:
        values = json.loads(value)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        return {}
    prefix = field.removesuffix("json")
    return {
        text(f"{prefix}{name}"): text(str(each))
        for name, each in values.items()
        if isinstance(each, str | int)
    }


def _read(data: IO[bytes], member: _Member) -> bytes:
    data.seek(member.offset)
    return data.read(member.bytes)


# ----------------------------------------------------------------------------------- the tar itself


def _members(data: IO[bytes], piece: Piece, aside: Aside) -> dict[str, _Member]:
    """Return the files of a tar by name, links in the place of what they lead to.

    Raises:
        tarfile.TarError: it is no whole tar.
        BadInput: a name is there twice.
    """
    found: dict[str, _Member] = {}
    for member in _walked(data, 0, piece.bytes, "", aside):
        if member.name in found:
            raise BadInput(f"{piece.path}: member {shown(member.name)} is there twice")
        found[member.name] = member
    for name, member in found.items():
        if member.target is not None:
            found[name] = _followed(found, member)
    return found


def _followed(found: Mapping[str, _Member], link: _Member) -> _Member:
    """Return a link as the file that it leads to, under its own name."""
    to: _Member | None = link
    for _ in range(_LINKS):
        if to is None or to.target is None:
            break
        to = found.get(to.target)
    if to is None or to.target is not None:
        target = shown(link.target or "")
        fault = f"member {shown(link.name)} is a link to {target}, which is not in this tar"
        return link._replace(target=None, fault=fault)
    return to._replace(name=link.name)


def _walked(data: IO[bytes], start: int, end: int, folder: str, aside: Aside) -> Iterator[_Member]:
    """Yield the files of a tar that lies at some bytes of a file, and of the tars in it.

    Raises:
        tarfile.TarError: it is cut, or no tar.
    """
    if start == end:
        raise tarfile.ReadError("it has no bytes")
    while start < end:
        data.seek(start)
        with tarfile.open(fileobj=data, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # it would keep every one
                if member.offset_data + (member.size if member.isreg() else 0) > end:
                    raise tarfile.ReadError(f"it ends within member {shown(member.name)}")
                yield from _files(data, member, folder, aside)
            start = _next_part(data, tar.offset, end)  # type: ignore[attr-defined]


def _files(
    data: IO[bytes], member: tarfile.TarInfo, folder: str, aside: Aside
) -> Iterator[_Member]:
    """Yield a member, or the members of the tar that it is."""
    name = f"{folder}{PurePosixPath(member.name)}"
    inside = PurePosixPath(member.name)
    if member.isdir() or is_hidden(inside.name):
        return
    if member.issym():
        target = PurePosixPath(folder, inside.parent, member.linkname)
        yield _Member(name, member.offset, 0, _normal(target))
    elif member.islnk():
        yield _Member(name, member.offset, 0, f"{folder}{PurePosixPath(member.linkname)}")
    elif not member.isfile():
        aside.say(f"member {shown(name)}: no file")
    elif member.issparse():
        yield _Member(name, member.offset, 0, fault=f"member {shown(name)} is sparse")
    elif inside.suffix.lower() == SUFFIX:
        stop = member.offset_data + member.size
        yield from _walked(data, member.offset_data, stop, f"{name[: -len(SUFFIX)]}/", aside)
    else:
        yield _Member(name, member.offset_data, member.size)


def _normal(path: PurePosixPath) -> str:
    """Return a path without `..`."""
    parts: list[str] = []
    for part in path.parts:
        if part != "..":
            parts.append(part)
        elif parts:
            parts.pop()
    return str(PurePosixPath(*parts))


def _next_part(data: IO[bytes], offset: int, end: int) -> int:
    """Check that a tar ends where reading it did; return where another one follows, or the end.

    The library takes a cut or damaged header for the end. A tar ends with blocks of zeros, and
    tars that were joined by `cat` have them in their middle.

    Raises:
        tarfile.ReadError: it does not end there.
    """
    data.seek(offset)
    block = data.read(min(tarfile.BLOCKSIZE, end - offset))
    if block != bytes(tarfile.BLOCKSIZE):
        what = "a damaged header" if len(block) == tarfile.BLOCKSIZE else "it is cut"
        raise tarfile.ReadError(f"{what} at byte {offset}, where a member or its end should be")
    offset += tarfile.BLOCKSIZE
    while offset < end:
        data.seek(offset)
        content = data.read(min(_READ_BYTES, end - offset))
        if not content:
            raise tarfile.ReadError(f"it is cut at byte {offset}")
        if rest := content.lstrip(b"\0"):
            at = offset + len(content) - len(rest)
            return at - at % tarfile.BLOCKSIZE
        offset += len(content)
    return end
