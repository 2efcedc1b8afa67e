"""What keeps a run alive: checkpoints, its log, resuming, ranks, signals, devices, error lines.

A checkpoint is written whole or not at all, so a run can be killed at any instant and go on.
"""

import contextlib
import errno
import glob
import itertools
import json
import os
import signal
import sys
from collections.abc import Iterator
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

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
    return file_in_folder(path) or os.path.join(path, "ckpt.pth")


def is_resumable(checkpoint) -> bool:
    """Whether what a file holds has all that train.py writes, each of its kind."""
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= RESUMABLE:
        return False
    if not all(isinstance(checkpoint[name], list) for name in ("metrics", "epoch_loss")):
        return False
    if not all(isinstance(checkpoint[name], int) for name in ("step", "epoch", "threads")):
        return False
    for line in checkpoint["metrics"]:
        if not isinstance(line, dict) or not isinstance(line.get("validation"), dict):
            return False
    has_losses = all(isinstance(loss, (int, float)) for loss in checkpoint["epoch_loss"])
    return has_losses and checkpoint["threads"] > 0 and isinstance(checkpoint["config"], dict)


def read_run(path: str, flags: dict) -> tuple[dict, Config]:
    """The checkpoint of a run that is to go on, and its settings with the new `flags`.

    Raises OSError or ValueError for a file that is no such checkpoint, for a flag that would change
    what the run computes, and for a run that has ended.
    """
    checkpoint = read_checkpoint(path)
    if not is_resumable(checkpoint):
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

    # The log has a line for epoch 0 too. After the last step of an epoch its line may be missing.
    lines = len(checkpoint["metrics"])
    steps_per_epoch = max(1, config.images_per_epoch // max(1, config.batch_size))
    if not lines - 1 <= checkpoint["step"] / steps_per_epoch <= lines:
        raise ValueError(f"--resume {path}: its log is not of its step; use another copy of it")
    # So a run of n epochs ends with n + 1 lines.
    if config.epochs < lines:
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


def check_output(folder: str):
    """Raise ValueError if a folder holds files of a run, which a new run would be mixed with."""
    if os.path.exists(os.path.join(folder, "ckpt.pth")):
        raise ValueError(f"--output {folder}: it holds a run; use a new folder")
    leftovers = sorted(glob.glob("epoch-*.pth", root_dir=folder))
    for name in ("log.jsonl", "metrics.json"):
        if os.path.exists(os.path.join(folder, name)):
            leftovers.append(name)
    if leftovers:
        raise ValueError(
            f"--output {folder}: it holds {leftovers[0]} of an earlier run; use a new folder"
        )


class FolderLock:
    """Held by the run that writes into a folder, so that no second one does.

    The system locks a file in the folder, and gives the lock up when the process ends, however it
    ends. Where files cannot be made or locked there is no lock, and nothing is said. Leaving the
    context of `with` gives it up.
    """

    NAME = ".lock"

    def __init__(self):
        self.file = None  # the number by which the system knows the open file
        self.path = ""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.file is None:
            return
        # It is removed while it is still locked; Windows removes no file that is open.
        with contextlib.suppress(OSError):
            os.remove(self.path)
        os.close(self.file)
        self.file = None

    def take(self, folder: str):
        """Lock a folder, unless that was done before; ValueError if another run has locked it."""
        if self.file is not None:
            return
        self.path = os.path.join(folder, self.NAME)
        while self.file is None:
            try:
                file = os.open(self.path, os.O_RDWR | os.O_CREAT)
            except OSError:  # no such folder, or one in which nothing can be written
                return
            try:
                lock_file(file)
            except OSError as error:
                os.close(file)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise ValueError(
                        f"{folder}: another train.py is writing there; wait for it or stop it, or "
                        f"use another folder"
                    ) from error
                with contextlib.suppress(OSError):  # this file system has no locks
                    os.remove(self.path)
                return
            if is_file_at(file, self.path):
                self.file = file
            else:  # the run that held it has just ended, and has removed it
                os.close(file)


def lock_file(file: int):
    """Lock an open file for this process, or raise OSError at once."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        msvcrt.locking(file, msvcrt.LK_NBLCK, 1)


def is_file_at(file: int, path: str) -> bool:
    """Whether the file that lies at the path now is the one that was opened."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


# ------------------------------------------------------------------------------------------- ranks


# What starts several processes, and says so in these variables: Slurm's srun, Open MPI's mpirun,
# and that of MPICH and Intel.
LAUNCHER_VARIABLES = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


class RanksError(Exception):
    """Why the ranks cannot go on together. All of them end with it; the first one prints it."""


def init_distributed():
    """Under torchrun: join the other ranks, each with a GPU of its own where there are any.

    Raises ValueError if the environment looks like torchrun's but is not complete, if another
    launcher has started several processes, or if the ranks do not meet.
    """
    if "WORLD_SIZE" not in os.environ:
        for name in LAUNCHER_VARIABLES:
            if os.environ.get(name, "1") != "1":
                raise ValueError(
                    f"{name} is {os.environ[name]}, but without torchrun's WORLD_SIZE and RANK each "
                    f"process is a run of its own; use torchrun, or {name}=1 to train alone"
                )
        return
    ranks = number_in_environment("WORLD_SIZE")
    if ranks <= 1:
        return
    has_cuda = torch.cuda.is_available()
    needed = {"RANK", "MASTER_ADDR", "MASTER_PORT"}
    if has_cuda:
        needed.add("LOCAL_RANK")
    if not os.environ.keys() >= needed:
        raise ValueError("WORLD_SIZE is set; use torchrun, or unset it to train alone")
    if not 0 <= number_in_environment("RANK") < ranks:
        raise ValueError(f"RANK is {os.environ['RANK']}: use torchrun, which counts from 0")
    if has_cuda:
        local_rank = number_in_environment("LOCAL_RANK")
        gpus = torch.cuda.device_count()
        if local_rank >= gpus > 1:
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, but there are {gpus} GPUs; start fewer ranks"
            )
        torch.cuda.set_device(local_rank % gpus)  # some launchers show each rank one GPU alone
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if has_cuda else "gloo")
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        reason = one_line(error)[:100]
        raise ValueError(f"the {ranks} ranks did not meet at {place} ({reason})") from error


