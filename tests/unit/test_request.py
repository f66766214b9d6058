# SPDX-License-Identifier: Apache-2.0
"""The values of a request, one by one and together."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amphora_image.errors import BadValue
from amphora_image.request import (
    ARCHITECTURES,
    MAXIMUM_SIZE,
    RELEASES,
    Architecture,
    BaseOS,
    Environment,
    ImageType,
    Request,
    choice,
    image_types,
    output_path,
    release_of,
    size_in_gib,
)

HERE = Path("/here")
SIZES = st.decimals("0.001", MAXIMUM_SIZE, allow_nan=False)
NO_SIZES = st.sampled_from([Decimal("NaN"), Decimal("sNaN")]) | st.decimals(allow_nan=False).filter(
    lambda size: not 0 < size <= MAXIMUM_SIZE
)
TYPES = st.lists(st.sampled_from(ImageType), min_size=1)
NAMES = st.text(
    st.characters(exclude_categories=["Cc", "Cs"], exclude_characters="/"), min_size=1
).filter(lambda name: name not in {".", ".."})


def outcome(work: Callable[[], object]) -> tuple[object, str]:
    """What some work returns and no refusal, or None and the message of the refusal."""
    try:
        return work(), ""
    except BadValue as error:
        return None, str(error)


@given(SIZES)
def test_size_round_trip(size: Decimal) -> None:
    """Every size in range is read as what it is, and written without an exponent."""
    read = size_in_gib(str(size))
    assert read == size
    assert re.fullmatch(r"\d+(\.\d+)?", str(read))
    assert size_in_gib(str(read)) == size


@given(NO_SIZES)
def test_size_out_of_range(size: Decimal) -> None:
    """No other number is a size: none below, none above, none that is no number."""
    with pytest.raises(BadValue, match="allowed is a number of gigabytes up to 2048"):
        size_in_gib(str(size))


@given(st.text())
def test_size_of_any_text(text: str) -> None:
    """Any text is a size in range or a bad value, and nothing else happens."""
    size, refusal = outcome(lambda: size_in_gib(text))
    assert repr(text) in refusal or (isinstance(size, Decimal) and 0 < size <= MAXIMUM_SIZE)


@pytest.mark.parametrize(("size", "base_os"), [("1.5", BaseOS.DEBIAN), ("3", BaseOS.ROCKY)])
def test_smallest_size(a_request: Callable[..., Request], size: str, base_os: BaseOS) -> None:
    """The smallest disk that holds the image is allowed, a smaller one is not."""
    assert a_request(base_os=base_os, size=Decimal(size)).size == Decimal(size)
    with pytest.raises(BadValue, match=f"{base_os} needs at least {size} gigabytes"):
        a_request(base_os=base_os, size=Decimal(size) - Decimal("0.01"))


@given(NAMES, TYPES)
def test_suffix_is_added_once(name: str, types: list[ImageType]) -> None:
    """A name with a suffix of its types, or without, gives files with one suffix each."""
    bare = output_path(f"x{name}x", types, HERE)
    assert bare == HERE / f"x{name}x"
    for kind in types:
        assert output_path(f"{bare.name}.{kind}", types, HERE) == bare


@given(NAMES, TYPES, st.sampled_from(["", "images/", "../", "/srv/"]))
def test_output_stays_in_its_directory(name: str, types: list[ImageType], directory: str) -> None:
    """The output is an absolute path in the directory that was asked for."""
    path = output_path(directory + name, types, HERE)
    assert path.is_absolute()
    assert path.parent == HERE / directory


@pytest.mark.parametrize(
    ("value", "types", "files"),
    [
        ("lb", "qcow2", ["lb.qcow2"]),
        ("lb.qcow2", "qcow2", ["lb.qcow2"]),
        ("lb.qcow2", "raw", ["lb.qcow2.raw"]),
        ("lb.raw", "qcow2,raw", ["lb.qcow2", "lb.raw"]),
        ("lb.v1", "qcow2", ["lb.v1.qcow2"]),
        ("lb.qcow2.qcow2", "qcow2", ["lb.qcow2.qcow2"]),
        (".qcow2", "qcow2", [".qcow2.qcow2"]),
    ],
)
def test_names_of_files(
    a_request: Callable[..., Request], value: str, types: str, files: list[str]
) -> None:
    """The files of several image types stand beside each other."""
    kinds = image_types(types)
    request = a_request(output=output_path(value, kinds, HERE), image_types=kinds)
    assert list(request.outputs.values()) == [HERE / file for file in files]


@given(st.text())
def test_any_output(value: str) -> None:
    """Any text is a name for a file or a bad value."""
    path, refusal = outcome(lambda: output_path(value, [ImageType.RAW], HERE))
    assert repr(value) in refusal or isinstance(path, Path)
    if isinstance(path, Path):
        assert path.name not in {"", ".."}
        assert not re.search(r"[\x00-\x1f\x7f]", str(path))


@given(TYPES)
def test_image_types_keep_their_order(types: list[ImageType]) -> None:
    """Each type counts once, at its first place, with or without spaces."""
    assert image_types(",".join(types)) == tuple(dict.fromkeys(types))
    assert image_types(" , ".join(types)) == image_types(",".join(types))


@pytest.mark.parametrize("base_os", BaseOS)
@pytest.mark.parametrize("architecture", Architecture)
def test_default_release(base_os: BaseOS, architecture: Architecture) -> None:
    """Every base OS has a newest release for each of its architectures, and none for others."""
    if architecture in ARCHITECTURES[base_os]:
        assert release_of(base_os, architecture, None) in RELEASES[base_os]
    else:
        with pytest.raises(BadValue, match=f"is '{architecture}'; {base_os} has kernels for"):
            release_of(base_os, architecture, None)


@given(st.sampled_from(BaseOS), st.text())
def test_any_release(base_os: BaseOS, value: str) -> None:
    """Any text is one of the base OS's releases or a bad value that names them."""
    release, refusal = outcome(lambda: release_of(base_os, Architecture.AMD64, value))
    assert release in RELEASES[base_os] or ", ".join(RELEASES[base_os]) in refusal


