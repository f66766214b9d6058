# SPDX-License-Identifier: Apache-2.0
"""Plan becomes image files, with a sandbox that only pretends to build."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from amphora_image import build, sandbox
from amphora_image import workspace as ws
from amphora_image.errors import AmphoraImageError, Interrupted
from amphora_image.host import Host
from amphora_image.plan import Plan, make_plan
from amphora_image.request import Architecture, BaseOS, Environment, ImageType, Request
from amphora_image.sandbox import Command, Mount

PASSWORD = "correct-horse"


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Give the signals their handlers back, which a build that was interrupted ignores."""
    before = {each: signal.getsignal(each) for each in ws.SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


class Sandbox:
    """A sandbox in which every file is made at once, and each command is remembered.

    :ivar status: what the sandbox ends with.
    :ivar on_start: what happens when it starts.
    """

    def __init__(self) -> None:
        self.status = 0
        self.lines = ["phase: image files\n"]
        self.on_start: Callable[[], object] = lambda: None
        self.mounts: list[Mount] = []
        self.commands: list[Command] = []
        self.killed = False

    def start(self, mounts: Sequence[Mount], commands: Sequence[Command]) -> Sandbox:
        """Make the files that the commands would make."""
        self.mounts, self.commands = list(mounts), list(commands)
        for file in json.loads(commands[-1].argv[-1])[1].values():
            Path(file).write_text(f"new {file[-8:]}")
        contents = {"packages": {"haproxy": "3"}, "python_packages": {}, "archives": []}
        Path(commands[0].env["AMPHORA_CONTENTS_FILE"]).write_text(json.dumps(contents))
        self.stdout = io.StringIO("".join(self.lines))
        self.on_start()
        return self

    def wait(self) -> int:
        """Return the status."""
        return self.status

    def kill(self) -> None:
        """Remember that it was killed."""
        self.killed = True


@pytest.fixture
def box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Sandbox:
    """The pretended sandbox, on a host that can build and has enough memory."""
    made = Sandbox()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(build.sandbox, "start", made.start)
    monkeypatch.setattr(build.host, "require", lambda _: None)
    monkeypatch.setattr(build.host, "available_memory", lambda: build.host.TMPFS_MEMORY)
    monkeypatch.setattr(build, "run", lambda argv, *, stdin: f"$6${len(stdin)}\n")
    monkeypatch.setattr(ws, "_home", lambda: tmp_path / "tmp")
    monkeypatch.setattr(ws, "detach_loop_devices", lambda _: None)
    monkeypatch.delenv("SUDO_UID", raising=False)
    return made


@pytest.fixture
def wish(a_request: Callable[..., Request], tmp_path: Path) -> Callable[..., Request]:
    """A function that makes a request whose paths are in the test's directory."""

    def make(**changes: Any) -> Request:
        paths = {
            "output": tmp_path / "images/lb",
            "cache_dir": tmp_path / "cache",
            "working_dir": tmp_path / "work",
        }
        return a_request(**{**paths, **changes})

    return make


def built(request: Request, screen: io.StringIO | None = None) -> list[Path]:
    """Build a request."""
    return build.build(request, make_plan(request, Host()), Console(file=screen or io.StringIO()))


ALL_TYPES = (ImageType.QCOW2, ImageType.TAR, ImageType.RAW, ImageType.VHD)


def test_files_of_a_build(box: Sandbox, wish: Callable[..., Request], tmp_path: Path) -> None:
    """Each image type is a file with a checksum and a manifest beside it, and nothing is left."""
    files = built(wish(image_types=ALL_TYPES))
    assert files == [tmp_path / f"images/lb.{kind}" for kind in ALL_TYPES]
    beside = [Path(f"{file}{suffix}") for file in files for suffix in ("", ".json", ".sha256")]
    assert sorted((tmp_path / "images").iterdir()) == sorted(beside)
    assert list((tmp_path / "tmp").iterdir()) == []
    for file in files:
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        assert Path(f"{file}.sha256").read_text() == f"{digest}  {file.name}\n"
        record = json.loads(Path(f"{file}.json").read_text())
        assert record["files"][file.name] == {"sha256": digest, "bytes": file.stat().st_size}
        assert record["packages"] == {"haproxy": "3"}
        assert list(record["seconds"]) == ["preparation", "image files"]


@pytest.mark.usefixtures("box")
@pytest.mark.parametrize("work", [build.build, build.fetch])
def test_programs_of_the_image_run(
    wish: Callable[..., Request], monkeypatch: pytest.MonkeyPatch, work: Callable[..., object]
) -> None:
    """Whatever is made, the programs of its architecture run while the sandbox does."""
    running: list[str] = []

    @contextlib.contextmanager
    def programs(architecture: Architecture) -> Iterator[None]:
        running.append(str(architecture))
        yield
        running.clear()

    def start(*_: object) -> None:
        raise AmphoraImageError(f"running: {running}")

    monkeypatch.setattr(build.foreign, "programs", programs)
    monkeypatch.setattr(build.sandbox, "start", start)
    request = wish(architecture=Architecture.ARM64)
    with pytest.raises(AmphoraImageError, match=r"running: \['arm64'\]"):
        work(request, make_plan(request, Host()), Console(file=io.StringIO()))


def test_commands(box: Sandbox, wish: Callable[..., Request]) -> None:
    """disk-image-create runs in the work directory, then what makes files of its tree."""
    request = wish(
        image_types=ALL_TYPES,
        qemu_img_options="cluster_size=1M",
        environment=Environment(source_date_epoch=1795593600),
    )
    built(request)
    mkdir, create, write = box.commands
    assert mkdir.argv == ["mkdir", "-p", create.cwd]
    assert create.argv[1].endswith("/disk-image-create")
    assert create.argv[2:] == list(make_plan(request, Host()).argv[1:])
    assert create.env["AMPHORA_TREE"] == f"{create.cwd}/tree"
    source, files = json.loads(write.argv[-1])
    assert source == {
        "work": create.cwd,
        "name": "lb",
        "size": 5 * 1024**3,
        "architecture": "amd64",
        "qemu_img_options": "cluster_size=1M",
        "vhd_subformat": "dynamic",
        "epoch": 1795593600,
    }
    assert list(files) == list(ALL_TYPES)


def test_environment_of_the_build(
    box: Sandbox, wish: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller's variables reach diskimage-builder, the plan's lie over them."""
    monkeypatch.setenv("DIB_SOMETHING_ELSE", "kept")
    monkeypatch.setenv("http_proxy", "http://mirror.example.org:3128")
    monkeypatch.setenv("DIB_RELEASE", "not-this")
    request = wish()
    built(request)
    env = box.commands[1].env
    plan = make_plan(request, Host())
    assert env["DIB_SOMETHING_ELSE"] == "kept"
    assert env["http_proxy"] == "http://mirror.example.org:3128"
    assert {name: env[name] for name in plan.environment} == plan.environment
    assert env["TMPDIR"] == box.commands[1].cwd
    assert "AMPHORA_ROOT_PASSWORD_FILE" not in env
    assert os.environ["DIB_RELEASE"] == "not-this"


def test_odd_paths_are_mounted(box: Sandbox, wish: Callable[..., Request], tmp_path: Path) -> None:
    """diskimage-builder sees odd paths under safe names, several of one variable too."""
    odd = tmp_path / "ca che 'größe'"
    for name in ("elements", "more elements"):
        (tmp_path / name).mkdir()
    paths = Environment(local_elements_path=(tmp_path / "elements", tmp_path / "more elements"))
    built(wish(cache_dir=odd, environment=paths))
    env = box.commands[1].env
    sources = {mount.target: mount.source for mount in box.mounts}
    assert sources[env["DIB_IMAGE_CACHE"]] == str(odd)
    first, second, *_ = env["ELEMENTS_PATH"].split(":")
    assert (first, sources[second]) == (str(tmp_path / "elements"), str(tmp_path / "more elements"))
    assert ws.SAFE_PATH.fullmatch(env["ELEMENTS_PATH"].replace(":", ""))


def test_dnf_has_a_cache_of_its_own(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path
) -> None:
    """Two builds with dnf that share a cache directory do not share dnf's lock."""
    built(wish(base_os=BaseOS.ROCKY, release="10", cache_dir=tmp_path / "ca che"))
    shared = Path(box.commands[1].env["DIB_IMAGE_CACHE"], "yum")
    [own] = [mount.source for mount in box.mounts if mount.target == str(shared)]
    assert Path(own).is_relative_to(tmp_path / "tmp")
    built(wish())
    assert "yum" not in str(box.mounts)


def test_password_is_a_hash_in_a_file(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path
) -> None:
    """The password reaches neither argv, environment, log nor manifest; its hash's file ends."""
    seen: list[tuple[str, int]] = []

    def look() -> None:
        file = Path(box.commands[1].env["AMPHORA_ROOT_PASSWORD_FILE"])
        seen.append((file.read_text(), file.stat().st_mode & 0o777))

    box.on_start = look
    built(wish(root_password=PASSWORD))
    assert seen == [(f"$6${len(PASSWORD) + 1}\n", 0o600)]
    assert PASSWORD not in str(box.commands)
    for file in tmp_path.rglob("*"):
        assert file.is_dir() or PASSWORD.encode() not in file.read_bytes()


def test_failure_says_why(box: Sandbox, wish: Callable[..., Request], tmp_path: Path) -> None:
    """A failure has the lines that matter, the log's path and a hint, and leaves nothing."""
    box.status = 1
    box.lines = ["+ apt-get update\n", "E: Unable to locate package x\n", "Unmount /x\n"]
    with pytest.raises(AmphoraImageError) as failure:
        built(wish())
    [log] = (tmp_path / "cache/logs").iterdir()
    assert str(failure.value) == (
        f"the build failed\nE: Unable to locate package x\nThe whole log: {log}"
    )
    assert failure.value.hint == (
        "a package is not in the archive: check -d, -k and the mirror's components"
    )
    assert log.read_text().count("\n") == 3
    assert box.killed
    assert list((tmp_path / "images").iterdir()) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signal_undoes_all(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, signum: int, code: int
) -> None:
    """A signal ends the sandbox and all that was made; the older image stays."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/lb.qcow2").write_text("old")
    box.on_start = lambda: signal.raise_signal(signum)
    with pytest.raises(Interrupted) as stop:
        built(wish(on_disk=True))
    assert stop.value.exit_code == code
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["lb.qcow2"]
    assert (tmp_path / "images/lb.qcow2").read_text() == "old"
    assert list((tmp_path / "tmp").iterdir()) == []
    assert list((tmp_path / "work").iterdir()) == []


def test_signals_get_their_handlers_back() -> None:
    """After work that was not interrupted, signals do what they did before."""
    before = [signal.getsignal(each) for each in ws.SIGNALS]
    with build.signals_interrupt():
        assert [signal.getsignal(each) for each in ws.SIGNALS] != before
    assert [signal.getsignal(each) for each in ws.SIGNALS] == before


@pytest.mark.parametrize("signum", ws.SIGNALS)
def test_later_signals_are_ignored(signum: signal.Signals) -> None:
    """The first signal interrupts; no other one disturbs the clean-up."""
    with pytest.raises(Interrupted, match=f"stopped by signal {signum.value}"):
        interrupted_by(signum)
    for each in ws.SIGNALS:
        signal.raise_signal(each)


def interrupted_by(signum: int) -> None:
    """Work that is interrupted, and again while it cleans up."""
    with build.signals_interrupt():
        try:
            signal.raise_signal(signum)
        finally:
            signal.raise_signal(signal.SIGTERM)


def test_older_file_stays_until_the_new_one_is_whole(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At no moment is there a half image, or an image without a checksum, under the name."""
    images = tmp_path / "images"
    images.mkdir()
    (images / "lb.raw").write_text("old")
    whole = f"new {'raw.part'}"
    seen: list[tuple[str, set[str]]] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        seen.append((target.name, {file.name for file in images.iterdir()}))
        assert (images / "lb.raw").read_text() == "old"
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    built(wish(image_types=(ImageType.RAW,)))
    assert [name for name, _ in seen] == ["lb.raw.sha256", "lb.raw.json", "lb.raw"]
    assert {"lb.raw", "lb.raw.sha256", "lb.raw.json"} < seen[-1][1]
    assert (images / "lb.raw").read_text() == whole


def test_failing_publication_leaves_no_part(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the disk is full in the last moment, no part of a file stays."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        built(wish())
    assert list((tmp_path / "images").iterdir()) == []


def test_files_are_the_callers(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who called sudo owns the log, the image, its checksum and its manifest."""
    owned: list[tuple[str, int, int]] = []
    monkeypatch.setenv("SUDO_UID", "1000")
    monkeypatch.setenv("SUDO_GID", "1001")
    monkeypatch.setattr(
        build.os, "chown", lambda path, uid, gid: owned.append((Path(path).suffix, uid, gid))
    )
    built(wish())
    assert owned == [(".log", 1000, 1001), *[(".part", 1000, 1001)] * 3]


def test_little_memory(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where memory is too little the build is on disk, and says so."""
    screen = io.StringIO()
    monkeypatch.setattr(build.host, "available_memory", lambda: build.host.BUILD_MEMORY)
    built(wish(), screen)
    assert box.mounts[0].source.startswith(str(tmp_path / "work/"))
    assert "building on disk" in screen.getvalue()


@pytest.mark.parametrize("on_disk", [True, False])
def test_place_of_work(
    box: Sandbox, wish: Callable[..., Request], tmp_path: Path, on_disk: bool
) -> None:
    """The work is in memory, or with -f on disk in -w."""
    built(wish(on_disk=on_disk))
    place = box.mounts[0].source
    assert Path(place).parent == tmp_path / "work" if on_disk else place == ""
    assert not (tmp_path / "work").exists() or list((tmp_path / "work").iterdir()) == []


def test_twenty_logs_are_kept(wish: Callable[..., Request], tmp_path: Path) -> None:
    """The cache directory keeps the newest logs, the new one among them."""
    logs = tmp_path / "cache/logs"
    logs.mkdir(parents=True)
    for number in range(30):
        (logs / f"{number}.log").touch()
        os.utime(logs / f"{number}.log", (number, number))
    new = build.default_log(wish())
    kept = {path.name for path in logs.iterdir()}
    assert kept == {new.name, *(f"{number}.log" for number in range(11, 30))}


def test_log_of_a_long_name(wish: Callable[..., Request]) -> None:
    """A name that just fits a file system has a log all the same."""
    assert build.default_log(wish(output=Path("/x") / ("n" * 240))).exists()


def test_image_of_other_elements(
    box: Sandbox, wish: Callable[..., Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image of other elements may tell nothing; its manifest says what is known."""
    box.on_start = lambda: Path(box.commands[0].env["AMPHORA_CONTENTS_FILE"]).unlink()
    [file] = built(wish(environment=Environment(elements=("vm", "debian-minimal"))))
    record = json.loads(Path(f"{file}.json").read_text())
    assert "packages" not in record
    assert record["plan"]["elements"] == ["vm", "debian-minimal"]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[int]], tuple[int, list[str]]]:
    """A function that runs the sandbox's side of a job whose commands end with these statuses."""

    def work(statuses: list[int]) -> tuple[int, list[str]]:
        ran: list[str] = []
        left = iter(statuses)

        def call(argv: list[str], **_: object) -> int:
            ran.append(argv[0])
            return next(left)

        monkeypatch.setattr(sandbox, "run", lambda argv: ran.append(" ".join(argv)))
        monkeypatch.setattr(sandbox.subprocess, "call", call)
        monkeypatch.setattr(sandbox, "_reap", lambda: None)
        document = {
            "mounts": [{"source": "/a b", "target": "/x"}, {"source": "", "target": "/work"}],
            "commands": [{"argv": [f"c{n}"], "env": {}, "cwd": "/"} for n in range(len(statuses))],
        }
        monkeypatch.setattr(sandbox.sys, "stdin", io.StringIO(json.dumps(document)))
        return sandbox.main(), ran[2:] if ran[0].startswith("mount --bind /a b /x") else ran

    return work


@pytest.mark.parametrize(
    ("statuses", "status", "ran"),
    [([0, 0], 0, ["c0", "c1"]), ([0, 3, 0], 3, ["c0", "c1"]), ([], 0, [])],
)
def test_sandbox_runs_until_one_fails(
    job: Callable[[list[int]], tuple[int, list[str]]],
    statuses: list[int],
    status: int,
    ran: list[str],
) -> None:
    """Mounts come first; commands run in order, and none after the first that fails."""
    assert job(statuses) == (status, ran)


def test_sandbox_that_cannot_mount(
    job: Callable[[list[int]], tuple[int, list[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A mount that fails is one line of the log, and no command runs."""
    document = {"mounts": [{"source": "/a", "target": "/b"}], "commands": []}

    def run(_: object) -> str:
        raise AmphoraImageError("mount ended with 32")

    monkeypatch.setattr(sandbox, "run", run)
    monkeypatch.setattr(sandbox.sys, "stdin", io.StringIO(json.dumps(document)))
    assert sandbox.main() == 1
    assert capsys.readouterr().out == "sandbox: mount ended with 32\n"


def test_plan_is_told_as_it_was_made(box: Sandbox, wish: Callable[..., Request]) -> None:
    """The manifest holds the very plan that was carried out."""
    plan = Plan(("vm",), ("-n",), {"DIB_RELEASE": "trixie"}, {})
    request = wish()
    [file] = build.build(request, plan, Console(quiet=True))
    assert json.loads(Path(f"{file}.json").read_text())["plan"] == plan.as_json()
    assert box.commands[1].argv[2:] == ["-n", "vm"]
