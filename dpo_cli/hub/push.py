"""Upload a run's model to the Hugging Face hub."""

from __future__ import annotations

import json
import re
import shlex
from importlib.metadata import version
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import LocalTokenNotFoundError

from dpo_cli.hub.model_card import MODEL_PLACEHOLDER, hub_name
from dpo_cli.models.locate import find_model
from dpo_cli.utils.errors import DpoError, UsageError, reason_of, suggest_path

FILES = ["README.md", "*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py"]  # of an export


def push(folder: Path, name: str, public: bool = False) -> dict[str, Any]:
    """Upload the model of a run, or its model/ or best/, in one commit; the card there names the repository.

    A new repository is private unless ``public``.

    Raises:
        UsageError: there is no trained model, nobody else could load it, or there is no login.
        DpoError: the upload failed; the message says how to try again.
    """
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name, re.ASCII):
        raise UsageError(f"{name}: must be ORG/NAME, for example my-name/my-model")
    model = folder / "model" if (folder / "manifest.json").is_file() else folder
    card, adapter = model / "README.md", model / "adapter_config.json"
    if not (card.is_file() and (model / "tokenizer_config.json").is_file()):
        beside = suggest_path(folder)
        raise UsageError(f"{folder}: no trained model there; name a complete run, or its model/ or best/{beside}")
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not (base and _is_on_hub(base)):
            named = base or "its configuration names none"
            raise UsageError(
                f"the adapter's base is not on the hub ({named}), so nobody else could load it; push a model of both: "
                "dpo merge"
            )
    api, message = HfApi(), f"Model trained by dpo-cli {version('dpo-cli')}"
    files = {file.relative_to(model).as_posix(): file for pattern in FILES for file in sorted(model.rglob(pattern))}
    content: dict[str, Path | bytes] = {path: file for path, file in files.items() if not path.startswith(".")}
    content["README.md"] = card.read_text(encoding="utf-8").replace(MODEL_PLACEHOLDER, name).encode()
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        added = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=source) for path, source in content.items()]
        done = api.create_commit(name, added, commit_message=message)  # upload_folder makes several
        private = bool(api.model_info(name).private)
    except LocalTokenNotFoundError as error:
        raise UsageError(f"{name}: you are not logged in; run: hf auth login") from error
    except Exception as error:  # offline, or what the hub answers
        reason = next((line for line in reason_of(error).splitlines() if line.strip()), type(error).__name__)
        again = f"Try again with: dpo push {shlex.quote(str(folder))} {name}"
        raise DpoError(f"the model could not be pushed to {name}: {reason}\n{again}") from error
    return {"url": str(done.repo_url), "private": private}


def _is_on_hub(base: str) -> bool:
    """Whether the hub has an adapter's base under that name; the default model's packaged copy has other weights."""
    try:
        return hub_name(find_model(base)) == base
    except UsageError:  # it was removed
        return False
