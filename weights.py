"""Published weights: DINO's by name, any ViT's from a file, read without running the file's code.

Libraries store the same ViT under many names. `load_backbone` brings them to DINO's names, works
out the shape, and says what it had to assume. What the network of vit.py does not have is refused.
"""

import argparse
import contextlib
import math
import os
import re
import sys
import zipfile
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

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
# every name, one after another, while the prefix of the network is still in front of it.
DINO_NAMES = [
    # torch.compile
    (r"_orig_mod\.", ""),
    # DINOv2, which trains its blocks in chunks, and timm
    (r"blocks\.\d+\.(\d+)", r"blocks.\1"),
    (r"reg_token$", "register_tokens"),
    # Hugging Face
    (r"\bencoder.layer.", "blocks."),
    (r"\bembeddings.", ""),
    (r"patch_embeddings.projection", "patch_embed.proj"),
    (r"position_embeddings", "pos_embed"),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"layernorm", "norm"),
    (r"attention.output.dense", "attn.proj"),
    (r"attention.attention", "attn"),
    (r"intermediate.dense", "mlp.fc1"),
    (r"output.dense", "mlp.fc2"),
    # LayerScale, in DINOv2, timm and Hugging Face
    (r"layer_scale", "ls"),
    (r"\bls1.\w+", "attn.proj.gamma"),
    (r"\bls2.\w+", "mlp.fc2.gamma"),
]
# What a network is wrapped in: keys of a file that hold another dict, or prefixes of the names of
# the parameters. Other keys are not searched.
WRAPPERS = (
    # self-supervised learning: a network with its moving average
    r"((teacher|student|momentum|base)_)?(encoder|backbone)|teacher|student|momentum"
    # training loops, DistributedDataParallel, Lightning
    r"|(state_dict|model)(_ema)?|model_state_dict|module|net"
    # Hugging Face
    r"|vit|dinov2(_with_registers)?"
)
# Parts of a network that attention does not need, a pattern.
LEFT_OUT = r"\w*(head|decoder|predictor|projector|classifier|criterion)|mask|fc_norm|pooler"
# Of several networks in a file, one that is a moving average is taken: a pattern of its prefix.
AVERAGE_NAMES = r"teacher|momentum|_ema"
MAX_DICTS = 9  # nested dicts that are searched for weights; a hostile file may have any number
REQUIRED = {"cls_token", "pos_embed", "patch_embed.proj.weight"}


@dataclass(frozen=True)
class PublishedHeads:
    """How many heads a published ViT has that are not 64 wide."""

    prefix: str  # pattern of the prefix of its parameters' names; empty: any
    dim: int
    heads: int


PUBLISHED_HEADS = [
    PublishedHeads("(base|momentum)_encoder", 384, 12),  # MoCo v3's ViT-S
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
        reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
        if refused := re.search(r"GLOBAL (\S{1,150})", str(error)):
            reason = f"{refused[1]}, which could run code: save the network's state_dict() alone"
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, is damaged, or holds more than tensors and "
            f"plain values ({reason}); use another copy of it"
        ) from error


def check_zip(path: str):
    """Raise ValueError for a damaged record, or for one that is compressed.

    torch.load does not check the records' CRC: of 400 files with a flipped bit it took 398.
    torch.save never compresses, so a compressed record is a zip bomb.
    """
    with zipfile.ZipFile(path) as archive:
        is_compressed = any(record.compress_type for record in archive.infolist())
        if is_compressed or archive.testzip():
            raise ValueError("a record's CRC is wrong, or it is compressed")


# --------------------------------------------------------------------------------- any ViT's names


