"""Check quickly whether the Hub answers."""

from pathlib import Path
from ssl import SSLError
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from huggingface_hub import constants, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers.utils import CONFIG_NAME

_SECONDS = 10  # time limit for the first answer of the Hub


def reach_hub(name: str, is_dataset: bool = False, file: str = CONFIG_NAME) -> None:
    """Check that the Hub answers, unless `name` is in the cache. Without it, huggingface_hub tries half a minute per file.

    Args:
        name: id of a model or data set.
        file: file of a model that is in the cache if the model is.
    Raises:
        ConnectionError: the Hub does not answer, and `name` is not in the cache.
    """
    try:
        if is_offline_mode() or _is_cached(name, is_dataset, file):
            return
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_SECONDS).close()
    except HFValidationError:
        return  # not an id; the download reports it
    except HTTPError as error:
        error.close()  # the Hub answered
    except OSError as error:
        if isinstance(getattr(error, "reason", None), SSLError):
            return  # the Hub answered; huggingface_hub decides which certificates it trusts
        raise ConnectionError(f"{constants.ENDPOINT} does not answer") from error


def _is_cached(name: str, is_dataset: bool, file: str) -> bool:
    if is_dataset:
        import datasets  # slow to import, and models do not need it

        return (Path(datasets.config.HF_DATASETS_CACHE) / name.replace("/", "___")).exists()
    return isinstance(try_to_load_from_cache(name, file), str)
