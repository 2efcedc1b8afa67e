"""The Vision Transformer, its projection heads, and the weights that go into them.

A ViT cuts an image into patches, puts a learned [CLS] token in front of them, and lets all
tokens attend to each other in every block. What [CLS] attends to in the last block is the
attention map that the paper asks about (its figures 2 to 6). Parameter names and numbers are
those of facebookresearch/dino: its weights load here, its scripts read those of the paper's ViT.
"""

import argparse
import contextlib
import math
import os
import re
import sys
import zipfile
from collections import OrderedDict

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# DINO's published backbones by the names of its hub; `dino` is the paper's ViT-S/8.
DINO_URL = "https://dl.fbaipublicfiles.com/dino/{0}/{0}.pth"
DINO_FILES = {
    "dino": "dino_deitsmall8_pretrain",
    "dino_vits8": "dino_deitsmall8_pretrain",
    "dino_vits16": "dino_deitsmall16_pretrain",
    "dino_vitb8": "dino_vitbase8_pretrain",
    "dino_vitb16": "dino_vitbase16_pretrain",
}
# What others call the same things: "pattern=DINO's name", put in place one after another. First
# torch.compile, DINOv2's chunks of blocks and timm, then Hugging Face, then LayerScale of either.
NAMES = r"""_orig_mod\.= blocks\.\d+\.(\d+)=blocks.\1 reg_token$=register_tokens
    \bencoder.layer.=blocks. \bembeddings.= patch_embeddings.projection=patch_embed.proj
    position_embeddings=pos_embed layernorm_before=norm1 layernorm_after=norm2 layernorm=norm
    attention.output.dense=attn.proj attention.attention=attn intermediate.dense=mlp.fc1
    output.dense=mlp.fc2 layer_scale=ls \bls1.\w+=attn.proj.gamma \bls2.\w+=mlp.fc2.gamma"""
# what a network lies in, as keys of a file or in front of its names; and what attention can miss
WRAPPERS = r"((teacher|student|momentum|base)_)?(encoder|backbone)|teacher|student|momentum|module"
WRAPPERS += r"|(state_dict|model)(_ema)?|model_state_dict|net|vit|dinov2(_with_registers)?"
LEFT_OUT = r"\w*(head|decoder|predictor|projector|classifier|criterion)|mask|fc_norm|pooler"
# heads that are not 64 wide, by names and width: MoCo v3's ViT-S; any ViT-H, -g and -G
HEADS = (("(base|momentum)_encoder", 384, 12), ("", 1280, 16), ("", 1408, 16), ("", 1664, 16))
CLASSES = 10  # digits, and STL-10's
OLDER = {"mlp_ratio": 4, "registers": 0, "centering": "mean", "optimizer": "adamw"}
OLDER |= {"antialias": False}  # what older checkpoints lack
# what decides the shapes of a ViT's weights, and how its positions are interpolated
SHAPE = ("patch_size", "dim", "depth", "heads", "pos_size", "mlp_ratio", "registers", "antialias")


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d) v in each head, then a linear layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def queries_keys_values(self, x, queries=None):
        """q of the first `queries` tokens (None: of all), k and v of every token."""
        if queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # the rows of the fused weight are [q; k; v]
            dim = x.shape[-1]
            q = F.linear(x[:, :queries], self.qkv.weight[:dim], self.qkv.bias[:dim])
            k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        # (B, N, dim) -> (B, heads, N, d)
        return [x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v)]

    def forward(self, x, queries=None, attention=None):
        q, k, v = self.queries_keys_values(x, queries)
        if attention is not None:  # instead of this layer's own
            x = attention @ v
        elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:
            # the fused kernel's backward pass takes 3 to 5 times as long here
            x = attention_weights(q, k) @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # fused: never writes out the weights
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, queries, dim)


