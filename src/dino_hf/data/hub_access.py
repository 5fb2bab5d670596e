"""Whether the Hub answers, before anything waits for it."""

from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import datasets
from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

_SECONDS = 10  # that the Hub may take to answer at all


def reach_hub(name: str, is_dataset: bool = False) -> None:
    """
    Args:
        name: id of a model, or of a data set.
    Raises:
        ConnectionError: it was never downloaded, and the Hub does not answer. Said at once: huggingface_hub would try for
            half a minute, for each file.
    """
    try:
        if is_offline_mode() or _is_cached(name, is_dataset):
            return
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except HFValidationError:
        return  # it is no id, as will be said where it is asked for
    except HTTPError:
        return  # an answer all the same
    except OSError as error:
        if isinstance(getattr(error, "reason", None), SSLError):
            return  # it is there; which certificates are trusted is huggingface_hub's to know
        raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error


def _is_cached(name: str, is_dataset: bool) -> bool:
    if is_dataset:
        return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    return isinstance(try_to_load_from_cache(name, CONFIG_NAME), str)