def number_in_environment(name: str) -> int:
    """The whole number in a variable of torchrun's; ValueError if it is something else."""
    try:
        return int(os.environ[name])
    except ValueError as error:
        value = os.environ[name][:50]
        raise ValueError(f"{name} is {value!r}, not a number; use torchrun, or unset it") from error


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


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Work that fails on all ranks if it fails on one. All ranks must enter this together.

    The rank with the error raises it, the others raise RanksError.
    """
    own_error = None
    try:
        yield
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        own_error = error
    if world_size() > 1:
        failed = [None] * world_size()
        try:
            dist.all_gather_object(failed, own_error is not None)
        except RuntimeError as error:
            # The others may have ended before this rank has read all that they sent.
            raise own_error or error from None
        if any(failed) and own_error is None:
            raise RanksError(f"rank {failed.index(True)} cannot go on; its own line says why")
    if own_error is not None:
        raise own_error


def compare_ranks(values: dict):
    """Raise RanksError if a rank has other `values`, {what they are: value}, than the first one.

    All ranks must call this together.
    """
    values_of_ranks = [None] * world_size()
    dist.all_gather_object(values_of_ranks, values)
    first_values = values_of_ranks[0]
    for number, rank_values in enumerate(values_of_ranks):
        different = [name for name in first_values if rank_values.get(name) != first_values[name]]
        if different:
            name = different[0]
            expected = str(first_values[name])[:50]
            found = str(rank_values.get(name))[:50]
            line = f"rank {number} has {name} {found}, rank 0 has {expected}"
            if len(different) > 1:
                line += f" ({len(different) - 1} more differ)"
            raise RanksError(f"{line}; give all ranks the same data and flags")


def print_rank0(line: str):
    """Print to standard error, once for all ranks and above the progress bar."""
    if rank() == 0:
        tqdm.write(line, file=sys.stderr)


def print_error(line: str):
    """Print the error of this rank to standard error, with the rank's number if there are more."""
    prefix = f"rank {rank()}: " if world_size() > 1 else ""
    tqdm.write(f"train.py: error: {prefix}{line}", file=sys.stderr)


# --------------------------------------------------------------------------------- stopping a run


class StopRequest:
    """Whether SIGINT (Ctrl-C) or SIGTERM (kill) has asked the run to stop.

    The training loop looks at `requested` after each step. A second SIGINT acts at once, as it does
    in any program.
    """

    def __init__(self):
        self.requested = False
        self.signal_number = signal.SIGTERM  # also if only another rank got a signal
        self._raises_at_once = False

    def receive(self, number: int, frame=None):
        """The signal handler."""
        self.requested = True
        self.signal_number = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if self._raises_at_once:
            self._raises_at_once = False  # for one signal only
            raise InterruptedError

    @contextlib.contextmanager
    def raising_at_once(self):
        """Within this context a signal raises InterruptedError: its work can be left at once."""
        self._raises_at_once = True
        try:
            yield
        finally:
            self._raises_at_once = False

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


def use_threads(count: int):
    """Compute with the number of threads that a run had, on which the last bits of sums depend.

    OMP_NUM_THREADS, which the user or torchrun has set, comes first; a line says so if it differs.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count)
    elif torch.get_num_threads() != count:
        print_rank0(
            f"warning: OMP_NUM_THREADS is {os.environ['OMP_NUM_THREADS'][:20]}, and the run had "
            f"{count} threads: the last bits of its numbers may differ"
        )


def find_device(name: str) -> torch.device:
    """The device of `--device`; ValueError if this machine has no such thing."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0][:100]
        raise ValueError(f"--device {name} cannot be used ({reason}); use --device cpu") from error
    return torch.device(name)


def prepare_output():
    """Make sure that printing cannot fail, before a program prints anything.

    Characters that the output's encoding lacks are replaced: Windows' code pages often lack τ. A
    notebook's output takes every character and cannot be reconfigured. Where there is no output,
    what is printed is lost.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None or getattr(stream, "closed", False):
            # Else the next file to be opened might be the one into which libraries print.
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
        elif name == "stdout" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def error_line(error: BaseException) -> str:
    """The line to print for an error that the user can mend; a bug is raised, with its traceback.

    Among RuntimeErrors two kinds can be mended: too little memory, and operations that Apple's
    GPUs lack.
    """
    text = one_line(error)
    if not isinstance(error, (RuntimeError, MemoryError)):
        return text
    if dist.is_initialized() and is_lost_rank(error):
        return "another rank has ended; what it printed says why"
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


def is_lost_rank(error: BaseException) -> bool:
    """Whether a collective failed because another rank no longer takes part."""
    if isinstance(error, dist.DistError):  # what NCCL and the store raise
        return True
    return "gloo" in str(error) or "Connection closed by peer" in str(error)
