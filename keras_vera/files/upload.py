"""Adapters on the Hugging Face Hub: the upload, and its model card."""

import hashlib
import math
import os
import tempfile
from collections.abc import Sequence
from typing import Any

from keras_vera._types import FilePath
from keras_vera.files import format as adapter_format
from keras_vera.files import hub_paths

_README = "README.md"


def upload_adapter(
    filepath: FilePath,
    hub_path: str,
    base_model: str | None = None,
    pipeline_tag: str | None = None,
    license: str | None = None,
    tags: Sequence[str] = (),
    eval_results: list[Any] | None = None,
    private: bool | None = None,
) -> str:
    """Uploads an adapter file to the Hugging Face Hub, with a model card.

    The repository is made if there is none. File and card come in one commit;
    a card that is there is replaced. The card has the Hub's own metadata, and
    in it, under `keras_vera`, what the file says: rank, seed, targets, trained
    numbers, and the fingerprint of the base. `load_adapter` takes the same
    path.

    `save_adapter(model, "hf://user/repo")` uploads as well; it writes a card
    without what only you know, and only where there is none.

    Args:
        filepath: `str` or `pathlib.Path`, made by `save_adapter`; or a path
            on the Hub, as `load_adapter` takes it.
        hub_path: `str`, `"hf://user/repo"` or
            `"hf://user/repo/name.vera.safetensors"`. Without a name, the file
            is `adapter.vera.safetensors`. `@branch` behind the repository
            names a branch that exists.
        base_model: `str`, the base on the Hub, such as
            `"FacebookAI/roberta-base"`. Defaults to `None`.
        pipeline_tag: `str`, the task in the Hub's terms, such as
            `"text-classification"`. Defaults to `None`.
        license: `str`, such as `"apache-2.0"`. Defaults to `None`.
        tags: List of `str`, more tags. Defaults to `()`.
        eval_results: List of `huggingface_hub.EvalResult`, metrics to show.
            Defaults to `None`.
        private: `bool`, whether a repository that is made is private.
            Defaults to `None`: as the account or organization says.

    Returns:
        `str`, the address of the commit.

    Raises:
        keras_vera.AdapterFileError: If the file is damaged, or if the upload
            fails.
        ValueError: If an argument makes no sense to the Hub.
        ImportError: If huggingface_hub is not installed.

    Example:

    ```python
    import huggingface_hub

    keras_vera.upload_adapter(
        "sst2.vera.safetensors",
        "hf://user/roberta-sst2-vera",
        base_model="FacebookAI/roberta-base",
        pipeline_tag="text-classification",
        eval_results=[
            huggingface_hub.EvalResult(
                task_type="text-classification",
                dataset_type="stanfordnlp/sst2",
                dataset_name="SST-2",
                metric_type="accuracy",
                metric_value=0.94,
            )
        ],
    )
    ```
    """
    if not hub_paths.is_hub_path(hub_path):
        raise ValueError(
            "`hub_path` must begin with 'hf://'. "
            f"Received: hub_path={hub_path!r}"
        )
    path = hub_paths.HubPath(hub_path)
    filepath = hub_paths.local_file(filepath)
    adapter_format.read(filepath)
    card = make_card(
        filepath,
        path,
        base_model=base_model,
        pipeline_tag=pipeline_tag,
        license=license,
        tags=tags,
        eval_results=eval_results,
    )
    return upload(filepath, path, hub_path, card, private)


def check_destination(filepath):
    """Returns where an adapter can be saved to: a path, here or on the Hub."""
    if hub_paths.is_hub_path(filepath):
        hub_paths.HubPath(filepath)
        return filepath
    return adapter_format.check_filepath(filepath)


def write(filepath, header, tensors):
    """Writes an adapter file, on this machine or on the Hub."""
    if not hub_paths.is_hub_path(filepath):
        adapter_format.write(filepath, header, tensors)
        return
    path = hub_paths.HubPath(filepath)
    with tempfile.TemporaryDirectory() as folder:
        file = os.path.join(folder, os.path.basename(path.file))
        adapter_format.write(file, header, tensors)
        upload(file, path, filepath)


def upload(filepath, path, hub_path, card=None, private=None):
    """Uploads a file and its card in one commit.

    Without `card`, a plain one is made if the repository has none.
    """
    hub = hub_paths.import_hub(hub_path)
    plain = None if card is not None else make_card(filepath, path)
    with hub_paths.errors_of_hub(hub_path, "could not be uploaded"):
        api = hub.HfApi(library_name="keras_vera")
        api.create_repo(path.repo, private=private, exist_ok=True)
        if card is None and not api.file_exists(
            path.repo, _README, revision=path.revision
        ):
            card = plain
        operations = [
            hub.CommitOperationAdd(
                path_in_repo=path.file, path_or_fileobj=os.fspath(filepath)
            )
        ]
        if card is not None:
            operations.append(
                hub.CommitOperationAdd(
                    path_in_repo=_README,
                    path_or_fileobj=str(card).encode(),
                )
            )
        commit = api.create_commit(
            path.repo,
            operations,
            commit_message=f"Upload {path.file} with keras_vera",
            revision=path.revision,
        )
        return str(commit.commit_url)


def make_card(filepath, path, base_model=None, tags=(), **metadata):
    """Returns the `huggingface_hub.ModelCard` of an adapter file."""
    hub = hub_paths.import_hub()
    header, entries = adapter_format.read_header(filepath)
    facts = _facts(header, entries)
    if base_model is not None:
        base_model = base_model.removeprefix("hf://")
        try:
            hub.utils.validate_repo_id(base_model)
        except ValueError as error:
            raise ValueError(
                "`base_model` must be the name of a model on the Hugging Face "
                f"Hub, such as 'FacebookAI/roberta-base'. {error}"
            ) from None
        metadata |= {
            "base_model": base_model,
            "base_model_relation": "adapter",
        }
    data = hub.ModelCardData(
        library_name="keras_vera",
        tags=["keras", "vera", "adapter", *tags],
        model_name=path.repo.split("/")[1],
        keras_vera=facts,
        **metadata,
    )
    return hub.ModelCard(f"---\n{data.to_yaml()}\n---\n{_text(path, facts)}")


def _facts(header, entries):
    """Returns what the card says of an adapter, for people and machines."""
    layers = header["layers"]
    prints = (x["kernel_fingerprint"] for x in layers.values())
    return {
        "rank": header["rank"],
        "seed": header["seed"],
        "structure": header["structure"],
        "targets": header["targets"],
        "layers": len(layers),
        "trained_numbers": sum(math.prod(x) for _, x in entries.values()),
        # Of the kernels that the adapter belongs to, in the file's order.
        "base_fingerprint": hashlib.sha256(
            "".join(prints).encode()
        ).hexdigest()[:16],
        "format_version": header["format_version"],
    }


def _text(path, facts):
    place = f"{path.repo}/{path.file}"
    values = {x: str(y).replace("|", "\\|") for x, y in facts.items()}
    rows = "\n".join(
        f"| {name.replace('_', ' ')} | {value} |"
        for name, value in values.items()
    )
    return f"""
# {path.repo.split("/")[1]}

A [VeRA](https://arxiv.org/abs/2310.11454) adapter for a Keras model: the
vectors that were trained, and the task head if there is one. The random
matrices are made again from the seed, unless the seed is `None` and the file
holds them.

| | |
|---|---|
{rows}

```python
import keras_vera

# `model` is the base model, with the same weights and the same head.
keras_vera.load_adapter(model, "hf://{place}")
```
"""
