# SPDX-License-Identifier: Apache-2.0
"""Plan becomes image files: diskimage-builder in a sandbox, then the formats, then their names."""

from __future__ import annotations

import json
import os
import signal
import sys
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console

from amphora_image import disk_writer, foreign, host, image_cache, image_files, manifest, sandbox
from amphora_image.access import passwords, trust
from amphora_image.cache import FRESH, USED
from amphora_image.errors import AmphoraImageError, Interrupted
from amphora_image.image_cache import Made
from amphora_image.log import BuildLog, hint_for, that_matter
from amphora_image.plan import Plan
from amphora_image.request import GIB, ImageType, Request
from amphora_image.run import run
from amphora_image.sandbox import Command, Mount
from amphora_image.workspace import SIGNALS, Workspace, undisturbed, workspace

#: disk-image-create sleeps for a second at its end, in which its last lines are written: the
#: sandbox waits for these anyway. Its scripts, and elements', sleep as they are asked to. (A
#: function that :manpage:`bash(1)` takes from the environment.)
NO_LAST_SLEEP = {
    "BASH_FUNC_sleep%%": '() { [ "${0##*/}" = disk-image-create ] || command sleep "$@"; }'
}


def build(request: Request, plan: Plan, console: Console) -> list[Path]:
    """Build the image files of a request and return them, manifest and checksums beside them.

    :raises HostError: this machine cannot build.
    :raises Interrupted: a signal came; all is undone.
    :raises AmphoraImageError: the build failed; the message has the lines that matter.
    """
    with _begun(request, plan, console) as (space, log):
        request.output.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_outputs(request, space)
        key = image_cache.key_of(request, plan, os.environ)
        made = image_cache.take(key, partial) if key and not request.fresh else None
        if made:
            log.phase("cache: nothing has changed since the same image was built")
        else:
            made = _make(request, plan, space, partial, log, console)
            if key:
                image_cache.keep(key, partial, made)
        files = {
            request.outputs[kind].name: {"sha256": digest, "bytes": partial[kind].stat().st_size}
            for kind, digest in made.digests.items()
        }
        record = manifest.compose(request, plan, made.contents, log.seconds, files)
        text = json.dumps(record, indent=2) + "\n"
        return _publish(request, partial, made.digests, text, space)


def fetch(request: Request, plan: Plan, console: Console) -> list[str]:
    """Make the tree of a request and no image file: all that a build downloads is cached then.

    :returns: what the cache has of it, paths from the cache directory on.
    :raises HostError: this machine cannot build.
    :raises Interrupted: a signal came; all is undone.
    :raises AmphoraImageError: the build failed, or what it downloaded cannot be kept.
    """
    with _begun(request, plan, console) as (space, log):
        _place_work(request, space, console)
        *commands, _ = _commands(request, plan, space, {}, space.root / "contents.json")
        _run_in_sandbox(request, space, commands, log)
        used = _used_file(space)
        entries = used.read_text().split() if used.exists() else []
    if not any(entry.startswith("rootfs/") for entry in entries):
        raise AmphoraImageError(
            "the root file system cannot be kept: its archive does not tell its state",
            hint="fetch with the element amphora-base, from an archive with InRelease files",
        )
    return list(dict.fromkeys(entries))


@contextmanager
def _begun(request: Request, plan: Plan, console: Console) -> Iterator[tuple[Workspace, BuildLog]]:
    """Yield what any build works with, if this machine can build."""
    host.require(request)
    request.cache_dir.mkdir(parents=True, exist_ok=True)
    log_path = request.log_file or default_log(request)
    secrets = passwords({**os.environ, **plan.environment})
    with signals_interrupt(), BuildLog(log_path, console, secrets) as log, workspace() as space:
        give_to_caller(log_path)
        log.phase("preparation")
        yield space, log


def _used_file(space: Workspace) -> Path:
    return space.root / "used"


def _make(
    request: Request,
    plan: Plan,
    space: Workspace,
    partial: Mapping[ImageType, Path],
    log: BuildLog,
    console: Console,
) -> Made:
    """Make the image files in a sandbox."""
    _place_work(request, space, console)
    contents = space.root / "contents.json"
    _run_in_sandbox(request, space, _commands(request, plan, space, partial, contents), log)
    log.phase("checksums and manifest")
    # An image of other elements (DIB_ELEMENTS) may not tell what it holds.
    held = json.loads(contents.read_text()) if contents.exists() else {}
    return Made(held, image_cache.digests_of(partial))


