"""What stands in for the Hugging Face Hub: no test goes there.

Its calls take what the real client's take, by the real signatures, and it
keeps commits of files in a folder for each repository and revision.
"""

import inspect
import pathlib

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id


def _bound(function, *args, **kwargs):
    """Returns the arguments by name, as the real function would have them."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return {x: y for x, y in bound.arguments.items() if x != "self"}


class Hub:
    def __init__(self, folder):
        self.folder = pathlib.Path(folder)
        self.commits = []
        self.repos = {}
        self.error = None

    def install(self, monkeypatch):
        hub = self

        class HfApi:
            def __init__(self, *args, **kwargs):
                _bound(REAL.__init__, self, *args, **kwargs)

            def create_repo(self, *args, **kwargs):
                hub.create_repo(
                    **_bound(REAL.create_repo, self, *args, **kwargs)
                )

            def create_commit(self, *args, **kwargs):
                return hub.create_commit(
                    **_bound(REAL.create_commit, self, *args, **kwargs)
                )

            def file_exists(self, *args, **kwargs):
                return hub.file_exists(
                    **_bound(REAL.file_exists, self, *args, **kwargs)
                )

        def download(*args, **kwargs):
            return hub.download(**_bound(real_download, *args, **kwargs))

        REAL = huggingface_hub.HfApi
        real_download = huggingface_hub.hf_hub_download
        monkeypatch.setattr(huggingface_hub, "HfApi", HfApi)
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
        return self

    def create_repo(self, repo_id, exist_ok, private, repo_type, **_):
        validate_repo_id(repo_id)
        assert repo_type in (None, "model")
        if repo_id in self.repos:
            assert exist_ok, "409: the repository exists"
        self.repos.setdefault(repo_id, private)

    def create_commit(self, repo_id, operations, revision, commit_message, **_):
        if self.error is not None:
            raise self.error
        assert commit_message
        files = {}
        for operation in operations:
            assert type(operation) is huggingface_hub.CommitOperationAdd
            operation.path_in_repo.encode("ascii")
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        for name, content in files.items():
            path = self._path(repo_id, name, revision)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        self.commits.append(files)
        url = f"https://huggingface.co/{repo_id}/commit/{len(self.commits)}"
        return huggingface_hub.CommitInfo(
            commit_url=url,
            commit_message=commit_message,
            commit_description="",
            oid=str(len(self.commits)),
        )

    def file_exists(self, repo_id, filename, revision, **_):
        return self._path(repo_id, filename, revision).exists()

    def download(self, repo_id, filename, revision, **_):
        validate_repo_id(repo_id)
        if repo_id not in self.repos:
            raise _not_found(RepositoryNotFoundError, f"no {repo_id}")
        path = self._path(repo_id, filename, revision)
        if not path.exists():
            raise _not_found(RemoteEntryNotFoundError, f"no {filename}")
        return str(path)

    def _path(self, repo, name, revision):
        return self.folder / repo / (revision or "main") / name


def _not_found(kind, message):
    request = type("Request", (), {"method": "GET", "url": "https://hf.co"})
    response = type(
        "Response", (), {"headers": {}, "request": request, "status_code": 404}
    )
    return kind(message, response=response)
