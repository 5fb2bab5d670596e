"""What is saved carries the code that loads it, so that `trust_remote_code=True` takes the place of an installed dino_hf."""

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers.dynamic_module_utils import get_relative_import_files

if TYPE_CHECKING:
    # Never run. When a model is saved for the Hub, files are found by these lines of text: a file that imports this one is saved
    # with these files and all their imports, also if a model that was loaded as remote code is saved again.
    from .image_processing_dino_detr import DinoDetrImageProcessor  # noqa: F401
    from .image_processing_pil_dino_detr import DinoDetrImageProcessorPil  # noqa: F401
    from .modeling_dino_detr import DinoDetrForObjectDetection  # noqa: F401

AUTO_MAP: dict[str, str | dict[str, str]] = {
    "AutoConfig": "configuration_dino_detr.DinoDetrConfig",
    # A saved detector and a saved base model have the same tensors: either folder gives both.
    "AutoModel": "modeling_dino_detr.DinoDetrModel",
    "AutoModelForObjectDetection": "modeling_dino_detr.DinoDetrForObjectDetection",
    "AutoImageProcessor": {
        "torchvision": "image_processing_dino_detr.DinoDetrImageProcessor",
        "pil": "image_processing_pil_dino_detr.DinoDetrImageProcessorPil",
    },
}


def is_shipped(cls: type) -> bool:
    """Whether a class is defined in one of the files that travel; a user's subclass is not."""
    return cls.__module__.rpartition(".")[0] == __name__.rpartition(".")[0]


def shipped_files() -> list[Path]:
    """The files that travel: those that stand beside this one, in the package or in the cache of remote code."""
    return sorted({Path(file) for file in get_relative_import_files(__file__)} | {Path(__file__)})


class CarriesCode:
    """Mixed into the configuration and the image processors: what they save and upload has the code with it, and an `auto_map`
    every entry of which points to a file that lies beside."""

    auto_map_entries = tuple(AUTO_MAP)  # those that belong into this kind's json

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As in the library, with the code of the model (see sharing.py)."""
        if not os.path.isfile(save_directory):  # the library's to refuse
            self._share_code(Path(save_directory))
        return super().save_pretrained(save_directory, *args, **kwargs)

    def _share_code(self, folder: Path) -> None:
        """Entries from elsewhere are kept if their file lies in the folder, as those of a user's class do that was registered
        by `register_for_auto_class`. What a loaded folder or repository pointed to is not there, and goes."""
        auto_map, ours = {}, set()
        if is_shipped(type(self)):
            folder.mkdir(parents=True, exist_ok=True)
            for file in shipped_files():
                shutil.copyfile(file, folder / file.name)
                ours.add(file.stem)
            auto_map = {name: AUTO_MAP[name] for name in self.auto_map_entries}
        for name, entry in (getattr(self, "auto_map", None) or {}).items():
            modules = _modules(entry)
            if modules.isdisjoint(ours) and all((folder / f"{module}.py").is_file() for module in modules):
                auto_map[name] = entry
        if auto_map:
            self.auto_map = auto_map
        elif hasattr(self, "auto_map"):
            del self.auto_map  # None would break the Auto classes

    def _upload_modified_files(self, working_dir, repo_id, files_timestamps, *args, **kwargs):
        """As in `PushToHubMixin`, but the code always counts as modified; and where the repository has no model card, it gets
        none yet. The library would put an empty template there, and the model's own card could not take its place."""
        if files_timestamps:
            code = {file.name for file in shipped_files()}
            files_timestamps = {name: time for name, time in files_timestamps.items() if name not in code}
        elif read_remote_card(repo_id, kwargs.get("token")) is None:  # push_to_hub, in a folder of the library's own
            (Path(working_dir) / "README.md").unlink(missing_ok=True)
        return super()._upload_modified_files(working_dir, repo_id, files_timestamps, *args, **kwargs)


def read_remote_card(repo_id: str, token: str | bool | None) -> ModelCard | None:
    """README.md of a repository, None where there is none.

    Raises:
        huggingface_hub.errors.LocalEntryNotFoundError: there is no connection.
    """
    try:
        return ModelCard.load(repo_id, token=token, ignore_metadata_errors=True)
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError:
        return None


def _modules(entry: str | dict | list) -> set[str]:
    """Names of the modules that an entry points to; of another repository's, "repository--module", which is no file here."""
    references = entry.values() if isinstance(entry, dict) else [entry] if isinstance(entry, str) else entry
    return {one.rpartition(".")[0] for one in references if one is not None}  # tokenizers have pairs with a gap