@contextmanager
def signals_interrupt() -> Iterator[None]:
    """Turn SIGINT, SIGTERM or SIGHUP into Interrupted; later ones are ignored to the very end."""

    def interrupt(signum: int, _: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        raise Interrupted(signum)

    before = {each: signal.signal(each, interrupt) for each in SIGNALS}
    try:
        yield
    finally:
        if signal.getsignal(SIGNALS[0]) is interrupt:
            for each, handler in before.items():
                signal.signal(each, handler)


def default_log(request: Request) -> Path:
    """Make a log file in the cache directory, where 20 stay."""
    directory = request.cache_dir / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    for old in sorted(directory.glob("*.log"), key=lambda path: path.stat().st_mtime)[:-19]:
        old.unlink(missing_ok=True)
    descriptor, name = tempfile.mkstemp(f"-{request.output.name[:40]}.log", "build-", directory)
    os.close(descriptor)
    return Path(name)


def _place_work(request: Request, space: Workspace, console: Console) -> None:
    on_disk = host.builds_on_disk(request)
    if on_disk and not request.on_disk:
        console.print("less than 4 GiB of memory are free: building on disk, which is slower")
    space.work_in(request.working_dir if on_disk else None)


def _partial_outputs(request: Request, space: Workspace) -> dict[ImageType, Path]:
    partial = {}
    for kind, path in request.outputs.items():
        partial[kind] = path.with_name(f".{space.root.name}.{kind}.part")
        space.owns(partial[kind])
    return partial


def _commands(
    request: Request,
    plan: Plan,
    space: Workspace,
    partial: Mapping[ImageType, Path],
    contents: Path,
) -> list[Command]:
    env = _build_environment(request, plan, space, contents)
    python = str(space.safe(Path(sys.prefix)) / Path(sys.executable).relative_to(sys.prefix))
    scripts = space.safe(Path(sysconfig.get_path("scripts")))
    disk_image_create = [python, str(scripts / plan.argv[0]), *plan.argv[1:]]
    env["DIB_PYTHON_EXEC"] = _python_of_scripts(python, space)
    env |= NO_LAST_SLEEP
    here = str(space.root)
    work = str(space.work)
    source = disk_writer.Source(
        work=space.work,
        name=request.output.name,
        size=int(request.size * GIB),
        architecture=request.architecture,
        qemu_img_options=request.qemu_img_options,
        vhd_subformat=request.vhd_subformat,
        epoch=request.environment.source_date_epoch,
    )
    env["AMPHORA_TREE"] = str(source.tree)
    return [
        Command(["mkdir", "-p", work], env, here),
        Command(disk_image_create, env, work),
        Command([python, *image_files.argv(source, partial)], env, work),
    ]


def _python_of_scripts(python: str, space: Workspace) -> str:
    """Return a Python that starts in the C locale, which diskimage-builder sets."""
    if f"{sys.prefix}{__file__}".isascii():
        return python
    # Python reads the .pth file of an editable install in the locale's encoding before 3.13.
    wrapper = space.root / "python"
    wrapper.write_text(f'#!/bin/sh\nLC_ALL=C.UTF-8 exec {python} "$@"\n')
    wrapper.chmod(0o700)
    return str(wrapper)


def _build_environment(
    request: Request, plan: Plan, space: Workspace, contents: Path
) -> dict[str, str]:
    env = {**os.environ, **plan.environment}
    env |= trust(request.access, env, space)
    for name, paths in plan.paths.items():
        for path in paths:
            if name in {"DIB_IMAGE_CACHE", "UV_CACHE_DIR"}:
                path.mkdir(parents=True, exist_ok=True)
        env[name] = ":".join(str(space.safe(path)) for path in paths)
    if not request.debian_family:
        _keep_dnf_apart(Path(env["DIB_IMAGE_CACHE"]), space)
    work = str(space.work)
    locks = request.cache_dir / "locks"
    locks.mkdir(exist_ok=True)
    env |= {
        "AMPHORA_CONTENTS_FILE": str(contents),
        USED: str(_used_file(space)),
        "DIB_LOCKFILES": str(space.safe(locks)),  # builds that share a cache share its locks
        "TMPDIR": work,
        "TMP_DIR": work,
        "USER": "root",
    }
    if request.fresh:
        env[FRESH] = "1"
    if request.root_password is not None:
        env["AMPHORA_ROOT_PASSWORD_FILE"] = str(_password_file(request.root_password, space))
    return env


def _keep_dnf_apart(cache_dir: Path, space: Workspace) -> None:
    """Give a build a cache of its own in the place where diskimage-builder's elements share one.

    dnf's lock is the number of a process, which another build's PID namespace does not have.
    """
    own, shared = space.root / "yum", cache_dir / "yum"
    own.mkdir()
    shared.mkdir(exist_ok=True)
    space.mounts.append(Mount(str(own), str(shared)))


def _password_file(password: str, space: Workspace) -> Path:
    path = space.root / "root-password"
    path.touch(mode=0o600)
    # SHA-512 crypt(5), which every supported release reads; the password goes by standard input.
    path.write_text(run(["openssl", "passwd", "-6", "-stdin"], stdin=password + "\n"))
    return path


def _run_in_sandbox(
    request: Request, space: Workspace, commands: list[Command], log: BuildLog
) -> None:
    with foreign.programs(request.architecture):
        process = sandbox.start(space.mounts, commands)
        assert process.stdout
        try:
            for line in process.stdout:
                log.line(line)
            status = process.wait()
        finally:
            process.kill()
            process.stdout.read()  # ends when the last process of the sandbox has ended
            process.wait()
    if status:
        tail = "\n".join(that_matter(log.lines))
        raise AmphoraImageError(
            f"the build failed\n{tail}\nThe whole log: {log.path}", hint=hint_for(log.lines[-200:])
        )


def _publish(
    request: Request,
    partial: Mapping[ImageType, Path],
    digests: Mapping[ImageType, str],
    record: str,
    space: Workspace,
) -> list[Path]:
    """Give the files their names, checksums first, so that a whole image never lacks one."""
    with undisturbed():
        for kind, path in partial.items():
            final = request.outputs[kind]
            _write_whole(Path(f"{final}.sha256"), f"{digests[kind]}  {final.name}\n", space)
            _write_whole(Path(f"{final}.json"), record, space)
            give_to_caller(path)
            path.replace(final)
    return list(request.outputs.values())


def _write_whole(path: Path, text: str, space: Workspace) -> None:
    part = path.with_name(f".{space.root.name}.{path.suffix[1:]}.part")
    space.owns(part)
    part.write_text(text)
    give_to_caller(part)
    part.replace(path)


def give_to_caller(path: Path) -> None:
    """Let whoever called sudo own the file, and all read it that the umask lets."""
    if "SUDO_UID" in os.environ:
        os.chown(path, int(os.environ["SUDO_UID"]), int(os.environ.get("SUDO_GID", -1)))
