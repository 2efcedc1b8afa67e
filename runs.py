"""What keeps a run alive: checkpoints, its log, resuming, ranks, signals, devices, error lines.

A checkpoint is written whole or not at all, so a run can be killed at any instant and go on.
"""

import contextlib
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import BinaryIO

import torch
import torch.distributed as dist
from tqdm import tqdm

from settings import MAY_CHANGE, Config, config_from_checkpoint, flag
from weights import file_in_folder, one_line, read_checkpoint

# Keys that every checkpoint from which a run can go on has.
RESUMABLE = {"config", "step", "epoch", "metrics", "epoch_loss", "threads", "optimizer"}


# ------------------------------------------------------------------------------- files and folders


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A file that becomes `path` whole or not at all, even if the power fails. Raises OSError."""
    part = os.path.join(os.path.dirname(path), f".part-{os.path.basename(path)}")
    try:
        with open(part, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch's writer makes a RuntimeError of a full disk
        raise OSError(f"{path} could not be written ({one_line(error)[:150]})") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def save_checkpoint(path: str, content: dict):
    with atomic_write(path) as file:
        torch.save(content, file)


def write_log(folder: str, history: list[dict]):
    """Write log.jsonl, a line of JSON for each epoch; only the first rank does."""
    if rank() == 0:
        with atomic_write(os.path.join(folder, "log.jsonl")) as file:
            file.writelines(json.dumps(line).encode() + b"\n" for line in history)


def checkpoint_path(path: str) -> str:
    """The checkpoint in a run's folder, or the weights in one of Hugging Face's.

    The path of anything but a folder is returned as it is.
    """
    if not os.path.isdir(path):
        return path
    checkpoint = os.path.join(path, "ckpt.pth")
    if os.path.isfile(checkpoint):
        return checkpoint
    return file_in_folder(path) or checkpoint


def read_run(path: str, flags: dict) -> tuple[dict, Config]:
    """The checkpoint of a run that is to go on, and its settings with the new `flags`.

    Raises OSError or ValueError for a file that is no such checkpoint, for a flag that would change
    what the run computes, and for a run that has ended.
    """
    checkpoint = read_checkpoint(path)
    is_ours = isinstance(checkpoint, dict) and checkpoint.keys() >= RESUMABLE
    if not is_ours or not isinstance(checkpoint["config"], dict):
        raise ValueError(f"--resume {path}: use a ckpt.pth of train.py")
    if checkpoint["config"].get("texture_pool"):
        raise ValueError(f"--resume {path}: its --texture-pool no longer exists; start a new run")
    try:
        config = config_from_checkpoint(checkpoint["config"])
    except ValueError as error:
        raise ValueError(f"--resume {path}: {error}") from error

    for name, value in flags.items():
        current = getattr(config, name)
        if name not in MAY_CHANGE and current != value:
            raise ValueError(f"{flag(name)} {value}: the run has {current}; leave it as it is")
        setattr(config, name, value)

    # The log has a line for epoch 0 too, so a run of n epochs ends with n + 1 lines.
    if config.epochs < len(checkpoint["metrics"]):
        raise ValueError(
            f"--resume {path}: the run has ended after {checkpoint['epoch']} epochs; use more "
            f"--epochs, or python visualize.py {path}"
        )
    return checkpoint, config


def make_folder(config: Config, output: str | None) -> str:
    """Make the run's folder: `output`, or the first of runs/NAME, runs/NAME-2, … that is new."""
    if output:
        os.makedirs(output, exist_ok=True)
        return output
    name = f"runs/{config.dataset}-{config.loss}-{config.views}"
    if config.background != "black":
        name += "-texture"
    for number in itertools.count(1):
        folder = name if number == 1 else f"{name}-{number}"
        with contextlib.suppress(FileExistsError):
            os.makedirs(folder)
            return folder


# ------------------------------------------------------------------------------------------- ranks


def init_distributed():
    """Under torchrun: join the other ranks, each with a GPU of its own where there are any.

    Raises ValueError if the environment looks like torchrun's but is not complete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return
    has_cuda = torch.cuda.is_available()
    needed = {"RANK", "MASTER_ADDR"}
    if has_cuda:
        needed.add("LOCAL_RANK")
    if not os.environ.keys() >= needed:
        raise ValueError("WORLD_SIZE is set; use torchrun, or unset it to train alone")
    if has_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")


def rank() -> int:
    """The number of this process among those that train together; 0 for a single one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(tensor):
    """The sum of the ranks' tensors, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(*statements: bool) -> list[bool]:
    """For each statement, whether it is true on any rank. All ranks must call this together."""
    counts = all_reduce(torch.tensor(statements, dtype=torch.int32))
    return [count > 0 for count in counts.tolist()]


def print_rank0(line: str):
    """Print to standard error, once for all ranks and above the progress bar."""
    if rank() == 0:
        tqdm.write(line, file=sys.stderr)


# --------------------------------------------------------------------------------- stopping a run


class StopRequest:
    """Whether SIGINT (Ctrl-C) or SIGTERM (kill) has asked the run to stop.

    The training loop looks at `requested` after each step. A second SIGINT acts at once, as it does
    in any program.
    """

    def __init__(self):
        self.requested = False
        self.signal_number = signal.SIGTERM  # also if only another rank got a signal
        # True while the work can be left at once: then a signal raises InterruptedError.
        self.raises_at_once = False

    def receive(self, number: int, frame=None):
        """The signal handler."""
        self.requested = True
        self.signal_number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.raises_at_once:
            self.raises_at_once = False
            raise InterruptedError

    @contextlib.contextmanager
    def listening(self):
        """Within this context signals come here."""
        before = {
            number: signal.signal(number, self.receive)
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# -------------------------------------------------------------------------------- devices, errors


def find_device(name: str) -> torch.device:
    """The device of `--device`; ValueError if this machine has no such thing."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); use --device cpu") from error
    return torch.device(name)


def error_line(error: BaseException) -> str:
    """The line to print for an error that the user can mend; a bug is raised, with its traceback.

    Among RuntimeErrors two kinds can be mended: too little memory, and operations that Apple's
    GPUs lack.
    """
    text = one_line(error)
    if not isinstance(error, (RuntimeError, MemoryError)):
        return text
    if "MPS" in text and "out of memory" not in text:
        return f"{text[:200]}; use PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu"
    # what a GPU says, and what CPUs say
    memory_errors = ("out of memory", "allocate memory", "not enough memory")
    if isinstance(error, RuntimeError) and not any(words in text for words in memory_errors):
        raise error
    return (
        "out of memory; use a smaller --image-size or, in training, --micro-batch or "
        "--checkpoint-blocks"
    )
