"""Adapter files on the Hugging Face Hub, by `hf://` paths.

The paths are those of huggingface_hub: `hf://user/repo`, with `@revision`
behind it if need be, and with a file of it.
"""

import contextlib
import os
import re
from urllib.parse import unquote

from keras_vera.files.disk import EXTENSION
from keras_vera.files.disk import AdapterFileError

_SCHEME = "hf://"
# The file of a repository that a path without one means.
_FILE = "adapter" + EXTENSION
# Revisions with a slash are encoded, except for those of pull requests.
_PATH = re.compile(
    r"hf://(?P<repo>[^/@]+/[^/@]+)"
    r"(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?"
    r"(/(?P<file>.+))?/?"
)


class HubPath:
    """What an `hf://` path says: a repository, a file and a revision."""

    def __init__(self, path):
        hub = import_hub(path)
        match = _PATH.fullmatch(path)
        try:
            if match is None:
                raise ValueError("it has no repository.")
            hub.utils.validate_repo_id(match["repo"])
            if match["repo"].split("/")[0] in ("datasets", "spaces"):
                raise ValueError("its repository is not one of a model.")
            file = match["file"] or _FILE
            if not file.endswith(EXTENSION):
                raise ValueError(f"its file does not end in `{EXTENSION}`.")
            if {"", ".", ".."} & set(file.split("/")):
                raise ValueError("its file is not inside the repository.")
        except ValueError as error:
            raise ValueError(
                "A path on the Hugging Face Hub must have the form "
                "'hf://user/repo', 'hf://user/repo@revision' or "
                f"'hf://user/repo/name{EXTENSION}'. "
                f"Received: {path!r}: {error}"
            ) from None
        revision = match["revision"]
        self.repo = match["repo"]
        self.file = file
        self.revision = None if revision is None else unquote(revision)


def import_hub(path="hf://"):
    try:
        import huggingface_hub
    except ImportError:
        raise ImportError(
            f"'{path}' needs the package huggingface_hub. Install it with "
            "`pip install huggingface_hub` or `pip install keras_vera[hf]`."
        ) from None
    return huggingface_hub


def is_hub_path(filepath):
    return isinstance(filepath, str) and filepath.startswith(_SCHEME)


def check_is_here(name, path, instead):
    """Raises if a path is on the Hub, where only this machine will do.

    Args:
        name: String, the argument.
        path: String or path; `pathlib` makes one slash of two.
        instead: String, what to do.
    """
    if os.fsdecode(path).startswith(_SCHEME[:-1]):
        raise ValueError(
            f"`{name}` must be a path on this machine, not on the Hugging "
            f"Face Hub. Received: {name}={os.fsdecode(path)!r}. {instead}"
        )


def local_file(filepath):
    """Returns a file on this machine, downloaded if it is on the Hub."""
    if not is_hub_path(filepath):
        return filepath
    path = HubPath(filepath)
    hub = import_hub(filepath)
    with errors_of_hub(filepath, "could not be downloaded"):
        return hub.hf_hub_download(
            repo_id=path.repo,
            filename=path.file,
            revision=path.revision,
            library_name="keras_vera",
        )


@contextlib.contextmanager
def errors_of_hub(path, what):
    """Turns what goes wrong on the Hub into an error that names the path."""
    # The second kind is of the package that its versions connect with.
    http_errors = import_hub(path).errors.HfHubHTTPError.__bases__
    try:
        yield
    except (OSError, ValueError, *http_errors) as error:
        raise AdapterFileError(f"'{path}' {what}: {error}") from error