def attention_weights(q, k):
    """softmax(q kᵀ / √d): (B, heads, queries, d), (B, heads, N, d) -> (B, heads, queries, N)."""
    return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block. With `queries` = n only the first n tokens are computed."""

    def __init__(self, dim, heads, hidden_dim):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        layers = {"fc1": nn.Linear(dim, hidden_dim), "act": nn.GELU()}
        self.mlp = nn.Sequential(OrderedDict(layers, fc2=nn.Linear(hidden_dim, dim)))

    def forward(self, x, queries=None, attention=None):
        x = x[:, :queries] + self.attn(self.norm1(x), queries, attention)
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT backbone; the defaults are the paper's ViT-S/8 (section III).

    `patch_size` and `pos_size` are sides in pixels: `pos_embed` stores the patch grid of an image
    of pos_size, or of (height, width), and is interpolated for others, with `antialias` as DINOv2
    with registers does. `registers` are learned tokens behind [CLS] that stand for no patch, where
    attention can go that needs none (Darcet et al. 2024). `init_std` is that of linear layers; 0:
    1/√inputs, as DINO's 0.02 is next to nothing in a narrow network, and learning starts late.
    """

    def __init__(
        self,
        patch_size=8,
        dim=384,
        depth=12,
        heads=6,
        pos_size=224,
        mlp_ratio=4,
        registers=0,
        antialias=False,
        init_std=0.02,
    ):
        super().__init__()
        if dim % heads:
            raise ValueError(f"--heads {heads}: use a divisor of the width {dim}")
        height, width = pos_size if isinstance(pos_size, tuple) else (pos_size, pos_size)
        if height % patch_size or width % patch_size:
            raise ValueError(f"image size {pos_size} is not a multiple of patch size {patch_size}")
        self.patch_size, self.pos_size, self.antialias = patch_size, pos_size, antialias
        self.dim, self.depth, self.heads, self.mlp_ratio = dim, depth, heads, mlp_ratio
        self.registers, self.grid = registers, (height // patch_size, width // patch_size)
        self.checkpoint_blocks = False  # True: recompute activations in the backward pass
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + math.prod(self.grid), dim))
        self.blocks = nn.ModuleList(Block(dim, heads, mlp_ratio * dim) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_weights(self, init_std)
        if registers:
            self.register_tokens = nn.Parameter(torch.empty(1, registers, dim))
            nn.init.trunc_normal_(self.register_tokens, std=0.02)

    def interpolate_pos_encoding(self, grid):
        """The positions of patches on a grid (rows, columns): (1, rows · columns, dim)."""
        pos_embed = self.pos_embed[:, 1:]
        if grid == self.grid:
            return pos_embed
        # DINO's weights were trained with bicubic interpolation by the *scale* (n + 0.1)/grid,
        # whose 0.1 guards against rounding; asking for size=grid is off by up to 0.03.
        scale = [(n + 0.1) / stored for n, stored in zip(grid, self.grid)]
        how = {"size": grid} if self.antialias else {"scale_factor": scale}
        pos_embed = pos_embed.mT.unflatten(2, self.grid)  # (1, dim, rows, columns)
        pos_embed = F.interpolate(pos_embed, mode="bicubic", antialias=self.antialias, **how)
        return pos_embed.flatten(2).mT

    def prepare_tokens(self, images, keep=None):
        """Images (B, 3, H, W) to tokens (B, N, dim): [CLS], registers, patches row by row."""
        height, width = images.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            patch = f"patch size {self.patch_size}"
            raise ValueError(f"image size {height}×{width} is not a multiple of the {patch}")
        patches = self.patch_embed.proj(images)  # (B, dim, rows, columns)
        tokens = [self.cls_token + self.pos_embed[:, :1]]
        tokens += [self.register_tokens] if self.registers else []  # they have no position
        tokens = [token.expand(len(images), -1, -1) for token in tokens]
        # (B, rows · columns, dim)
        patches = patches.flatten(2).mT + self.interpolate_pos_encoding(patches.shape[2:])
        if keep is not None:  # (B, k), numbers of patches: as if there were no others
            patches = patches.take_along_dim(keep[..., None], dim=1)
        return torch.cat([*tokens, patches], dim=1)

    def before_last_block(self, images, keep=None):
        """Images (B, 3, H, W), normalized, to what the last block is given: (B, N, dim)."""
        x = self.prepare_tokens(images, keep)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_blocks else block(x)
        return x

    def forward(self, images, keep=None):
        """Images (B, 3, H, W), normalized, to the [CLS] feature (B, dim)."""
        return self.last_feature(self.before_last_block(images, keep))

    def last_feature(self, x, attention=None):
        """The [CLS] feature (B, dim); `attention` (B, heads, 1, N): instead of the last block's."""
        return self.norm(self.blocks[-1](x, 1, attention))[:, 0]  # nothing reads the patches

    def get_last_selfattention(self, images, queries=None):
        """Last block's attention, (B, heads, queries, N), rows sum to 1; queries=1: of [CLS]."""
        return self.last_attention(self.before_last_block(images), queries)

    def last_attention(self, x, queries):
        """What `get_last_selfattention` returns, from the last block's input (B, N, dim)."""
        last = self.blocks[-1]
        q, k, _ = last.attn.queries_keys_values(last.norm1(x), queries)
        return attention_weights(q, k)

    def rollout(self, images):
        """Attention of [CLS] through all blocks, (B, N), rows summing to 1 (Abnar & Zuidema 2020).

        A product over blocks: of each, half the mean of its heads and half the identity, its skip.
        """
        x = self.prepare_tokens(images)
        mixed = torch.eye(x.shape[1], device=x.device)[None]  # row i: what token i is made of
        for block in self.blocks:
            queries = 1 if block is self.blocks[-1] else None
            q, k, _ = block.attn.queries_keys_values(block.norm1(x), queries)
            attention = attention_weights(q, k).mean(1)  # (B, N, N), in the end (B, 1, N)
            mixed = (attention @ mixed + mixed[:, :queries]) / 2
            x = block(x, queries)
        return mixed[:, 0]


def init_weights(network, std):
    """Truncated normal weights of that std (0: 1/√inputs), zero biases, in all linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
            nn.init.zeros_(module.bias)


class ProjectionHead(nn.Module):
    """From the [CLS] feature (B, dim) to the space where the loss lives (DINO's head).

    An MLP to a bottleneck, L2-normalized: (B, bottleneck), what the NCE loss compares. With
    `out_dim` = K a weight-normalized layer follows: (B, K), the logits of the DINO loss. `norm`
    puts a LayerNorm after each hidden layer: trained from random weights DINO's head, which has
    none, hardly leaves the loss of chance. No batch norm: gradients of pieces would not add up.
    """

    def __init__(self, dim, out_dim, hidden_dim, layers, bottleneck, norm=False, init_std=0.02):
        super().__init__()
        mlp, widths = [], [dim] + [hidden_dim] * (layers - 1)
        for width in widths[:-1]:
            norms = [nn.LayerNorm(hidden_dim, eps=1e-6)] if norm else []
            mlp += [nn.Linear(width, hidden_dim), *norms, nn.GELU()]
        self.mlp = nn.Sequential(*mlp, nn.Linear(widths[-1], bottleneck))
        init_weights(self.mlp, init_std)
        self.last_layer = Prototypes(bottleneck, out_dim) if out_dim else nn.Identity()

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Prototypes(nn.Module):
    """DINO's last layer: cosine of the input with each of K directions, the rows of weight_v."""

    def __init__(self, dim, out_dim):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim))
        self.register_buffer("weight_g", torch.ones(out_dim, 1))  # their lengths, 1 as in DINO
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x):
        # scale the (B, K) logits, not the (K, dim) weights: fewer numbers to write and to read
        return F.linear(x, self.weight_v) * (self.weight_g[:, 0] / self.weight_v.norm(dim=-1))


