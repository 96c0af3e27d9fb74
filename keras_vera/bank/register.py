"""Which adapters an `AdapterBank` has: those that its folder holds now."""

import contextlib

from keras_vera.bank.folder import Folder
from keras_vera.files.format import AdapterFileError


class _NoSuchFile(AdapterFileError, KeyError):
    """A name is not in the folder; a `KeyError`, which damage is not."""


class Register:
    """The names of the adapters of a bank.

    Attributes:
        folder: The `Folder`, which knows them; or `None`, and they are kept
            here.
        held: Dict by name of the `disk.Version` of what `fit` uses just now.
            These adapters stay what they are, whatever happens to their files.
    """

    def __init__(self, folder):
        """
        Args:
            folder: String, or `None`.
        """
        self.folder = None if folder is None else Folder(folder)
        self.held = {}
        self._names = {}  # Without a folder, in the order of adding.

    @property
    def names(self):
        """List of the names of all adapters."""
        return list(self._names) if self.folder is None else self.folder.names()

    def __contains__(self, name):
        return self._find(name)[0]

    def add(self, name, content=None, replace=False):
        """Adds an adapter.

        Args:
            name: String.
            content: The bytes of its file, for a folder.
            replace: Boolean, whether there may be one of this name.
        """
        if self.folder is None:
            self._names[name] = None
        elif replace:
            self.folder.replace(name, content)
        else:
            with self._taken_is_an_error(name):
                self.folder.add(name, content)

    def remove(self, name):
        if self.folder is None:
            del self._names[name]
        else:
            with self._gone_is_unknown(name):
                self.folder.remove(name)

    def rename(self, name, new_name):
        if self.folder is None:
            self._names = {
                new_name if other == name else other: None
                for other in self._names
            }
        else:
            with self._taken_is_an_error(new_name), self._gone_is_unknown(name):
                self.folder.rename(name, new_name)

    # ---- Checks.

    def check_new(self, name, replace=False):
        if not isinstance(name, str) or not name:
            raise ValueError(
                "`name` must be a string that is not empty. "
                f"Received: name={name!r}"
            )
        if not replace and name in self:
            raise _already_there(name)

    def check_no_folder(self):
        if self.folder is not None:
            raise ValueError(
                "A bank with a folder gives no ids, since its adapters come "
                "and go. Use `bank.predict`, `bank.fit` or `bank.generate` "
                "with names."
            )

    def check_known(self, adapters, base=True, errors=None):
        """Raises for names that are not in the bank.

        Args:
            adapters: List of names.
            base: Boolean, whether `None` stands for the base model.
            errors: Dict, which gets errors by name instead. Defaults to
                `None`.

        Returns:
            Dict by name of the `disk.Version` of each file, without those
            that have an error.
        """
        versions, unknown = {}, []
        for name in dict.fromkeys(adapters):
            if name is None and base:
                continue
            with collected(errors, name):
                is_there, version = self._find(name)
                if is_there:
                    versions[name] = version
                elif errors is None:
                    unknown.append(name)
                else:
                    errors[name] = self._unknown([name])
        if unknown:
            raise self._unknown(unknown)
        return versions

    def _find(self, name):
        """Returns whether an adapter is there, and the version of its file."""
        if not isinstance(name, str) or not name:
            return False, None
        if self.folder is None:
            return name in self._names, None
        held = self.held
        if name in held:
            return True, held[name]
        version = self.folder.version(name)
        return version is not None, version

    def _unknown(self, names):
        shown = ", ".join(map(repr, names[:5]))
        text = f"The bank has no adapter named {shown}; "
        if self.folder is None:
            return ValueError(
                f"{text}it has {len(self._names)}, see `bank.names`."
            )
        # There may be too many to count them.
        return _NoSuchFile(
            f"{text}its folder '{self.folder.path}' has no such file. See "
            "`bank.names`."
        )

    @contextlib.contextmanager
    def _gone_is_unknown(self, name):
        """Raises as `check_known` where another process was faster."""
        try:
            yield
        except FileNotFoundError:
            self.check_known([name])
            raise self._unknown([name]) from None

    @contextlib.contextmanager
    def _taken_is_an_error(self, name):
        """Raises as `check_new` where another process was faster."""
        try:
            yield
        except FileExistsError:
            raise _already_there(name) from None


@contextlib.contextmanager
def collected(errors, name):
    """Puts what goes wrong with an adapter into `errors`, if it is a dict."""
    try:
        yield
    except ValueError as error:
        if errors is None:
            raise
        errors[name] = error


def _already_there(name):
    return ValueError(
        f"The bank has an adapter named {name!r} already. Call "
        "`bank.remove(name)` first, or take another name."
    )
