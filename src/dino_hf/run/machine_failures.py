"""Messages for failures of the machine in training, with a remedy: full disks, no memory, killed workers."""

import errno
import re
import shutil
from pathlib import Path

from safetensors import SafetensorError
from transformers import TrainingArguments

from ..common.text import size_text

# Libraries raise these errors with different types. Some name the cause only in their text.
_DISK = re.compile(
    r"No space left|File too large|os error (28|27|122)|Disk quota|PytorchStreamWriter failed|"
    r"unexpected pos|enforce fail at inline_container",
    re.IGNORECASE,
)
_MEMORY = re.compile(r"DefaultCPUAllocator|not enough memory|Cannot allocate memory|std::bad_alloc", re.IGNORECASE)
_SHARED_MEMORY = re.compile(r"Bus error|shared memory|/dev/shm", re.IGNORECASE)
_WORKER = re.compile(r"DataLoader worker .*(killed|exited)", re.IGNORECASE | re.DOTALL)
# Types of errors that the machine may cause. All other types are faults of the program.
MACHINE_ERRORS = (SafetensorError, RuntimeError, OSError, MemoryError)
_DISK_NUMBERS = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


def machine_failure(error: BaseException, args: TrainingArguments) -> str | None:
    """A sentence about the failure that caused an error in training, and what to do. None: the machine is not the cause."""
    texts = list(_texts(error))
    numbers = [getattr(link, "errno", None) for link in _chain(error)]
    if any(number in _DISK_NUMBERS for number in numbers) or _match_any(_DISK, texts):
        free = shutil.disk_usage(next(path for path in _with_parents(Path(args.output_dir)) if path.exists())).free
        return (
            f"A file in {args.output_dir} could not be written ({texts[0][:160]}). {size_text(free)} are free there. Make "
            "room, or raise the limit of file sizes, and run again with --resume: whole checkpoints are kept."
        )
    if _match_any(_WORKER, texts):
        cause = "shared memory is full" if _match_any(_SHARED_MEMORY, texts) else "often because memory ran out"
        return (
            f"A process that reads images ended ({texts[0].splitlines()[0][:160]}), {cause}. Run again with --resume and a smaller "
            f"--dataloader-num-workers (now {args.dataloader_num_workers}; 0 reads images in the training process)."
        )
    if isinstance(error, MemoryError) or errno.ENOMEM in numbers or _match_any(_MEMORY, texts):
        return memory_sentence(args)
    return None


def memory_sentence(args: TrainingArguments) -> str:
    """A sentence about batches that do not fit into memory, and what to do."""
    size = args.train_batch_size
    cure = f"--batch-size {size // 2}, or" if size > 1 else "smaller images (--short-sides, --longest-side),"
    return (
        f"Batches of {size} do not fit into the memory of {args.device}. Run again with --resume and {cure} "
        "--activation-checkpointing or --bf16."
    )


def _with_parents(path: Path) -> list[Path]:
    path = path.absolute()
    return [path, *path.parents]


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error, and the errors that it was raised from or during."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def _texts(error: BaseException) -> list[str]:
    return [str(link) or type(link).__name__ for link in _chain(error)]


def _match_any(pattern: re.Pattern, texts: list[str]) -> bool:
    return any(pattern.search(text) for text in texts)