def build_network(config):
    """Backbone and head with random weights that config["seed"] decides; `config` is train.py's."""
    torch.manual_seed(config["seed"] % 2**63)
    c = {**OLDER, **config}
    backbone = VisionTransformer(*(c[name] for name in SHAPE), c["init_std"])
    backbone.checkpoint_blocks = c.get("checkpoint_blocks", False)
    out_dim = {"dino": c["out_dim"], "supervised": CLASSES}.get(c["loss"])
    names = ("head_hidden_dim", "head_layers", "bottleneck_dim", "head_norm", "init_std")
    head = ProjectionHead(c["dim"], out_dim, *(c[name] for name in names))
    return nn.Sequential(OrderedDict(backbone=backbone, head=head))  # DINO's names


def untrained_backbone(config):
    """The backbone of a run before its first step; None, with a warning, if it cannot be had."""
    backbone = build_network(config).backbone
    if config["weights"] != "none":
        try:
            backbone.load_state_dict(load_backbone(config["weights"])[0].state_dict())
        except (OSError, ValueError) as error:
            print(f"warning: no untrained reference: {one_line(error)}", file=sys.stderr)
            return None
    return backbone


def download_dino(name):
    """Path of DINO's weights of that name in torch.hub's folder, fetched if missing; or OSError."""
    url = DINO_URL.format(DINO_FILES[name])
    path = os.path.join(torch.hub.get_dir(), "checkpoints", os.path.basename(url))
    if not os.path.exists(path):
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, progress=sys.stderr.isatty())
            read_checkpoint(path)  # urlopen does not notice that an answer was cut short
        except Exception as error:
            with contextlib.suppress(OSError):
                os.remove(path)
            failed = f"--weights {name}: download from {url} failed ({error}); use --weights none"
            raise OSError(f"{failed} or --weights FILE with a copy of the file") from error
    return path


