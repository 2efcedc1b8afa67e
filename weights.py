"""Published weights: DINO's by name, any ViT's from a file, read without running the file's code.

Libraries store the same ViT under many names. `load_backbone` brings them to DINO's names, works
out the shape, and says what it had to assume. What the network of vit.py does not have is refused.
"""

import argparse
import contextlib
import glob
import json
import math
import os
import re
import sys
import zipfile
from collections import deque
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from rotary import RotaryPositions
from settings import EARLIER, Config
from vit import VisionTransformer, ViTShape

# DINO's published backbones by the names of its hub; `dino` is the paper's ViT-S/8.
DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
DINO_FILES = {
    "dino": "dino_deitsmall8_pretrain",
    "dino_vits8": "dino_deitsmall8_pretrain",
    "dino_vits16": "dino_deitsmall16_pretrain",
    "dino_vitb8": "dino_vitbase8_pretrain",
    "dino_vitb16": "dino_vitbase16_pretrain",
}
# What other libraries call DINO's parameters: (pattern, DINO's name). All of them are applied to
# every name, one after another, after the prefix of the network was taken away.
DINO_NAMES = [
    # Hugging Face, in its files and as transformers 5 has them in memory
    (r"^embeddings\.", ""),
    (r"^(encoder\.|model\.)?layers?\.(?=\d)", "blocks."),
    (r"^patch_embeddings\.(projection\.)?", "patch_embed.proj."),
    (r"^position_embeddings$", "pos_embed"),
    (r"\blayernorm_before\.", "norm1."),
    (r"\blayernorm_after\.", "norm2."),
    (r"^layernorm\.", "norm."),
    (r"\battention\.attention\.([qkv])[a-z]+\.", r"attn.\1."),
    (r"\battention\.([qkv])_proj\.", r"attn.\1."),
    (r"\battention\.(output\.dense|o_proj)\.", "attn.proj."),
    (r"\b(intermediate\.dense|mlp\.up_proj)\.", "mlp.fc1."),
    (r"\b(output\.dense|mlp\.down_proj)\.", "mlp.fc2."),
    # DINOv2 and DINOv3, which train their blocks in chunks, and timm
    (r"^blocks\.\d+\.(?=\d)", "blocks."),
    (r"^(reg_token|storage_tokens)$", "register_tokens"),
    (r"\battn\.([qv])_bias$", r"attn.\1.bias"),
    # LayerScale
    (r"\b(ls1\.gamma|layer_scale1\.lambda1|gamma_1)$", "attn.proj.gamma"),
    (r"\b(ls2\.gamma|layer_scale2\.lambda1|gamma_2)$", "mlp.fc2.gamma"),
]
# The token that every network has. What stands before it is the prefix of all its names.
CLS_TOKEN = r"(?s)(|.*?\.)(embeddings\.)?cls_token"
# Parts of a network that attention does not need, a pattern.
LEFT_OUT = r"\w*(head|decoder|predictor|projector|classifier|criterion)|mask|fc_norm|pooler"
LEFT_OUT += r"|local_cls_norm"
# Parts that may be whole networks, with a [CLS] token; a pattern of one part of a prefix.
LEFT_OUT_NETWORKS = r"(\w*_)?(head|decoder|predictor|projector|classifier|criterion)s?(_\w*)?"
# Of several networks in a file, one that is a moving average is taken: a pattern of its prefix.
AVERAGE_NAMES = r"(?<!no_)(?<!non_)(?<![a-z])"
AVERAGE_NAMES += r"(teacher|momentum|target|ema|swa|polyak|shadow|avg|averaged?)(?![a-z])"
# Keys that hold no network, but perhaps copies of its tensors.
NOT_SEARCHED = r"\w*(optim|sched|scaler|loops|callbacks)\w*"
NEVER_AVERAGES = r"\w*(optim|sched|scaler|loops)\w*"  # a callback may hold one
MAX_DICTS = 30  # nested dicts that are searched for weights; a hostile file may have any number
REQUIRED = {"cls_token", "patch_embed.proj.weight"}  # and positions
# MLPs with a gate (SwiGLU): DINOv2's, DINOv3's, timm's and Hugging Face's names.
GATED_MLP = r"blocks\.\d+\.mlp\.(w12|w1|fc1_g|gate_proj|weights_in)\b"
# What save_pretrained of Hugging Face writes into a folder, beside config.json.
HUGGING_FACE_FILES = ("model.safetensors", "pytorch_model.bin")
LONGEST_REASON = 115  # characters of a refusal


