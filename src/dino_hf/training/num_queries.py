"""Give a trained detector more or fewer queries. It keeps its weights."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from .detector import base_detector

_WRAPPED = "Change the number of queries before the model is wrapped for distributed training, compilation or PEFT."


def set_num_queries(model: PreTrainedModel, num_queries: int) -> None:
    """Change the number of queries of a detector, in place. All other weights are kept.

        model = DinoDetrForObjectDetection.from_pretrained("dino-r50-4scale")
        dino_hf.set_num_queries(model, 2000)

    DINO takes the boxes of its queries from the best tokens of the encoder, sorted by score. So any number of queries is possible.
    Only the learnt content has a row for each query, in the order of the tokens. With fewer queries, the first rows are kept. With
    more queries, the second half of the rows is repeated: these rows belong to tokens with low scores, like the new queries. The
    model detects without further training. Fine-tuning adapts the new rows.

    An image gives at most as many detections as its feature maps have cells: about 22,000 for 800 x 1333 pixels at 4 scales, 85 for
    64 x 64. `Predictor`, `pipeline` and `dino-hf predict` keep as many detections as there are queries, and at least 300. The image
    processor keeps 300 unless `top_k` is given.

    The content parameter is replaced by a new one with the old dtype, device and `requires_grad`. So create the optimizer, and wrap
    the model, after this call.

    Args:
        model: `DinoDetrForObjectDetection` or `DinoDetrModel`. Its configuration gets the new number too.
        num_queries: number of queries, at least 1.
    Raises:
        ValueError: the model is not a DINO detector or is wrapped, or the number is not a whole number from 1 to the limit of the
            configuration. Then the model is not changed.
    """
    detector = base_detector(model, _WRAPPED)
    if isinstance(num_queries, bool) or not isinstance(num_queries, int):
        raise ValueError(f"num_queries={num_queries!r:.50} must be a whole number.")
    config = copy.deepcopy(model.config)
    config.num_queries = num_queries
    config.validate_architecture()
    selection = detector.query_selection
    if selection.content is not None:  # without mixed query selection, the content is not learnt
        _resize_rows(selection.content, num_queries)
    selection.num_queries = num_queries
    for owner in (model, detector):  # they usually share one configuration
        owner.config.num_queries = num_queries


def _resize_rows(embedding: nn.Module, num_rows: int) -> None:
    """Shorten an embedding to its first rows, or lengthen it by repeating the second half of its rows."""
    if not isinstance(embedding, nn.Embedding) or not embedding.weight.is_floating_point():
        raise ValueError(
            f"The content of the queries is a {type(embedding).__name__}. Change the number of queries before the model is "
            "quantized or gets adapters."
        )
    old = embedding.weight
    half = len(old) // 2
    rows = torch.arange(num_rows, device=old.device)
    rows = torch.where(rows < len(old), rows, half + (rows - len(old)) % (len(old) - half))
    embedding.weight = nn.Parameter(old.detach()[rows], requires_grad=old.requires_grad)
    embedding.num_embeddings = num_rows