def load_backbone(
    source: str, heads: int | None = None, grid: tuple[int, int] | None = None
) -> LoadedWeights:
    """The ViT that `source` holds, which is a name of DINO_FILES or a file.

    If the file holds a student and a teacher, the teacher is taken. Shapes tell neither the number
    of heads nor the grid (rows, columns) of the positions. What the file does not say is taken from
    `heads` and `grid`, or assumed; the description says which.

    Raises ValueError or OSError for anything but the finite weights of one ViT.
    """
    path = download_dino(source) if source in DINO_FILES else source
    content = read_checkpoint(path)
    try:
        networks = find_networks(content)
        prefix = choose_network(networks, content)
        weights = networks[prefix]
        if sum(value.nbytes for value in weights.values()) > os.path.getsize(path):
            raise ValueError("its tensors are larger than the file")
        fuse_queries_keys_values(weights)
        has_layer_scale = fold_layer_scale(weights)
        pad_positions(weights, grid)

        config = content.get("config") or {}  # of a run of train.py
        known_heads = config.get("heads") or heads or published_heads(weights, prefix)
        # DINOv2 with registers has LayerScale too, and interpolates with antialiasing.
        is_dinov2_with_registers = "register_tokens" in weights and has_layer_scale
        antialias = config.get("antialias", is_dinov2_with_registers)
        shape = infer_shape(weights, known_heads, grid, antialias)
        backbone = build_backbone(weights, shape)
    except Exception as error:  # of many kinds, depending on what the file holds instead
        raise ValueError(
            f"{path}: unsupported checkpoint; the README lists the layouts that can be read "
            f"({one_line(error)[:300]})"
        ) from error

    is_known = "heads" in config or source in DINO_FILES
    description = describe_network(prefix, networks)
    description += f", {shape.heads} heads"
    if not (known_heads or is_known):
        description += " (assumed; override with --heads)"
    description += ", grid {}×{}".format(*backbone.grid)
    if not (grid or is_known):
        description += " (assumed; override with --grid)"
    if "norm.weight" not in weights:
        description += ", no final norm, so a new one is used"
    return LoadedWeights(backbone, content, description)


def find_tensors(content: dict) -> dict:
    """All tensors of a file, {name: tensor}, those in nested dicts with the keys before the name.

    Only dicts under the keys of WRAPPERS are searched.
    """
    tensors = {}
    queue = deque([("", content)])
    searched = 0
    while queue and searched < MAX_DICTS:
        prefix, part = queue.popleft()
        searched += 1
        for key, value in part.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{prefix}{key}"] = value
            elif isinstance(value, dict) and re.fullmatch(WRAPPERS, str(key)):
                queue.append((f"{prefix}{key}.", value))
    return tensors


def find_networks(content: dict) -> dict:
    """The networks in a file: {prefix: {DINO's name: tensor}}, such as {"teacher.backbone.": …}."""
    networks = {}
    for name, tensor in find_tensors(content).items():
        for pattern, dino_name in DINO_NAMES:
            name = re.sub(pattern, dino_name, name)
        prefix = re.match(rf"(({WRAPPERS})\.)*", name)[0]
        name = name.removeprefix(prefix)
        if not re.match(LEFT_OUT, name):
            networks.setdefault(prefix, {})[name] = tensor
    return networks


def choose_network(networks: dict, content: dict) -> str:
    """The prefix of the ViT to take; a moving average, if there is one. ValueError if none is."""
    candidates = [prefix for prefix in networks if REQUIRED <= networks[prefix].keys()]
    if not candidates:
        keys = list(find_tensors(content)) or list(content)
        keys = ", ".join(str(key) for key in keys[:8])
        raise ValueError(f"no {', '.join(sorted(REQUIRED))} among its keys: {keys}, …")
    averages = [prefix for prefix in candidates if re.search(AVERAGE_NAMES, prefix)]
    return averages[0] if averages else candidates[0]


def describe_network(chosen: str, networks: dict) -> str:
    """Which of a file's networks was taken, and which were not."""
    others = [
        prefix for prefix in networks if prefix != chosen and REQUIRED <= networks[prefix].keys()
    ]
    description = chosen[:-1] or "weights"
    if others:
        description += f" (not {', '.join(prefix[:-1] or 'weights' for prefix in others)})"
    return description


def fuse_queries_keys_values(weights: dict):
    """Replace Hugging Face's query, key and value by the qkv that is one linear layer, in place."""
    for name in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        weights[name.replace("query", "qkv")] = torch.cat(parts)


