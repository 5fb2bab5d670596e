"""The model card: README.md beside the weights, written from the configuration and its record of the weights."""

import hashlib
import json
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from huggingface_hub import ModelCard

from ..model.sharing import is_checkpoint, read_remote_card, saving_hooks
from .card_data import CardData
from .card_sections import card_body, card_metadata, unique
from .weights_digest import weights_digest

logger = logging.getLogger(__name__)

FILE_NAME = "README.md"
_MARKER = re.compile(r"\n*<!-- Written by dino_hf ([0-9a-f]{16})\.[^\n]*-->\s*$")


def model_card(
    config,
    num_parameters: int,
    name: str,
    tags: Sequence[str] = (),
    weights: str | None = None,
    folder: str | Path | None = None,
) -> str:
    """The text of a model card. Unreadable entries of `config.provenance` are left out, and the card names them.

    Args:
        config: `DinoDetrConfig`.
        name: folder or repository that the code in the card loads.
        tags: added to the usual ones.
        weights: digest of the weights that the card describes. Without it, the record is taken to be about these weights.
        folder: where the card will be. Recorded pictures in this folder are shown.
    """
    data = CardData.from_provenance(config.provenance, weights)
    folder = None if folder is None else Path(folder)
    has_code = config.saves_code and not (folder is not None and is_checkpoint(folder))
    body = card_body(data, config, num_parameters, name, folder, has_code)
    text = f"---\n{card_metadata(data, name, tags).to_yaml()}\n---\n\n{body}"
    marker = f"Written by dino_hf {_digest(text)}. Saving the model replaces this file, unless it was edited."
    return f"{text}\n\n<!-- {marker} -->\n"


def digest_to_compare(model, state_dict: dict | None = None) -> str | None:
    """`weights_digest` of a model if its record has a digest to compare it with, otherwise None without computing it."""
    return (
        weights_digest(model, state_dict) if CardData.from_provenance(model.config.provenance).recorded_digest else None
    )


def card_hook(model, folder: Path, state_dict: dict | None) -> Callable[..., None]:
    """Prepare the card of a model that is about to be saved; see `dino_hf.model.sharing.saving_hooks`."""
    before, weights = read_card(folder), digest_to_compare(model, state_dict)

    def write(folder: Path, repo_id: str | None = None, token: str | bool | None = None) -> None:
        config, num_parameters, tags = model.config, model.num_parameters(), model.model_tags or ()
        if repo_id is None:
            write_model_card(folder, config, num_parameters, tags, weights=weights)
            return
        # The library has just written its own card with the tags to this folder.
        tags = ModelCard.load(folder / FILE_NAME, ignore_metadata_errors=True).data.tags or ()
        write_card_for_upload(folder, config, num_parameters, repo_id, before, tags, token, weights)

    return write


def write_model_card(
    folder: str | Path,
    config,
    num_parameters: int,
    tags: Sequence[str] = (),
    name: str | None = None,
    weights: str | None = None,
) -> bool:
    """Write README.md into a folder. A README.md that a user wrote or edited is kept.

    Args:
        config: `DinoDetrConfig`.
        name: folder or repository that the code in the card loads; by default the name of the folder.
        weights: digest of the weights in the folder, see `digest_to_compare`.
    Returns:
        whether the card was written.
    """
    folder = Path(folder)
    present = read_card(folder)
    if present is not None and not is_ours(present):
        return False
    text = model_card(config, num_parameters, name or folder.resolve().name, tags, weights, folder)
    (folder / FILE_NAME).write_text(text, encoding="utf-8", newline="\n")
    return True


def write_card_for_upload(
    folder: str | Path,
    config,
    num_parameters: int,
    repo_id: str,
    own: str | None = None,
    tags: Sequence[str] = (),
    token: str | bool | None = None,
    weights: str | None = None,
) -> None:
    """Write the README.md that is uploaded.

    A user's card is kept and only gets the tags: `own`, or else the card of the repository. Without a user's card, ours is written.

    Args:
        own: README.md of the folder before it was saved.
        weights: as in `write_model_card`.
    Raises:
        huggingface_hub.errors.HfHubHTTPError: the repository cannot be read.
    """
    remote = read_remote_card(repo_id, token)
    known = [] if remote is None else remote.data.tags or []
    new = [tag for tag in tags if tag not in known]
    texts = (own, None if remote is None else str(remote))
    users = next((text for text in texts if text is not None and not is_ours(text)), None)
    if users is None:
        text = model_card(config, num_parameters, repo_id, [*known, *new], weights, folder)
    else:
        text = _with_tags(users, new)
    (Path(folder) / FILE_NAME).write_text(text, encoding="utf-8", newline="")


def read_card(folder: str | Path) -> str | None:
    """The text of README.md with its own line ends, or None if the file does not exist."""
    file = Path(folder) / FILE_NAME
    return file.read_bytes().decode("utf-8-sig", errors="replace") if file.is_file() else None


def is_ours(text: str) -> bool:
    """Whether `model_card` wrote this text and it was not edited.

    Line ends, the layout of the metadata, and tags may differ, because the library and the Hub change them.
    """
    marker = _MARKER.search(text)
    return marker is not None and _digest(text[: marker.start()]) == marker[1]


def _with_tags(text: str, tags: Sequence[str]) -> str:
    if not tags:
        return text
    try:
        card = ModelCard(text)
    except Exception as error:  # invalid YAML, or metadata that the library refuses
        logger.warning(
            "The tags %s are not added to the model card. Its metadata cannot be read: %s", list(tags), error
        )
        return text
    card.data.tags = unique([*(card.data.tags or []), *tags])
    return str(card)


def _digest(text: str) -> str:
    """Digest of a card without its last line."""
    try:
        card = ModelCard(text.replace("\r\n", "\n"))
    except Exception:  # the metadata were edited and are invalid
        return ""
    data = {name: value for name, value in card.data.to_dict().items() if name != "tags"}
    content = json.dumps(data, sort_keys=True, default=str) + card.text.strip()
    return hashlib.sha256(content.encode()).hexdigest()[:16]


saving_hooks.append(card_hook)