@given(st.text())
def test_any_choice(value: str) -> None:
    """Any text is a member or a bad value that names them all."""
    chosen, refusal = outcome(lambda: choice(Architecture, "-a", value))
    assert chosen in set(Architecture) or refusal == (
        f"-a is {value!r}; allowed are {', '.join(Architecture)}"
    )


@given(st.text())
def test_any_password(a_request: Callable[..., Request], password: str) -> None:
    """A password is what was given, or refused without being said."""
    request, refusal = outcome(lambda: a_request(root_password=password))
    bad = not password or re.search(r"[\x00-\x1f\x7f]", password)
    assert refusal == (
        "-r (root password) is empty or has a control character; give a text" * bool(bad)
    )
    assert bad or (isinstance(request, Request) and request.root_password == password)


def test_password_is_not_in_the_repr(a_request: Callable[..., Request]) -> None:
    """A request that is printed does not tell the password."""
    assert "correct-horse" not in repr(a_request(root_password="correct-horse"))


@pytest.mark.parametrize("kernel", ["linux-image-6.12.1+deb13-amd64", "kernel-core", "g++=1:2~3"])
def test_kernel_packages(a_request: Callable[..., Request], kernel: str) -> None:
    """A kernel package is a package's name, with a version if so desired."""
    assert a_request(kernel=kernel).kernel == kernel


@pytest.mark.parametrize("kernel", ["", "a b", "a,b", "-x", "a;b", "$a", "a\n", "größe"])
def test_what_is_no_package(a_request: Callable[..., Request], kernel: str) -> None:
    """What would be an option, a list or a command elsewhere is no package."""
    with pytest.raises(BadValue, match=re.escape(f"-k (kernel package) is {kernel!r}; allowed")):
        a_request(kernel=kernel)


def test_local_elements_need_their_path(a_request: Callable[..., Request], tmp_path: Path) -> None:
    """Elements that are added need the directory that holds them."""
    paths = Environment(local_elements=("mine",), local_elements_path=(tmp_path,))
    assert a_request(environment=paths)
    with pytest.raises(BadValue) as refused:
        a_request(environment=Environment(local_elements=("mine",)))
    assert "DIB_LOCAL_ELEMENTS is 'mine'; it needs DIB_LOCAL_ELEMENTS_PATH" in str(refused.value)
    assert refused.value.hint


def test_rhel_needs_its_image(a_request: Callable[..., Request], tmp_path: Path) -> None:
    """RHEL is made of an image that only its subscribers can download."""
    local = Environment(local_image=tmp_path / "guest.qcow2")
    assert a_request(base_os=BaseOS.RHEL, release="9", environment=local)
    with pytest.raises(BadValue, match="it needs DIB_LOCAL_IMAGE"):
        a_request(base_os=BaseOS.RHEL, release="9")


def test_request_is_frozen(a_request: Callable[..., Request]) -> None:
    """What was asked does not change on the way."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        a_request().size = Decimal(1)
