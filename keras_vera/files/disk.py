"""Files that processes share: each is read once, and written in one step.

A file is never changed in place. A new version is a file of its own, which
takes over the name when it is whole, so that readers need no lock: what they
have opened stays as it is.
"""

import collections
import contextlib
import errno
import os
import secrets
import stat
import time

import safetensors

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

EXTENSION = ".vera.safetensors"
_TEMPORARY = ".vera.tmp"
_ABANDONED = 3600  # Seconds; a file is written in less than one.
# File systems that cannot lock or synchronize a folder say one of these.
_UNABLE = (
    errno.EBADF,
    errno.EINVAL,
    errno.ENOLCK,
    errno.ENOSYS,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
)

# What tells two files apart that had the same name, one after the other.
Version = collections.namedtuple("Version", "inode modified size")


class AdapterFileError(OSError, ValueError):
    """An adapter file cannot be read or written, is damaged, or does not fit.

    Whatever is wrong with a file ends in this error; the model and an older
    file are then as they were.
    """


@contextlib.contextmanager
def errors_about(filepath, what):
    """Turns what goes wrong inside into an error that names the file."""
    try:
        yield
    except AdapterFileError:
        raise
    except (
        OSError,
        ValueError,
        RecursionError,
        safetensors.SafetensorError,
    ) as error:
        reason = getattr(error, "strerror", None) or error
        raise AdapterFileError(f"'{filepath}' {what}: {reason}") from error


# ---- Reading.


@contextlib.contextmanager
def opened(filepath):
    """Opens a regular file; yields it and its `Version`."""
    # Without waiting: a pipe may never have a writer.
    flags = ("O_BINARY", "O_CLOEXEC", "O_NONBLOCK")
    handle = os.open(filepath, sum(getattr(os, x, 0) for x in flags))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file.")
        with os.fdopen(handle, "rb", closefd=False) as file:
            yield file, version_of(status)
    finally:
        os.close(handle)


def read_bytes(filepath):
    with opened(filepath) as (file, _):
        return file.read()


def version_of(status):
    """Returns the `Version` in what `os.stat` says of a file."""
    return Version(status.st_ino, status.st_mtime_ns, status.st_size)


# ---- Writing.


def write_files(contents):
    """Writes files of one folder; on `AdapterFileError`, none of them.

    Args:
        contents: Dict of bytes by path.
    """
    folder = os.path.dirname(next(iter(contents))) or "."
    with written(contents) as temporaries:
        with errors_about(folder, "could not be changed"), changing(folder):
            for filepath, (temporary, _) in temporaries.items():
                with errors_about(filepath, "could not be written"):
                    os.replace(temporary, filepath)


@contextlib.contextmanager
def written(contents):
    """Writes files under other names, beside those that they are to get.

    Yields:
        Dict by path of what was written for it, another path and a `Version`.
        What is still there in the end is removed.
    """
    temporaries = {}
    try:
        for filepath, content in contents.items():
            with errors_about(filepath, "could not be written"):
                if os.path.isdir(filepath):
                    raise ValueError("it is a directory.")
                name = f".{secrets.token_hex(8)}{_TEMPORARY}"
                temporary = os.path.join(os.path.dirname(filepath), name)
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                flags |= getattr(os, "O_BINARY", 0)
                handle = os.open(temporary, flags, 0o666)
                temporaries[filepath] = temporary, None
                version = _write(handle, temporary, content)
                temporaries[filepath] = temporary, version
        yield temporaries
    finally:
        for temporary, _ in temporaries.values():
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)


def _write(handle, temporary, content):
    with os.fdopen(handle, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # Of the clock, which is finer than the times that files get: no two
    # versions of a file are of the same moment.
    now = time.time_ns()
    os.utime(temporary, ns=(now, now))
    return version_of(os.stat(temporary))


def place_new(source, filepath):
    """Gives a file a name, or raises `FileExistsError` if there is one."""
    if fcntl is None:
        os.rename(source, filepath)  # Which does not replace, on Windows.
    else:
        os.link(source, filepath)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(source)


@contextlib.contextmanager
def changing(folder):
    """Keeps other writers out of a folder while its files change.

    They wait, in this process and in others. Afterwards the changes are on
    the disk. Where the file system cannot do one of these, it is left out.
    """
    handle = None
    with contextlib.suppress(PermissionError):
        # Windows opens no folders.
        handle = os.open(folder, os.O_RDONLY) if fcntl is not None else None
    if handle is None:
        yield
        return
    try:
        with _if_able():
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
        with _if_able():
            os.fsync(handle)
    finally:
        os.close(handle)  # Which unlocks, as does a death.


@contextlib.contextmanager
def _if_able():
    try:
        yield
    except OSError as error:
        if error.errno not in _UNABLE:
            raise


def sweep(folder):
    """Removes what writers that were killed have left in a folder."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.endswith(_TEMPORARY):
                continue
            with contextlib.suppress(OSError):
                if time.time() - entry.stat().st_mtime > _ABANDONED:
                    os.unlink(entry.path)
