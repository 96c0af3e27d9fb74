"""The folder of an `AdapterBank`, which several processes may share."""

import contextlib
import errno
import os
import urllib.parse

from keras_vera.files import disk
from keras_vera.files.format import EXTENSION
from keras_vera.files.format import AdapterFileError
from keras_vera.files.format import check_filepath
from keras_vera.files.hub_paths import check_is_here

_ERRORS = "surrogatepass"  # What a name may hold, a file name may not.


class Folder:
    """A folder with an adapter file for each name.

    What it holds is what there is: nothing is remembered, since others may
    change it at any time. See `disk.py` for how files are written.
    """

    def __init__(self, path):
        check_is_here("folder", path, "Use a folder here.")
        self.path = os.fspath(path)
        os.makedirs(self.path, exist_ok=True)
        disk.sweep(self.path)

    def names(self):
        """Returns the names of all adapters, sorted."""
        names = []
        with disk.errors_about(self.path, "could not be read"):
            with os.scandir(self.path) as entries:
                for entry in entries:
                    if entry.name.endswith(EXTENSION):
                        quoted = entry.name[: -len(EXTENSION)]
                        name = urllib.parse.unquote(quoted, errors=_ERRORS)
                        # Others are no files of a bank.
                        if _quoted(name) == quoted and name:
                            names.append(name)
        return sorted(names)

    def file(self, name):
        return check_filepath(
            os.path.join(self.path, _quoted(name) + EXTENSION)
        )

    def version(self, name):
        """Returns the `disk.Version` of an adapter, `None` if there is none.

        Raises:
            AdapterFileError: If the folder does not answer, so that nobody
                knows.
        """
        file = self.file(name)
        try:
            return disk.version_of(os.stat(file))
        except FileNotFoundError:
            # Nor is there any where the folder itself is away.
            with disk.errors_about(self.path, "could not be read"):
                os.stat(os.path.join(self.path, ""))
            return None
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                return None
            raise AdapterFileError(
                f"'{file}' could not be read: {error.strerror}"
            ) from error

    def add(self, name, content):
        """Writes a new adapter, or raises `FileExistsError`."""
        file = self.file(name)
        with disk.written({file: content}) as temporaries, self._changing():
            disk.place_new(temporaries[file][0], file)

    def replace(self, name, content):
        """Writes an adapter, whether there is one of that name or not."""
        disk.write_files({self.file(name): content})

    def update(self, contents, versions):
        """Writes new versions of adapters, of those that are as expected.

        Args:
            contents: Dict of bytes by name.
            versions: Dict of `disk.Version` by name, what they must have.

        Returns:
            Dict of the versions that were written; it lacks adapters that
            somebody else has changed or removed, which are left alone.
        """
        files = {self.file(name): x for name, x in contents.items()}
        new = {}
        with (
            disk.written(files) as temporaries,
            disk.errors_about(self.path, "could not be changed"),
            disk.changing(self.path),
        ):
            for name in contents:
                temporary, version = temporaries[self.file(name)]
                if self.version(name) == versions[name]:
                    os.replace(temporary, self.file(name))
                    new[name] = version
        return new

    def rename(self, name, new_name):
        """Raises `FileNotFoundError` or `FileExistsError`."""
        with self._changing():
            disk.place_new(self.file(name), self.file(new_name))

    def remove(self, name):
        """Raises `FileNotFoundError` if there is none."""
        with self._changing():
            os.remove(self.file(name))

    @contextlib.contextmanager
    def _changing(self):
        """As `disk.changing`; an error that is not of a name says so."""
        try:
            with disk.changing(self.path):
                yield
        except (FileExistsError, FileNotFoundError):
            raise
        except OSError as error:
            raise AdapterFileError(
                f"'{self.path}' could not be changed: {error.strerror}"
            ) from error


def _quoted(name):
    # Every name is a file name so, and no two names are the same.
    quoted = urllib.parse.quote(name, safe=" ", errors=_ERRORS)
    return quoted.replace(".", "%2E")