@dataclass(frozen=True)
class PublishedHeads:
    """How many heads a published ViT has that are not 64 wide."""

    prefix: str  # pattern of the prefix of its parameters' names; empty: any
    dim: int
    heads: int


PUBLISHED_HEADS = [
    PublishedHeads("(base|momentum)_encoder", 384, 12),  # MoCo v3's ViT-S
    PublishedHeads("", 1152, 16),  # ViT-SO400M
    PublishedHeads("", 1280, 16),  # ViT-H
    PublishedHeads("", 1408, 16),  # ViT-g
    PublishedHeads("", 1664, 16),  # ViT-G
]


@dataclass
class LoadedWeights:
    """A ViT that was read from a file."""

    backbone: VisionTransformer
    content: dict  # all that the file holds
    description: str  # which of the file's networks it is, and what was assumed
    remarks: list[str]  # what else a reader of its maps should know
    unstated: set[str]  # which of "heads" and "grid" the file does not state
    is_ours: bool  # whether it is a checkpoint of train.py


# ------------------------------------------------------------------------------ reading the file


def download_dino(name: str) -> str:
    """The path of DINO's weights of that name in torch.hub's folder, downloaded if missing.

    Raises OSError if the download fails.
    """
    url = DINO_URL.format(DINO_FILES[name])
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if os.path.exists(path):
        return path
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
        read_checkpoint(path)  # urlopen does not notice that an answer was cut short
    except Exception as error:
        with contextlib.suppress(OSError):
            os.remove(path)
        raise OSError(
            f"--weights {name}: download from {url} failed ({error}); use --weights none or "
            f"--weights FILE with a copy of the file"
        ) from error
    return path


class Unread:
    """Stands in for a path or numpy array in a checkpoint.

    Nothing reads them, and an array can be forged to do harm.
    """

    def __init__(self, *arguments):
        pass

    def __setstate__(self, *state):
        pass


def allowed_globals() -> list:
    """What a checkpoint may hold besides tensors and plain Python values.

    This is all that the public checkpoints need. An entry is a class, or what is to be called in
    place of a name in the file.
    """
    allowed = [argparse.Namespace, np.dtype]
    allowed += {type(np.dtype(code)) for code in "?bhilqBHILQefdFDSU"}
    make_scalar = np.float64(0).__reduce__()[0]
    for core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
        allowed.append((make_scalar, f"{core}.multiarray.scalar"))
        allowed.append((Unread, f"{core}.multiarray._reconstruct"))
    allowed.append((Unread, "numpy.ndarray"))
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        allowed.append((Unread, f"pathlib.{name}"))
        allowed.append((Unread, f"pathlib._local.{name}"))  # Python 3.13
    return allowed


def read_checkpoint(path: str):
    """What a .pth or .safetensors file holds, read without running its code.

    Raises OSError if there is no such file, ValueError if it is damaged or could run code.
    """
    folder = path if os.path.isdir(path) else os.path.dirname(path)
    if not os.path.isfile(path) and glob.glob("*.index.json", root_dir=folder or "."):
        raise FileNotFoundError(
            f"{folder}: its weights are in several files; save them with a larger max_shard_size"
        )
    if os.path.isdir(path):
        names = ", ".join(("ckpt.pth", *HUGGING_FACE_FILES))
        raise FileNotFoundError(f"{path}: a folder without {names}; use the path of a file")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; use a .pth file with a ViT's weights")
    try:
        if str(path).endswith(".safetensors"):
            import safetensors.torch  # nothing else needs it

            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # what torch.save has written since 2020
            check_zip(path)
        with torch.serialization.safe_globals(allowed_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path} needs a library: pip install safetensors") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        if refused := re.search(r"GLOBAL (\S{1,60})", str(error)):
            raise ValueError(
                f"{path} holds {refused[1]}, which could run code; save the network's state_dict() alone"
            ) from error
        reason = one_line(str(error).strip().partition("\n")[0])[:60] or type(error).__name__
        raise ValueError(
            f"{path} is no PyTorch checkpoint of tensors and plain values, or is damaged ({reason}); "
            f"use another copy of it"
        ) from error


def check_zip(path: str):
    """Raise ValueError for a damaged record, or for one that is compressed or called a folder.

    torch.load does not check the records' CRC: of 400 files with a flipped bit it took 398.
    torch.save never compresses, so a compressed record is a zip bomb. Of a record that the archive
    calls a folder (MS-DOS's attribute 16) torch.load reads nothing: it returns uninitialised memory.
    """
    with zipfile.ZipFile(path) as archive:
        is_compressed = any(record.compress_type for record in archive.infolist())
        is_folder = any(record.external_attr & 16 for record in archive.infolist())
        if is_compressed or is_folder or archive.testzip():
            raise ValueError("a record's CRC is wrong, or it is compressed or a folder")


