"""Publish the folder of a detector on the Hub: check it, show what would be uploaded, upload it in one commit."""

import re
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from transformers import PreTrainedModel
from transformers.utils import CONFIG_NAME, IMAGE_PROCESSOR_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..common.hub_access import reach_hub
from ..common.paths import expand_home
from ..common.regular_files import read_settings
from ..common.text import first_line, list_some, size_text
from ..inference.loading import load_detector, load_image_processor
from ..model.sharing import is_checkpoint
from ..runtime.card_data import CardData
from ..runtime.model_card import FILE_NAME as CARD_NAME
from ..runtime.model_card import digest_to_compare, is_ours, read_card, write_card_for_upload, write_model_card

_SECRET = re.compile(r"\b(hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{30,}|gh[pousr]_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16})\b")
_LOCAL_PATH = re.compile(
    r"(?:^|[\s\"'(])(/(?:home|Users|root|mnt|data|tmp|scratch)/[^\s\"']+|~/[^\s\"']+|[A-Z]:\\[^\s\"']+)"
)
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_IMAGES_OF_DATA = "mistakes.png"


class Publication(NamedTuple):
    """The files of a repository, checked."""

    folder: Path
    repo_id: str
    files: dict[str, Path]  # name in the repository -> file, in the order of upload
    left_out: list[str]  # names in the folder that are not uploaded
    warnings: list[str]
    model: PreTrainedModel
    digest: str | None  # of the weights, see `digest_to_compare`

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each file in bytes."""
        return {name: path.stat().st_size for name, path in self.files.items()}


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    is_dry_run: bool = True,
    is_private: bool = False,
    license: str | None = None,
    show=None,
) -> str | None:
    """Check the folder of a detector and upload it to the Hub in one commit; `dino-hf push` in Python.

    Uploaded are the weights, a current configuration and image processor with the code of the model, the model card, and the
    pictures of the card. Everything else stays: checkpoints, optimizer states, records of the run, links, unknown files.

    Args:
        folder: the folder of a trained, converted or saved detector.
        repo_id: "owner/name" on the Hub. It is created if it does not exist.
        is_dry_run: check and show only. Nothing is sent and no network is used.
        is_private: create a private repository. An existing repository keeps its setting.
        license: licence of the weights, such as "apache-2.0", if it is not recorded.
        show: called with the `Publication` before anything is sent.
    Returns:
        the address of the commit; None after a dry run.
    Raises:
        ValueError, FileNotFoundError: the folder is no whole detector, the name or the licence is not valid, or a file
            contains a secret.
        ConnectionError: the Hub does not answer.
        PermissionError: there is no login, or it may not write to the repository.
    """
    _check_name(repo_id)
    if license is not None and not _LICENSE.fullmatch(license):
        raise ValueError(
            f"{license!r:.100} is not an identifier of a licence. The Hub knows them in lower case and without spaces: apache-2.0, "
            "mit, cc-by-4.0, or other."
        )
    with TemporaryDirectory() as staged:
        publication = _stage(expand_home(folder), repo_id, license, Path(staged))
        if show is not None:
            show(publication)
        return None if is_dry_run else _send(publication, is_private)


def _stage(folder: Path, repo_id: str, license: str | None, staged: Path) -> Publication:
    """Check a folder, and write the generated files of the repository to another one."""
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}. Push the folder of a trained, converted or saved detector."
        )
    if is_checkpoint(folder.resolve()):
        raise ValueError(
            f"{folder} is a checkpoint of a run. Push the run's folder, which has the best weights, or load the checkpoint and "
            "save it elsewhere with save_pretrained."
        )
    model, processor = load_detector(folder, dtype="auto"), load_image_processor(folder)
    if model.config.model_type != "dino_detr":
        raise ValueError(
            f"{folder} is a detector of type {model.config.model_type!r}; dino-hf push uploads DINO detectors."
        )
    weights = _weight_files(folder)
    if license is not None:
        model.config.provenance = {**(model.config.provenance or {}), "license": license}
    model.config._name_or_path = ""
    model.config.save_pretrained(staged)
    processor.save_pretrained(staged)
    own, digest = read_card(folder), digest_to_compare(model)
    data = CardData.from_provenance(model.config.provenance, digest)
    pictures = [name for name in data.evaluation.pictures if _is_own_file(folder, name)]
    for name in pictures:  # the card shows the pictures that stand beside it
        (staged / name).write_bytes((folder / name).read_bytes())
    if own is not None and not is_ours(own):
        (staged / CARD_NAME).write_text(own, encoding="utf-8", newline="")
    else:
        write_model_card(staged, model.config, model.num_parameters(), name=repo_id, weights=digest)
    generated = {path.name: path for path in sorted(staged.iterdir())}
    first = {name: generated.pop(name) for name in (CARD_NAME, CONFIG_NAME, IMAGE_PROCESSOR_NAME) if name in generated}
    files = first | {name: folder / name for name in weights} | generated
    left_out = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir() if path.name not in files)
    warnings = [*_check_texts(files), *_warnings(model, data, own, files)]
    return Publication(folder, repo_id, files, left_out, warnings, model, digest)


def _weight_files(folder: Path) -> list[str]:
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    if index.is_file():
        names = {SAFE_WEIGHTS_INDEX_NAME, *read_settings(index).get("weight_map", {}).values()}
    else:
        names = {SAFE_WEIGHTS_NAME}
    if missing := sorted(name for name in names if not _is_own_file(folder, name)):
        raise FileNotFoundError(
            f"{folder} has no regular file {missing[0]}. Weights are uploaded as safetensors: load the model and save it with "
            "save_pretrained."
        )
    return sorted(names)


def _is_own_file(folder: Path, name: str) -> bool:
    """Whether a name is a regular file directly in a folder: no link, and no path that leads elsewhere."""
    return name == Path(name).name and (folder / name).is_file() and not (folder / name).is_symlink()


def _check_texts(files: dict[str, Path]) -> list[str]:
    """Sentences about paths of this machine in the texts.

    Raises:
        ValueError: a text contains an access token.
    """
    found = []
    for name, path in files.items():
        if path.suffix not in (".json", ".md"):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if _SECRET.search(text):
            raise ValueError(f"{name} contains an access token. Remove it from the file before you publish the folder.")
        if place := _LOCAL_PATH.search(text):
            found.append(f"{name} contains a path of this machine: {place[1]:.100}")
    return found


def _warnings(model: PreTrainedModel, data: CardData, own: str | None, files: dict[str, Path]) -> list[str]:
    warnings, conversion = [], data.converted_from
    if conversion is not None:
        source = conversion.published or conversion.file or "a file"
        if conversion.url is None:
            warnings.append(f"the record of the converted checkpoint {source} has no address of its source")
    else:
        source = "the weights"
    if data.license is None:
        warnings.append(
            f"the licence of {source} is not recorded. Look it up where the weights come from, and name it with --license"
        )
    if data.training is None and conversion is None:
        warnings.append("there is no record of training: the weights may be random, and the card says so")
    elif data.training is not None and not data.is_measured:
        warnings.append("no AP of exactly these weights is recorded, so the card reports none")
    if own is not None and not is_ours(own):
        warnings.append(
            f"{CARD_NAME} was edited, so it is uploaded as it is. Check that it still describes these weights"
        )
    if not model.config.saves_code:
        warnings.append("the code of the model is not uploaded (saves_code=False): users need dino_hf")
    if _IMAGES_OF_DATA in files:
        warnings.append(f"{_IMAGES_OF_DATA} shows images of the data set")
    return warnings


def _check_name(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r:.100} is not a name on the Hub: {first_line(error)}") from error
    if "/" not in repo_id:
        raise ValueError(f"{repo_id!r} has no owner. Write owner/name, with your user name or an organisation.")


def _send(publication: Publication, is_private: bool) -> str:
    api, repo_id = HfApi(), publication.repo_id
    try:
        reach_hub(repo_id, file="")  # fails within seconds; the library would try for minutes
        api.whoami()
        api.create_repo(repo_id, private=is_private or None, exist_ok=True)
        _keep_remote_card(publication)
        operations = [CommitOperationAdd(name, str(path)) for name, path in publication.files.items()]
        commit = api.create_commit(repo_id, operations, commit_message="Upload a DINO detector with dino_hf")
    except LocalTokenNotFoundError as error:
        raise PermissionError("There is no login. Run `hf auth login` once, with a token that may write.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise PermissionError(
                f"The Hub refuses to write to {repo_id} (HTTP {status}). Check the owner's name and that your token may write."
            ) from error
        raise ConnectionError(f"The Hub did not take {repo_id} (HTTP {status}): {first_line(error)}") from error
    except Exception as error:
        # The library passes on errors of httpx, which are no OSErrors.
        if not isinstance(error, ConnectionError) and not type(error).__module__.startswith("httpx"):
            raise
        raise ConnectionError(
            f"The Hub cannot be reached, so {repo_id} was not changed: {first_line(error)}"
        ) from error
    return str(commit.commit_url)


def _keep_remote_card(publication: Publication) -> None:
    """Keep a card that a user has edited on the Hub, unless the folder has an edited card of its own."""
    config, folder = publication.model.config, publication.files[CARD_NAME].parent
    own, num_parameters = read_card(publication.folder), publication.model.num_parameters()
    write_card_for_upload(folder, config, num_parameters, publication.repo_id, own, weights=publication.digest)


def describe(publication: Publication) -> Sequence[str]:
    """Lines about a publication: files, sizes, files that stay, warnings."""
    sizes = publication.sizes
    lines = [f"{publication.folder} -> {publication.repo_id}: {len(sizes)} files, {size_text(sum(sizes.values()))}"]
    code = [name for name in sizes if name.endswith(".py")]
    lines += [f"  {size_text(size):>10}  {name}" for name, size in sizes.items() if name not in code]
    if code:
        lines.append(
            f"  {size_text(sum(sizes[name] for name in code)):>10}  {len(code)} Python files, the code of the model"
        )
    if publication.left_out:
        lines.append(f"not uploaded: {list_some(publication.left_out, 12)}")
    return lines + [f"warning: {sentence}." for sentence in publication.warnings]