def fold_layer_scale(weights: dict) -> bool:
    """Fold LayerScale into the linear layers whose output it multiplies, in place.

    Returns whether there was any.
    """
    scales = [name for name in weights if name.endswith(".gamma")]
    for name in scales:
        scale = weights.pop(name).float()
        for part in ("weight", "bias"):
            layer = name.replace("gamma", part)
            weights[layer] = torch.einsum("i,i...->i...", scale, weights[layer].float())
    return bool(scales)


def pad_positions(weights: dict, grid: tuple[int, int] | None):
    """Give [CLS] a position of zero, in place, where positions are those of the patches alone.

    In timm's DINOv2 the position of [CLS] is part of cls_token.
    """
    tokens = weights["pos_embed"].shape[1]
    patches = math.prod(grid) if grid else math.isqrt(tokens) ** 2
    if 1 < tokens == patches:
        weights["pos_embed"] = F.pad(weights["pos_embed"], (0, 0, 1, 0))


def published_heads(weights: dict, prefix: str) -> int | None:
    """The heads of a published ViT whose heads are not 64 wide; None if it is none of them."""
    dim = weights["pos_embed"].shape[2]
    for published in PUBLISHED_HEADS:
        if published.dim == dim and re.search(published.prefix, prefix):
            return published.heads
    return None


def infer_shape(
    weights: dict, heads: int | None, grid: tuple[int, int] | None, antialias: bool
) -> ViTShape:
    """The shape of a ViT with these weights; ValueError if there is none.

    Without `heads` they are taken to be 64 wide, without `grid` it is taken to be a square.
    """
    tokens, dim = weights["pos_embed"].shape[1:]
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    heads = heads or max(1, dim // 64)
    is_possible = type(heads) is int and min(heads, depth, dim, tokens - 1) > 0
    # A block has 12 tensors, 9 without the biases of its linear layers. A hostile file may name
    # thousands of blocks, and have few tensors for each, to make us build a huge network.
    if not is_possible or len(weights) <= 9 * depth:
        raise ValueError(
            f"there is no ViT with {depth} blocks, width {dim}, {heads} heads and {tokens} tokens"
        )

    if grid is None:
        side = math.isqrt(tokens - 1)
        grid = (side, side)
    rows, columns = grid
    pos_size = (rows * patch_size, columns * patch_size)
    return ViTShape(
        patch_size=patch_size,
        dim=dim,
        depth=depth,
        heads=heads,
        pos_size=pos_size[0] if rows == columns else pos_size,
        mlp_ratio=len(weights.get("blocks.0.mlp.fc1.weight", ())) // dim or 4,
        registers=weights["register_tokens"].shape[1] if "register_tokens" in weights else 0,
        antialias=antialias,
    )


def build_backbone(weights: dict, shape: ViTShape) -> VisionTransformer:
    """A ViT of that shape with these weights in float32; ValueError if they do not fit."""
    with torch.device("meta"):  # takes no memory, whatever sizes the file claims
        backbone = VisionTransformer(shape)
    if unknown := sorted(weights.keys() - backbone.state_dict().keys()):
        raise ValueError(f"{', '.join(unknown[:4])}: not a part of the ViT here")
    positions = weights["pos_embed"].shape[1] - 1
    rows, columns = backbone.grid
    if positions != rows * columns:
        raise ValueError(
            f"{positions} positions do not fill a grid of {rows}×{columns}; use --grid RxC"
        )
    # A file may lack the last norm. Attention does not depend on it; features get an untrained one.
    new_norm = nn.LayerNorm(weights["cls_token"].numel()).state_dict(prefix="norm.")
    backbone.load_state_dict(new_norm | weights, strict=True, assign=True)
    for name, value in backbone.float().state_dict().items():
        if not (value.is_floating_point() and value.isfinite().all()):
            raise ValueError(f"{name} is complex, NaN or infinite")
    return backbone


def one_line(error: BaseException) -> str:
    """What an exception says, on one line and printable; its class if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(filter(str.isprintable, text))