# ------------------------------------------------------------------------ folders, and our own files


def file_in_folder(folder: str) -> str | None:
    """The checkpoint in a run's folder, or the weights in one of Hugging Face's, or None."""
    for name in ("ckpt.pth", *HUGGING_FACE_FILES):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            return path
    return None


def read_hugging_face_config(path: str, dim: int, depth: int) -> dict:
    """The settings of a ViT of this shape in the config.json beside its weights, or an empty dict.

    In a larger model they are one level deeper. Raises ValueError if vit.py has no such ViT.
    """
    config_path = os.path.join(os.path.dirname(path), "config.json")
    if os.path.basename(path) not in HUGGING_FACE_FILES or not os.path.isfile(config_path):
        return {}
    try:
        with open(config_path, encoding="utf-8") as file:
            content = json.load(file)
    except (OSError, ValueError) as error:  # text that is not UTF-8 is a ValueError too
        raise ValueError(f"{config_path} cannot be read ({one_line(error)[:60]})") from error
    content = content if isinstance(content, dict) else {}
    nested = [
        part
        for name, part in content.items()
        if isinstance(part, dict) and not re.match("text|decoder", name)
    ]
    for config in (content, *nested):
        is_vit = "num_attention_heads" in config
        has_shape = config.get("hidden_size", dim) == dim
        has_shape = has_shape and config.get("num_hidden_layers", depth) == depth
        if is_vit and has_shape:
            activation = config.get("hidden_act", "gelu")
            if activation != "gelu":
                raise ValueError(f"config.json: hidden_act {activation}; only gelu can be read")
            return config
    return {}


def number_in(config: dict, name: str, default):
    """A positive number in config.json, or `default`. Raises ValueError for anything else."""
    if name not in config:
        return default
    value = config[name]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"config.json: {name} is not a positive number")
    return value


def known_grid(size, patch_size: int, tokens: int, registers: int) -> tuple[int, int] | None:
    """The grid (rows, columns) of positions for images of a size: a side, or (height, width).

    None if the size is not known or does not fit so many tokens, see `separate_positions`.
    """
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if type(height) is not int or type(width) is not int:
        return None
    rows = height // patch_size
    columns = width // patch_size
    fits = rows * columns in patch_counts(tokens, registers)
    return (rows, columns) if fits else None


def count_registers(weights: dict) -> int:
    if "register_tokens" not in weights:
        return 0
    return weights["register_tokens"].shape[1]


def patch_counts(tokens: int, registers: int) -> list[int]:
    """The possible numbers of patches in a network that has positions for so many tokens.

    Usually [CLS] has a position too. In timm's DINOv2 and in DeiT III only patches have one; in
    timm's own networks with registers, [CLS] and the registers have one too.
    """
    counts = [tokens - 1, tokens]
    if registers:
        counts.append(tokens - 1 - registers)
    return [count for count in counts if count > 0]


def is_own_checkpoint(content) -> bool:
    """Whether a file has all that train.py writes, whatever else it has.

    Other programs use some of our keys for other things. A config that has most of our settings is
    ours; if it lacks some it is damaged, and `settings.config_from_checkpoint` names them.
    """
    if not isinstance(content, dict):
        return False
    config = content.get("config")
    is_complete = (
        isinstance(config, dict)
        and isinstance(content.get("teacher"), dict)
        and isinstance(content.get("epoch"), int)
        and isinstance(content.get("metrics"), list)
    )
    if not is_complete or not all(isinstance(line, dict) for line in content["metrics"]):
        return False
    needed = {entry.name for entry in fields(Config)} - EARLIER.keys()
    return 2 * len(needed & config.keys()) > len(needed)


# --------------------------------------------------------------------------------- any ViT's names


def load_backbone(
    source: str, heads: int | None = None, grid: tuple[int, int] | None = None
) -> LoadedWeights:
    """The ViT that `source` holds: a name of DINO_FILES, a file, or a folder of Hugging Face's.

    If the file holds a student and a teacher, the teacher is taken. Shapes tell neither the number
    of heads nor the grid (rows, columns) of the positions. They are what the file states, or else
    `heads` and `grid`, or else assumed; the description says which.

    Raises ValueError or OSError for anything but the finite weights of one ViT.
    """
    path = source
    if source in DINO_FILES:
        path = download_dino(source)
    elif os.path.isdir(source):
        path = file_in_folder(source) or source
    content = read_checkpoint(path)
    try:
        return backbone_of(content, path, heads, grid, is_dino=source in DINO_FILES)
    except (MemoryError, OSError):
        raise
    except Exception as error:
        # Our own errors are ValueErrors. What torch raises for a hostile file, whose tensors have
        # other shapes than a ViT's, says nothing to a reader.
        reason = "the shapes of its tensors are not those of a ViT"
        if isinstance(error, ValueError):
            reason = one_line(error)
        if len(reason) > LONGEST_REASON:
            reason = reason[: LONGEST_REASON - 1] + "…"
        raise ValueError(
            f"{path}: unsupported checkpoint; docs/weights.md lists what can be read ({reason})"
        ) from error