class Unread:
    """In the place of a path or numpy array, which nothing needs; arrays can be forged to harm."""

    __init__ = __setstate__ = lambda self, *state: None


def read_checkpoint(path):
    """What a .pth or .safetensors file holds, without running its code; OSError or ValueError."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file; use a .pth file with a ViT's weights")
    # all that public checkpoints need beside tensors and plain Python values
    allowed = [argparse.Namespace, np.dtype, *{type(np.dtype(c)) for c in "?bhilqBHILQefdFDSU"}]
    for core in ("numpy.core", "numpy._core"):  # of numpy 1 and 2
        allowed += [(np.float64(0).__reduce__()[0], f"{core}.multiarray.scalar")]
        allowed += [(Unread, f"{core}.multiarray._reconstruct"), (Unread, "numpy.ndarray")]
    for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"):
        allowed += [(Unread, f"pathlib.{name}"), (Unread, f"pathlib._local.{name}")]  # Python 3.13
    try:
        if str(path).endswith(".safetensors"):
            import safetensors.torch  # nothing else needs it

            return safetensors.torch.load_file(path)
        if zipfile.is_zipfile(path):  # what torch.save has written since 2020
            with zipfile.ZipFile(path) as archive:
                # torch.save never compresses, so a compressed record is a zip bomb; torch.load
                # does not check the records' CRC: of 400 files with a flipped bit it took 398
                if any(record.compress_type for record in archive.infolist()) or archive.testzip():
                    raise ValueError("a record's CRC is wrong, or it is compressed")
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise ValueError(f"{path} needs a library to be read: pip install safetensors") from error
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        reason = str(error).strip().partition("\n")[0][:150] or type(error).__name__
        if refused := re.search(r"GLOBAL (\S{1,150})", str(error)):
            reason = f"{refused[1]}, which could run code: save the network's state_dict() alone"
        text = f"{path} is not a PyTorch checkpoint, is damaged, or holds more than tensors and"
        raise ValueError(f"{text} plain values ({reason}); use another copy of it") from error


def find_weights(content, limit):
    """The weights, in DINO's names; whether with LayerScale; their place, then that of others."""
    networks, parts = {}, [("", content)]
    for place, part in parts:  # which grows meanwhile
        for key, value in part.items():
            name = f"{place}{key}"
            if isinstance(value, torch.Tensor):
                for pair in NAMES.split():
                    name = re.sub(*pair.split("="), name)
                where = re.match(rf"(({WRAPPERS})\.)*", name)[0]
                if not re.match(LEFT_OUT, name := name.removeprefix(where)):
                    networks.setdefault(where, {})[name] = value
            elif isinstance(value, dict) and re.fullmatch(WRAPPERS, str(key)) and len(parts) < 9:
                parts.append((f"{name}.", value))
    needed = {"cls_token", "pos_embed", "patch_embed.proj.weight"}
    places = [where for where, weights in networks.items() if needed <= weights.keys()]
    if not places:
        keys = ", ".join([str(key) for _, part in parts for key in part][:8])
        raise ValueError(f"no {', '.join(sorted(needed))} among its keys: {keys}, …")
    places.sort(key=lambda place: not re.search("teacher|momentum|_ema", place))
    weights = networks[places[0]]
    if sum(value.nbytes for value in weights.values()) > limit:
        raise ValueError("its tensors are larger than the file")
    for name in [name for name in weights if ".attn.query." in name]:
        parts = [weights.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        weights[name.replace("query", "qkv")] = torch.cat(parts)
    scales = {name: weights.pop(name) for name in list(weights) if name.endswith(".gamma")}
    for name, scale in scales.items():
        # LayerScale multiplies what a linear layer gives: it can as well be a part of that layer
        for kind in (name.replace("gamma", "weight"), name.replace("gamma", "bias")):
            weights[kind] = torch.einsum("i,i...->i...", scale.float(), weights[kind].float())
    return weights, bool(scales), *places


def load_backbone(source, heads=None, grid=None):
    """The ViT that `source` holds, a name of DINO_FILES or a file, and all that the file holds.

    Of student and teacher it is the teacher. Shapes tell neither the number of `heads` nor the
    `grid` (rows, columns) of the positions: unless the file does, they are as given, or assumed, as
    `about` of the ViT tells. Raises ValueError or OSError for all but one ViT's finite weights.
    """
    path = download_dino(source) if source in DINO_FILES else source
    content = read_checkpoint(path)
    try:
        weights, layer_scale, *places = find_weights(content, os.path.getsize(path))
        known = "heads" in (config := content.get("config", {})) or source in DINO_FILES
        registers = weights["register_tokens"].shape[1] if "register_tokens" in weights else 0
        antialias = config.get("antialias", registers > 0 and layer_scale)
        tokens, dim = weights["pos_embed"].shape[1:]
        if 1 < tokens == (math.prod(grid) if grid else math.isqrt(tokens) ** 2):
            # of patches alone, as in timm's DINOv2: that of [CLS] is a part of cls_token
            weights["pos_embed"], tokens = F.pad(weights["pos_embed"], (0, 0, 1, 0)), tokens + 1
        rows, columns = grid or [math.isqrt(tokens - 1)] * 2
        size = weights["patch_embed.proj.weight"].shape[-1]
        depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        family = [n for names, width, n in HEADS if width == dim and re.search(names, places[0])]
        told = config.get("heads") or heads or max(family, default=None)
        heads = told or max(1, dim // 64)
        mlp_ratio = len(weights.get("blocks.0.mlp.fc1.weight", ())) // dim or 4
        surplus = len(weights) - 9 * depth  # a block has 12 tensors; a hostile file, many blocks
        if type(heads) is not int or min(heads, depth, dim, tokens - 1, surplus) < 1:
            raise ValueError(f"{depth} blocks, width {dim}, heads {heads}, {tokens} tokens")
        pos_size = rows * size if rows == columns else (rows * size, columns * size)
        shape = size, dim, depth, heads, pos_size, mlp_ratio, registers, antialias
        with torch.device("meta"):  # takes no memory, whatever sizes the file claims
            backbone = VisionTransformer(*shape)
        if unknown := sorted(weights.keys() - backbone.state_dict().keys()):
            raise ValueError(f"{', '.join(unknown[:4])} would change the network")
        if rows * columns != tokens - 1:
            raise ValueError(f"{tokens - 1} positions, no grid {rows}×{columns}; use --grid RxC")
        fresh = nn.LayerNorm(weights["cls_token"].numel()).state_dict(prefix="norm.")
        backbone.load_state_dict(fresh | weights, strict=True, assign=True)
        for name, value in backbone.float().state_dict().items():
            if not (value.is_floating_point() and value.isfinite().all()):
                raise ValueError(f"{name} is complex, NaN or infinite")
        about = " rather than ".join(place[:-1] or "weights" for place in places)
        about += f", {heads} heads" + ("" if told or known else " (assumed; --heads)")
        about += f", grid {rows}×{columns}" + ("" if grid or known else " (assumed; --grid)")
        about += "" if "norm.weight" in weights else ", no last norm: features have a new one"
        backbone.about = about
        return backbone, content
    except Exception as error:  # of many kinds, by what the file holds instead
        raise ValueError(f"{path}: none of the README's ViTs ({one_line(error)[:300]})") from error


def one_line(error):
    """What an exception says, on one line and printable; its kind if it says nothing."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(filter(str.isprintable, text))


def error_line(error):
    """What `main` prints of an error that a user can mend; a bug is raised, with its traceback."""
    if not isinstance(error, (RuntimeError, MemoryError)):
        return one_line(error)
    if "MPS" in str(error) and "out of memory" not in str(error):  # an operation that it lacks
        return f"{one_line(error)[:200]}; use PYTORCH_ENABLE_MPS_FALLBACK=1 or --device cpu"
    known = ("out of memory", "allocate memory", "not enough memory")  # of a GPU, of CPUs
    if isinstance(error, RuntimeError) and not any(text in str(error) for text in known):
        raise error
    return "out of memory; use --image-size, --micro-batch, --checkpoint-blocks to need less"


def default_device():
    there = {"cuda": torch.cuda, "mps": torch.backends.mps}
    return next((name for name, kind in there.items() if kind.is_available()), "cpu")


def checkpoint_of(path):
    """The checkpoint in the folder of a run; else the path itself, that of a file."""
    return os.path.join(path, "ckpt.pth") if os.path.isdir(path) else path


def find_device(name):
    """torch.device of `--device`; ValueError if this machine has no such thing."""
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error).split(". ")[0]
        raise ValueError(f"--device {name} cannot be used ({reason}); use --device cpu") from error
    return torch.device(name)