def backbone_of(
    content, path: str, heads: int | None, grid: tuple[int, int] | None, is_dino: bool
) -> LoadedWeights:
    """The ViT in what `read_checkpoint` gave; the arguments are those of `load_backbone`.

    `is_dino` says that it is a file of DINO's, so that nothing needs to be assumed. Raises
    ValueError for what is no ViT, or is one that vit.py does not have.
    """
    tensors = find_tensors(content if isinstance(content, dict) else {})
    networks = find_networks(tensors)
    prefix = choose_network(networks, tensors)
    weights = networks[prefix]
    is_rotary = has_dinov3_positions(weights)
    check_tensors(weights, path)
    is_ours = is_own_checkpoint(content)
    run_settings = content["config"] if is_ours else {}
    dim = weights["cls_token"].shape[-1]
    hugging_face = read_hugging_face_config(path, dim, len(block_prefixes(weights)))
    if is_ours or is_dino:  # they state everything; the flags are for other files
        heads = grid = None

    # Bring the weights to the layers of vit.py.
    has_gamma_1 = any(re.fullmatch(rf"{re.escape(prefix)}.*\.gamma_1", name) for name in tensors)
    is_deit3 = has_gamma_1 and not is_rotary
    fuse_queries_keys_values(weights)
    has_layer_scale = fold_layer_scale(weights)
    stated_grid = None
    if not is_rotary:
        tokens = weights["pos_embed"].shape[1]
        patch_size = weights["patch_embed.proj.weight"].shape[-1]
        stated_size = run_settings.get("pos_size") or hugging_face.get("image_size")
        registers = count_registers(weights)
        stated_grid = known_grid(stated_size, patch_size, tokens, registers)
        grid = stated_grid or grid
        separate_positions(weights, grid, registers)

    # Work out what shapes do not tell.
    stated_heads = run_settings.get("heads") or heads_of_periods(weights)
    stated_heads = stated_heads or number_in(hugging_face, "num_attention_heads", None)
    heads = stated_heads or heads
    # DINOv2 with registers has LayerScale too, and interpolates with antialiasing.
    is_dinov2_with_registers = "register_tokens" in weights and has_layer_scale and not is_rotary
    usual_eps = 1e-5 if is_rotary else 1e-6
    if any(name.startswith(prefix) and "layernorm_before" in name for name in tensors):
        usual_eps = 1e-12  # Hugging Face's ViT
    shape = infer_shape(
        weights,
        heads or published_heads(weights, prefix),
        grid,
        antialias=run_settings.get("antialias", is_dinov2_with_registers),
        norm_eps=run_settings.get("norm_eps", number_in(hugging_face, "layer_norm_eps", usual_eps)),
    )
    pad_mlps(weights, shape)
    if is_rotary and "rope_embed.periods" not in weights:
        base = number_in(hugging_face, "rope_theta", 100.0)
        positions = RotaryPositions(shape.dim // shape.heads, base)
        weights["rope_embed.periods"] = positions.periods
    has_norm = "norm.weight" in weights
    backbone = build_backbone(weights, shape)
    if is_deit3:
        check_deit3(content, path)

    # Say what was read, and what was assumed.
    description = describe_network(prefix, networks, content)
    description += f", {shape.heads} heads"
    if not (heads or is_dino):
        description += " (assumed; override with --heads)"
    if is_rotary:
        description += ", rotary positions"
    else:
        description += ", grid {}×{}".format(*backbone.grid)
        if not (grid or is_dino or is_ours):
            description += " (assumed; override with --grid)"
    remarks = []
    if is_deit3:
        remarks.append("it was taken for DeiT III, which has no rotary positions")
    if f"{prefix}fc_norm.weight" in tensors:
        remarks.append("it was trained on the mean of its patches (fc_norm), not on [CLS]")
    if not has_norm:
        remarks.append("it has no final norm, so its features get an untrained one")
    unstated = set()
    if not (is_ours or is_dino):
        if not stated_heads:
            unstated.add("heads")
        if not (stated_grid or is_rotary):
            unstated.add("grid")
    return LoadedWeights(backbone, content, description, remarks, unstated, is_ours)


def find_tensors(content: dict) -> dict:
    """All tensors of a file, {name: tensor}, those in nested dicts with the keys before the name."""
    tensors = {}
    queue = deque([("", content)])
    searched = []
    while queue and len(searched) < MAX_DICTS:
        prefix, part = queue.popleft()
        if any(part is other for other in searched):  # a dict may hold itself
            continue
        searched.append(part)
        for key, value in part.items():
            name = f"{prefix}{key}".replace("_orig_mod.", "")  # of torch.compile
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            elif isinstance(value, dict) and not re.fullmatch(NOT_SEARCHED, str(key)):
                queue.append((f"{prefix}{key}.", value))
    return tensors


def find_networks(tensors: dict) -> dict:
    """The networks among tensors: {prefix: {DINO's name: tensor}}, such as {"teacher.backbone.": …}.

    A prefix is what stands before cls_token. A tensor belongs to the network with the longest
    prefix that its name begins with. Heads, decoders and the like are left out.
    """
    prefixes = {match[1] for name in tensors if (match := re.fullmatch(CLS_TOKEN, name))}
    networks = {}
    for name, tensor in tensors.items():
        prefix = longest_beginning(name, prefixes)
        if prefix is None or any(
            re.fullmatch(LEFT_OUT_NETWORKS, part) for part in prefix.split(".")
        ):
            continue
        name = name.removeprefix(prefix)
        if re.match(LEFT_OUT, name.removeprefix("embeddings.")):
            continue
        for pattern, dino_name in DINO_NAMES:
            name = re.sub(pattern, dino_name, name)
        network = networks.setdefault(prefix, {})
        if name in network:
            raise ValueError(f"{prefix}{name} is there under two names")
        network[name] = tensor
    return networks


def longest_beginning(name: str, prefixes: set[str]) -> str | None:
    """The longest of the prefixes, which end with a dot or are empty, that a name begins with."""
    beginning = name
    while beginning:
        beginning, _, _ = beginning.rpartition(".")
        prefix = f"{beginning}." if beginning else ""
        if prefix in prefixes:
            return prefix
    return None


def is_complete(weights: dict) -> bool:
    """Whether a network has all that a ViT has outside of its blocks, except for the last norm."""
    has_positions = "pos_embed" in weights or has_dinov3_positions(weights)
    return has_positions and weights.keys() >= REQUIRED


def choose_network(networks: dict, tensors: dict) -> str:
    """The prefix of the ViT to take; a moving average, if there is one. ValueError if none is."""
    candidates = [prefix for prefix, weights in networks.items() if is_complete(weights)]
    averages = [prefix for prefix in candidates if is_average(prefix)]
    if candidates:
        return averages[0] if averages else candidates[0]
    if networks:
        prefix, weights = max(networks.items(), key=lambda item: len(item[1]))
        missing = sorted(REQUIRED - weights.keys())
        other_positions = ""
        if "pos_embed" not in weights and not has_dinov3_positions(weights):
            missing.append("pos_embed")
            other_positions = ", nor DINOv3's rotary positions"
        text = f"no {', '.join(missing)} beside {prefix}cls_token{other_positions}"
        if len(missing) > 1:  # names of another library
            text += "; its keys: " + ", ".join(list(weights)[:4])
        raise ValueError(text)
    for name in tensors:
        if re.fullmatch(CLS_TOKEN, name):
            raise ValueError(f"{name} is left out, since its name is that of a head or a decoder")
    keys = ", ".join(str(key) for key in list(tensors)[:4]) or "no tensors"
    missing = ["cls_token"]
    for part, pattern in (("patch_embed", "patch_embed"), ("pos_embed", "pos(ition)?_embed")):
        if not any(re.search(pattern, name) for name in tensors):
            missing.append(part)
    raise ValueError(f"no {', '.join(missing)} among its keys: {keys}, …")


def describe_network(chosen: str, networks: dict, content: dict) -> str:
    """Which of a file's networks was taken, and which were not."""
    others = [
        prefix[:-1] or "weights"
        for prefix, weights in networks.items()
        if prefix != chosen and is_complete(weights)
    ]
    # A moving average may be stored in a way that is not read, such as a list without names.
    told = [chosen, *(f"{other}." for other in others)]
    for name in average_names(content):
        if not any(
            f"{name}.".startswith(prefix) or prefix.startswith(f"{name}.") for prefix in told
        ):
            others.append(name)
    description = chosen[:-1] or "weights"
    if others:
        shown = ", ".join(others[:3]) + (", …" if len(others) > 3 else "")
        description += f" (not {shown})"
    return one_line(description)[:LONGEST_REASON]


def is_average(name: str) -> bool:
    """Whether a name says that it is a moving average's: teacher, model_ema, modelEMA, …"""
    words = re.sub("(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return re.search(AVERAGE_NAMES, words.lower()) is not None


def average_names(content: dict, beginning: str = "", levels: int = 4) -> list[str]:
    """The names of moving averages under which a file holds tensors."""
    names = {}  # a dict keeps the order
    for key, value in content.items():
        if re.fullmatch(NEVER_AVERAGES, str(key)) or re.match(LEFT_OUT, str(key)):
            continue
        if isinstance(value, torch.Tensor):
            # up to the part that says so, of a name such as model_ema.head.weight
            parts = str(key).split(".")
            ends = [end for end, part in enumerate(parts[:-1], 1) if is_average(part)]
            if ends:
                names[beginning + ".".join(parts[: ends[0]])] = None
        elif is_average(str(key)) and holds_tensors(value):
            names[f"{beginning}{key}"] = None
        elif isinstance(value, dict) and levels > 1:
            names |= dict.fromkeys(average_names(value, f"{beginning}{key}.", levels - 1))
    return list(names)


def holds_tensors(value, levels: int = 3) -> bool:
    """Whether a dict or list holds a tensor, itself or in the dicts and lists that it holds."""
    if not isinstance(value, (dict, list)) or levels == 0:
        return False
    items = value.values() if isinstance(value, dict) else value
    return any(isinstance(item, torch.Tensor) or holds_tensors(item, levels - 1) for item in items)


# ------------------------------------------------------------------------- to the layers of vit.py


def check_tensors(weights: dict, path: str):
    """Raise ValueError for tensors that are no plain numbers, that the file cannot hold, or that
    vit.py has no layers for.
    """
    if weights.get("register_tokens", torch.ones(1)).numel() == 0:
        del weights["register_tokens"]  # Hugging Face's way to say that there are none
    for name, value in weights.items():
        is_plain = value.layout == torch.strided and not (value.is_quantized or value.is_meta)
        if not (is_plain and value.is_floating_point() and value.numel()):
            raise ValueError(f"{name} is empty, or holds no plain floating-point numbers")
    if sum(value.nbytes for value in weights.values()) > os.path.getsize(path):
        raise ValueError("its tensors are larger than the file")
    gated = [name for name in weights if re.match(GATED_MLP, name)]
    fc1 = weights.get("blocks.0.mlp.fc1.weight")
    fc2 = weights.get("blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and len(fc1) == 2 * fc2.shape[-1]:
        gated.append("blocks.0.mlp.fc1.weight")  # both halves in one layer: timm's DINOv2 ViT-g
    if gated:
        raise ValueError(
            f"{gated[0]}: MLPs with a gate (SwiGLU) are not read, such as DINOv3's S+, H+ and 7B"
        )
    has_shapes = (
        weights["cls_token"].ndim == 3
        and weights.get("pos_embed", weights["cls_token"]).ndim == 3
        and weights["patch_embed.proj.weight"].ndim == 4
    )
    if not has_shapes:
        raise ValueError("cls_token, pos_embed or patch_embed.proj.weight has an unexpected shape")


def check_deit3(content: dict, path: str):
    """Raise ValueError if nothing says that a network with gamma_1 in its blocks is DeiT III.

    timm's and naver-ai's ViTs with rotary positions beside the stored ones (rope_ape) have the same
    names and shapes, and their rotary positions are in no file. So a name must tell them apart:
    that of the file or its folder, or that of the model, which DeiT's own code saves.
    """
    arguments = content.get("args")
    names = [*path.split(os.sep)[-2:], content.get("arch"), getattr(arguments, "model", None)]
    text = " ".join(str(name).lower() for name in names)
    if re.search("(?<![a-z])rope(?![a-z])", text) or "deit" not in text:
        raise ValueError(
            "gamma_1: rotary positions may be missing; if it is DeiT III, put deit into its file name"
        )


def has_dinov3_positions(weights: dict) -> bool:
    """Whether a network is DINOv3, whose rotary positions follow from a formula.

    Meta's files have the periods. In others DINOv3 differs from other ViTs with rotary positions in
    its registers, and in keys that have no bias.
    """
    if "pos_embed" in weights:
        return False
    keys_have_bias = weights.keys() & {"blocks.0.attn.qkv.bias", "blocks.0.attn.k.bias"}
    is_dinov3 = "register_tokens" in weights and not keys_have_bias
    return "rope_embed.periods" in weights or is_dinov3


def heads_of_periods(weights: dict) -> int | None:
    """The number of heads that rotary positions in a file are for, or None if there are none.

    A quarter of a head's numbers turn with the row, and each of these has its own period.
    """
    if "rope_embed.periods" not in weights:
        return None
    return max(1, weights["cls_token"].shape[-1] // (4 * weights["rope_embed.periods"].numel()))


def block_prefixes(weights: dict) -> list[str]:
    """The prefixes of the blocks' names, such as "blocks.0."."""
    return sorted({match[0] for name in weights if (match := re.match(r"blocks\.\d+\.", name))})


def fuse_queries_keys_values(weights: dict):
    """Give every block one linear layer qkv with a bias, in place.

    Hugging Face has three layers. DINOv3 has no bias for its keys, or masks it, which is the same
    as a bias of zero. Some ViTs of timm have no bias at all (qkv_bias=False).
    """
    blocks = block_prefixes(weights)
    for block in blocks:
        layer = f"{block}attn."
        parts = [weights.pop(f"{layer}{part}.weight", None) for part in "qkv"]
        if any(part is not None for part in parts):
            for part, weight in zip("qkv", parts):
                if weight is None:
                    raise ValueError(f"no {layer}{part}.weight")
            weights[f"{layer}qkv.weight"] = torch.cat(parts)

        biases = [weights.pop(f"{layer}{part}.bias", None) for part in "qkv"]
        given = [bias for bias in biases if bias is not None]
        if given:
            is_beit = "pos_embed" in weights and len(given) < 3  # or EVA; their blocks are others
            if is_beit:
                raise ValueError(f"{layer}q_bias: not a part of the ViT here")
            biases = [torch.zeros_like(given[0]) if bias is None else bias for bias in biases]
            weights[f"{layer}qkv.bias"] = torch.cat(biases)
        mask = weights.pop(f"{layer}qkv.bias_mask", None)
        if mask is not None:
            weights[f"{layer}qkv.bias"] = weights[f"{layer}qkv.bias"] * mask

    if not any(f"{block}attn.qkv.bias" in weights for block in blocks):
        for block in blocks:
            weight = weights.get(f"{block}attn.qkv.weight")
            if weight is not None:
                weights[f"{block}attn.qkv.bias"] = weight.new_zeros(len(weight))


def fold_layer_scale(weights: dict) -> bool:
    """Fold LayerScale into the linear layers whose output it multiplies, in place.

    Returns whether there was any.
    """
    scales = [name for name in weights if name.endswith((".attn.proj.gamma", ".mlp.fc2.gamma"))]
    for name in scales:
        scale = weights.pop(name).float()
        for part in ("weight", "bias"):
            layer = name.replace("gamma", part)
            if layer not in weights:
                raise ValueError(f"no {layer}")
            weights[layer] = torch.einsum("i,i...->i...", scale, weights[layer].float())
    return bool(scales)


def separate_positions(weights: dict, grid: tuple[int, int] | None, registers: int):
    """Give `pos_embed` a position for [CLS] and one for each patch, in place.

    Where [CLS] has none, it becomes zero: DeiT III has none, and timm's DINOv2 has added it to
    cls_token. Positions of registers are added to the registers. Raises ValueError if it is not
    clear which positions belong to patches.
    """
    positions = weights["pos_embed"]
    counts = patch_counts(positions.shape[1], registers)
    if grid:
        counts = [count for count in counts if count == math.prod(grid)]
    else:
        counts = [count for count in counts if math.isqrt(count) ** 2 == count]
    if len(counts) > 1 and registers:
        raise ValueError(
            f"its positions are for {counts[0]} or {counts[-1]} patches; use --grid RxC"
        )
    if not counts:
        return  # the grid is refused later
    patches = counts[0]
    if patches == positions.shape[1] > 1:
        weights["pos_embed"] = F.pad(positions, (0, 0, 1, 0))
    elif registers and patches == positions.shape[1] - 1 - registers:
        of_registers = positions[:, 1 : 1 + registers]
        weights["register_tokens"] = weights["register_tokens"] + of_registers
        weights["pos_embed"] = torch.cat([positions[:, :1], positions[:, 1 + registers :]], dim=1)


def pad_mlps(weights: dict, shape: ViTShape):
    """Fill MLPs up to a multiple of the network's width, in place.

    The hidden units that are added have weights of zero on both sides, so they are always zero and
    no gradient reaches them: the network computes what it did.
    """
    hidden_dim = shape.mlp_ratio * shape.dim
    for block in block_prefixes(weights):
        first = weights.get(f"{block}mlp.fc1.weight")
        bias = weights.get(f"{block}mlp.fc1.bias")
        second = weights.get(f"{block}mlp.fc2.weight")
        attention = weights.get(f"{block}attn.qkv.weight")
        if any(value is None for value in (first, bias, second, attention)):
            continue  # what is missing is named later
        units = len(first)
        fits = first.shape[1:] == (shape.dim,) and second.shape == (shape.dim, units)
        # A layer that is really there is as wide, so a hostile file cannot make us take memory.
        if not fits or attention.shape != (3 * shape.dim, shape.dim) or units >= hidden_dim:
            continue
        missing = hidden_dim - units
        weights[f"{block}mlp.fc1.weight"] = F.pad(first, (0, 0, 0, missing))
        weights[f"{block}mlp.fc1.bias"] = F.pad(bias, (0, missing))
        weights[f"{block}mlp.fc2.weight"] = F.pad(second, (0, missing))


def published_heads(weights: dict, prefix: str) -> int | None:
    """The heads of a published ViT whose heads are not 64 wide; None if it is none of them."""
    dim = weights["cls_token"].shape[2]
    for published in PUBLISHED_HEADS:
        if published.dim == dim and re.search(published.prefix, prefix):
            return published.heads
    return None


def infer_shape(
    weights: dict,
    heads: int | None,
    grid: tuple[int, int] | None,
    antialias: bool,
    norm_eps: float,
) -> ViTShape:
    """The shape of a ViT with these weights; ValueError if there is none.

    Without `heads` they are taken to be 64 wide, without `grid` it is taken to be a square.
    """
    dim = weights["cls_token"].shape[2]
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    depth = len(block_prefixes(weights))
    heads = heads or max(1, dim // 64)
    is_rotary = "pos_embed" not in weights
    tokens = 2 if is_rotary else weights["pos_embed"].shape[1]
    is_possible = type(heads) is int and min(heads, depth, dim, tokens - 1) > 0
    # A block has 12 tensors, 9 without the biases of its linear layers. A hostile file may name
    # thousands of blocks, and have few tensors for each, to make us build a huge network.
    if not is_possible or len(weights) <= 9 * depth:
        raise ValueError(
            f"there is no ViT with {depth} blocks, width {dim}, {heads} heads and {tokens} tokens"
        )

    if not (isinstance(norm_eps, float) and 0 < norm_eps < 1):
        raise ValueError("norm_eps, what layer norms add to the variance, is not a small number")
    if is_rotary:
        grid = (14, 14)  # means nothing
    elif grid is None:
        side = math.isqrt(tokens - 1)
        grid = (side, side)
    rows, columns = grid
    pos_size = (rows * patch_size, columns * patch_size)
    hidden_dim = len(weights.get("blocks.0.mlp.fc1.weight", ()))
    return ViTShape(
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        pos_size=pos_size[0] if rows == columns else pos_size,
        mlp_ratio=math.ceil(hidden_dim / dim) or 4,
        registers=count_registers(weights),
        antialias=antialias,
        norm_eps=norm_eps,
        rotary=is_rotary,
    )


def build_backbone(weights: dict, shape: ViTShape) -> VisionTransformer:
    """A ViT of that shape with these weights in float32; ValueError if they do not fit."""
    with torch.device("meta"):  # takes no memory, whatever sizes the file claims
        backbone = VisionTransformer(shape)
    expected = backbone.state_dict()
    unknown = sorted(weights.keys() - expected.keys())
    if unknown:
        raise ValueError(f"{', '.join(unknown[:4])}: not a part of the ViT here")
    # A file may lack the last norm. Attention does not depend on it; features get an untrained one.
    if not weights.keys() & {"norm.weight", "norm.bias"}:
        weights = weights | nn.LayerNorm(shape.dim).state_dict(prefix="norm.")
    if missing := [name for name in expected if name not in weights]:
        raise ValueError(f"no {', '.join(missing[:4])}")
    if not shape.rotary:
        positions = weights["pos_embed"].shape[1] - 1
        rows, columns = backbone.grid
        if positions != rows * columns:
            raise ValueError(
                f"{positions} positions do not fill a grid of {rows}×{columns}; use --grid RxC"
            )
    for name, value in expected.items():
        if weights[name].shape != value.shape:
            found = "×".join(map(str, weights[name].shape))
            needed = "×".join(map(str, value.shape))
            raise ValueError(f"{name} is {found} where {needed} is needed")
    backbone.load_state_dict(weights, strict=True, assign=True)
    for name, value in backbone.float().state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is NaN or infinite")
    return backbone


def one_line(error) -> str:
    """What an exception or text says, on one line and printable; its class if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(filter(str.isprintable, text))
