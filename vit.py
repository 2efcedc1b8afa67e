"""The Vision Transformer, its projection heads, and the weights that go into them.

A ViT cuts an image into patches, puts a learned [CLS] token in front of them, and lets all
tokens look at each other in every block. What the [CLS] token of the last block looks at is
the attention map that the paper asks about (its figures 2 to 6).

Parameter names and numbers are those of facebookresearch/dino, so that its published weights
load without translation and its scripts read our checkpoints.
"""

import argparse
import contextlib
import hashlib
import http.client
import math
import os
import socket
import tempfile
import urllib.parse
import warnings
import zipfile

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# DINO's published backbones by the names of its hub; `dino` is the paper's ViT-S/8.
DINO_HOST = "https://dl.fbaipublicfiles.com/dino"
DINO_FILES = {
    "dino": "dino_deitsmall8_pretrain",
    "dino_vits8": "dino_deitsmall8_pretrain",
    "dino_vits16": "dino_deitsmall16_pretrain",
    "dino_vitb8": "dino_vitbase8_pretrain",
    "dino_vitb16": "dino_vitbase16_pretrain",
}
DINO_BYTES = {"dino_deitsmall8_pretrain": 86_728_949}  # of the others the size is not checked
NO_ANSWER_SECONDS = 15  # a host that stays silent this long counts as unreachable
MOST_VALUES = 2_000_000  # in a checkpoint; more are a pickle that refers to itself again and again


# ------------------------------------------------------------------------------ the backbone


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q kᵀ / √d) v in each head, then a linear mix."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, N, dim) -> (B, heads, N, d)

    def queries_keys_values(self, x, queries=None):
        """q of the first `queries` tokens (None: of all), k and v of every token."""
        if queries is None:
            q, k, v = self.qkv(x).chunk(3, dim=-1)
        else:  # the rows of the fused weight are [q; k; v]
            dim = x.shape[-1]
            q = F.linear(x[:, :queries], self.qkv.weight[:dim], self.qkv.bias[:dim])
            k, v = F.linear(x, self.qkv.weight[dim:], self.qkv.bias[dim:]).chunk(2, dim=-1)
        return self.split_heads(q), self.split_heads(k), self.split_heads(v)

    def forward(self, x, queries=None):
        q, k, v = self.queries_keys_values(x, queries)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[-2] <= 256:
            x = attention_weights(q, k) @ v  # on the way back the fused kernel takes 3 to 5 times as long here
        else:
            x = F.scaled_dot_product_attention(q, k, v)  # fused: the weights are never written out
        return self.proj(x.transpose(1, 2).flatten(2))  # (B, queries, dim)

    def attention_map(self, x, queries=None):
        """How much each of the first `queries` tokens looks at each token, (B, heads, queries, N)."""
        q, k, _ = self.queries_keys_values(x, queries)
        return attention_weights(q, k)


def attention_weights(q, k):
    """softmax(q kᵀ / √d): (B, heads, queries, d), (B, heads, N, d) -> (B, heads, queries, N)."""
    return (q / math.sqrt(q.shape[-1]) @ k.mT).softmax(dim=-1)


class MLP(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block. With `queries` = n only the first n tokens come out."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = MLP(dim, 4 * dim)

    def forward(self, x, queries=None):
        x = x[:, :queries] + self.attn(self.norm1(x), queries)
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, dim):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).mT  # (B, 3, H, W) -> (B, patches, dim), row by row


class VisionTransformer(nn.Module):
    """ViT backbone; the defaults are the paper's ViT-S/8 (section III).

    Args:
        patch_size: side of a patch in pixels.
        dim, depth, heads: width, number of blocks, attention heads a block.
        pos_size: the image side in pixels whose patch grid `pos_embed` stores. Images of any
            other size that the patch size divides get positions interpolated from it.
        init_std: of the random weights of linear layers; 0.02 is DINO's. None is 1/√(inputs of
            the layer): in a narrow network 0.02 is next to nothing, and training takes long
            to begin.

    Raises ValueError if `heads` does not divide `dim` or `patch_size` not `pos_size`.
    """

    def __init__(self, patch_size=8, dim=384, depth=12, heads=6, pos_size=224, init_std=0.02):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads {heads} must divide the width {dim}: {divisors(dim)} do")
        if pos_size % patch_size:
            raise ValueError(f"image size {pos_size} is not divisible by the patch size {patch_size}")
        self.patch_size, self.dim, self.depth, self.heads = patch_size, dim, depth, heads
        self.grid = pos_size // patch_size
        self.checkpoint_blocks = False  # True: activations are computed again on the way back, not kept
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid**2, dim))
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        init_linear(self, init_std)

    def positions(self, rows, columns):
        """`pos_embed` for a grid of rows × columns patches, (1, 1 + rows·columns, dim)."""
        if rows == columns == self.grid:
            return self.pos_embed
        cls_pos, patch_pos = self.pos_embed[:, :1], self.pos_embed[:, 1:]
        patch_pos = patch_pos.mT.unflatten(2, (self.grid, self.grid))  # (1, dim, grid, grid)
        # DINO's weights were trained with bicubic interpolation by the *scale* (n + 0.1)/grid,
        # whose 0.1 guards against rounding; asking for size=(rows, columns) is off by up to 0.03.
        scale = ((rows + 0.1) / self.grid, (columns + 0.1) / self.grid)
        patch_pos = F.interpolate(patch_pos, scale_factor=scale, mode="bicubic")
        return torch.cat([cls_pos, patch_pos.flatten(2).mT], dim=1)

    def embed(self, images):
        """Images (B, 3, H, W) to tokens (B, 1 + patches, dim), [CLS] first."""
        rows, columns = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        if images.shape[-2] % self.patch_size or images.shape[-1] % self.patch_size:
            raise ValueError(
                f"image size {images.shape[-2]}×{images.shape[-1]} is not divisible by the "
                f"patch size {self.patch_size}"
            )
        patches = self.patch_embed(images)
        cls_token = self.cls_token.expand(len(images), -1, -1)
        return torch.cat([cls_token, patches], dim=1) + self.positions(rows, columns)

    def forward(self, images):
        """Images (B, 3, H, W), normalised, to the [CLS] feature (B, dim)."""
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpoint_blocks else block(x)
        x = self.blocks[-1](x, queries=1)  # nothing reads the patch tokens after the last block
        return self.norm(x)[:, 0]

    def last_attention(self, images, queries=None):
        """Attention of the last block, (B, heads, queries, 1 + patches), rows summing to 1.

        Entry (b, h, i, j) is how much token i looks at token j in head h; token 0 is [CLS],
        patches follow row by row. `queries=1` computes the [CLS] row alone, which is all that
        the paper's figures show, at 1/N of the memory.
        """
        x = self.embed(images)
        for block in self.blocks[:-1]:
            x = block(x)
        last = self.blocks[-1]
        return last.attn.attention_map(last.norm1(x), queries)


def init_linear(network, std):
    """Truncated normal weights of that std (None: 1/√inputs), zero biases, in all linear layers."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=std or module.in_features**-0.5)
            nn.init.zeros_(module.bias)


def divisors(n):
    return ", ".join(str(d) for d in range(1, n + 1) if n % d == 0)


# ---------------------------------------------------------------------- the projection head


class ProjectionHead(nn.Module):
    """From the [CLS] feature (B, dim) to the space where the loss lives (DINO's head).

    An MLP to a bottleneck, L2-normalised: (B, bottleneck_dim), what the NCE loss compares. With
    `out_dim` = K a weight-normalised layer follows: (B, K), the logits of the DINO loss.

    Args:
        dim: width of the feature.
        hidden_dim, layers, bottleneck_dim: of the MLP; the defaults are DINO's.
        norm: a LayerNorm after each hidden layer. DINO's head has none; trained from random
            weights such a head hardly leaves the loss of chance. Never a batch norm: with it
            the gradient of a batch is not the sum of the gradients of its pieces.
        init_std: as of VisionTransformer.
    """

    def __init__(self, dim, out_dim=None, hidden_dim=2048, layers=3, bottleneck_dim=256, norm=False, init_std=0.02):
        super().__init__()
        mlp, width = [], dim
        for _ in range(layers - 1):
            mlp.append(nn.Linear(width, hidden_dim))
            if norm:
                mlp.append(nn.LayerNorm(hidden_dim, eps=1e-6))
            mlp.append(nn.GELU())
            width = hidden_dim
        self.mlp = nn.Sequential(*mlp, nn.Linear(width, bottleneck_dim))
        init_linear(self.mlp, init_std)
        self.last_layer = Prototypes(bottleneck_dim, out_dim) if out_dim else nn.Identity()

    def forward(self, x):
        return self.last_layer(F.normalize(self.mlp(x), dim=-1))


class Prototypes(nn.Module):
    """DINO's last layer: cosine of the input with each of K directions, the rows of weight_v.

    `weight_g`, the length given back to each direction, stays 1 as in DINO's default; it is
    kept as a buffer for the name's sake.
    """

    def __init__(self, dim, out_dim):
        super().__init__()
        self.weight_v = nn.Parameter(torch.empty(out_dim, dim))
        self.register_buffer("weight_g", torch.ones(out_dim, 1))
        nn.init.kaiming_uniform_(self.weight_v, a=math.sqrt(5))

    def forward(self, x):
        # The logits are scaled rather than the weights: K·dim numbers less to write and read, twice.
        return F.linear(x, self.weight_v) * (self.weight_g[:, 0] / self.weight_v.norm(dim=-1))  # (B, K)


class Network(nn.Module):
    """Backbone and head under the names DINO's scripts expect: `backbone.…`, `head.…`."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images):
        return self.head(self.backbone(images))


def build_backbone(config):
    """The backbone of `build_network(config)` alone."""
    c = config
    torch.manual_seed(c["seed"])
    return VisionTransformer(c["patch_size"], c["dim"], c["depth"], c["heads"], c["pos_size"], c["init_std"])


def build_network(config):
    """The student of a run, at its first step: random weights that `config["seed"]` decides.

    `config` is the dict of settings that train.py makes and a checkpoint holds.
    """
    c, backbone = config, build_backbone(config)
    out_dim = c["out_dim"] if c["loss"] == "dino" else None
    head = ProjectionHead(
        c["dim"], out_dim, c["head_hidden_dim"], c["head_layers"], c["bottleneck_dim"], c["head_norm"], c["init_std"]
    )
    return Network(backbone, head)


# ------------------------------------------------------------------------------- the weights


def dino_file(name="dino"):
    """Path of DINO's weights of that name in torch.hub's folder, downloaded if they are not there.

    The file gets its name only when all its bytes have come, so one that is there is whole.
    Raises OSError, with the ways out, if it cannot be had.
    """
    file = DINO_FILES[name]
    size = DINO_BYTES.get(file)
    path = os.path.join(torch.hub.get_dir(), "checkpoints", f"{file}.pth")
    if os.path.exists(path):
        if size and os.path.getsize(path) != size:
            raise OSError(
                f"--weights {name}: {path} has {os.path.getsize(path):,} bytes, not the {size:,} of "
                "DINO's: delete it, so that it is fetched again"
            )
        return path
    print(f"fetching DINO's weights to {path}", flush=True)
    silence = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NO_ANSWER_SECONDS)
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(path), prefix=".part-") as folder:  # its own, of two at once
            part = os.path.join(folder, file)
            torch.hub.download_url_to_file(f"{DINO_HOST}/{file}/{file}.pth", part)
            if size and os.path.getsize(part) != size:
                raise OSError(f"{os.path.getsize(part):,} bytes came, {size:,} were expected")
            if not size:
                backbone_weights(read_checkpoint(part), "what came")  # raises for one that was cut off
            os.replace(part, path)
    except (OSError, ValueError, http.client.HTTPException) as error:  # urllib's errors are OSErrors
        host = urllib.parse.urlparse(DINO_HOST).netloc
        raise OSError(
            f"--weights {name}: could not be fetched from {host} ({error}); use --weights none for "
            "random weights, or --weights FILE with a copy of the file"
        ) from error
    finally:
        socket.setdefaulttimeout(silence)
    return path


def read_checkpoint(path):
    """The content of a .pth file, read without running any code that it may hold.

    Beside tensors and plain Python values only the names that DINO's full checkpoints need are
    allowed: `argparse.Namespace` and numpy scalars. It takes no more memory than the file is large.
    What has a "digest" must agree with it. Raises OSError or ValueError in one line.
    """
    scalar = np.float64(0).__reduce__()[0]
    allowed = [argparse.Namespace, np.dtype, type(np.dtype("f4")), type(np.dtype("f8")), type(np.dtype("i8"))]
    # numpy 1 and 2 have the constructor of scalars under different names
    allowed += [(scalar, "numpy.core.multiarray.scalar"), (scalar, "numpy._core.multiarray.scalar")]
    if not os.path.isfile(path):
        what = "is a folder" if os.path.isdir(path) else "no such file"
        raise FileNotFoundError(f"{path}: {what}; a .pth file with a ViT's weights is wanted")
    try:
        bomb = unpacked_bytes(path) > os.path.getsize(path)  # torch.save does not compress
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says it in one line
            content = None if bomb else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises many kinds for a file that is not its own
        kind = type(error).__name__
        raise ValueError(
            f"{path} is not a PyTorch checkpoint, is cut off, or holds more than weights ({kind}); "
            "one that torch.save wrote, of tensors and plain values, is wanted"
        ) from error
    if bomb:
        raise ValueError(f"{path} would unpack to more than it is: torch.save wrote no such file")
    check_tensors(content, path)
    if isinstance(content, dict) and "digest" in content and digest(content) != content["digest"]:
        raise ValueError(f"{path} is damaged: its content does not match its digest; another copy of it may")
    return content


def backbone_weights(checkpoint, path):
    """The backbone's state dict, in DINO's names, out of what `read_checkpoint` returned.

    Takes a bare state dict, DINO's full checkpoints and ours; of student and teacher the
    teacher. The prefixes `module.` and `backbone.` are stripped, heads left out. Raises ValueError
    unless they are the finite weights of one ViT, whose size `shape_of` then tells.
    """
    for key in ("teacher", "student"):
        if isinstance(checkpoint, dict) and isinstance(checkpoint.get(key), dict):
            checkpoint = checkpoint[key]
            break
    weights = {}
    for name, value in checkpoint.items() if isinstance(checkpoint, dict) else []:
        if isinstance(name, str) and isinstance(value, torch.Tensor):
            name = name.removeprefix("module.").removeprefix("backbone.")
            if not name.startswith(("head.", "projection_head.", "prototypes.")):
                weights[name] = value
    for name, shape in (
        ("cls_token", "(1, 1, dim)"), ("pos_embed", "(1, 1 + patches, dim)"), ("patch_embed.proj.weight", "(dim, 3, p, p)")
    ):
        least = [1, 2, 1] if name == "pos_embed" else [1] * (shape.count(",") + 1)
        own = weights[name].shape if name in weights else ()
        if len(own) != len(least) or any(side < few for side, few in zip(own, least)):
            raise ValueError(f"{path} holds no Vision Transformer: there is no {name} of shape {shape}")
    if not any(name.startswith("blocks.") for name in weights):
        raise ValueError(f"{path} holds no Vision Transformer: there are no blocks.0, blocks.1, …")
    with torch.device("meta"):  # takes no memory: nothing is built to sizes that the weights do not have throughout
        check_fit(VisionTransformer(**shape_of(weights), heads=1), weights, path)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in weights.values()}
    if sum(value.nbytes for value in weights.values()) > sum(storages.values()):
        raise ValueError(f"{path} holds the same numbers under several names: every weight needs its own")
    for name, value in weights.items():
        if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"{path}: {name} is of {value.dtype}; floating point numbers of 16 to 64 bits are wanted")
        if not value.float().isfinite().all():
            raise ValueError(f"{path}: {name} is not finite: its training diverged, or it is damaged")
    return weights


def check_fit(backbone, weights, path):
    """ValueError if names and shapes of `weights` are not those of `backbone`."""
    own = backbone.state_dict()
    for name in own | weights:
        shown = ascii(name)[1:-1][:80]  # a file may hold any name, line breaks too
        if name not in weights or name not in own:
            where = "has no" if name not in weights else "has a surplus"
            raise ValueError(f"{path} {where} {shown}: it is no ViT of depth {backbone.depth} in DINO's names")
        if own[name].shape != weights[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {tuple(weights[name].shape)} where the model, patch size "
                f"{backbone.patch_size} and width {backbone.dim}, needs {tuple(own[name].shape)}"
            )


def load_backbone(backbone, weights, path):
    """Put `weights` (from `backbone_weights`) into `backbone`; ValueError if they do not fit."""
    check_fit(backbone, weights, path)
    backbone.load_state_dict(weights)


def shape_of(weights):
    """What the shapes of `backbone_weights` say of the ViT: patch_size, dim, depth, pos_size."""
    patch_size = weights["patch_embed.proj.weight"].shape[-1]
    return {
        "patch_size": patch_size,
        "dim": weights["cls_token"].shape[-1],
        "depth": len({name.split(".")[1] for name in weights if name.startswith("blocks.")}),
        "pos_size": math.isqrt(weights["pos_embed"].shape[1] - 1) * patch_size,
    }


def backbone_like(weights, path, heads):
    """A VisionTransformer with `weights` in it, its width, depth and patch read off their shapes."""
    backbone = VisionTransformer(**shape_of(weights), heads=heads)
    load_backbone(backbone, weights, path)
    return backbone


def heads_of(checkpoint, dim):
    """Heads a block that the weights were trained with: ours say, DINO's have one for every 64 of the width."""
    config = checkpoint.get("config")
    if not isinstance(config, dict) or "heads" not in config:
        return max(1, dim // 64)
    heads = config["heads"]
    if type(heads) is not int or heads < 1 or dim % heads:
        raise ValueError(f"the heads in the weights' settings do not divide their width {dim}: {divisors(dim)} do")
    return heads


def weights_file(source):
    """The file that `--weights` names: itself, or where one of DINO_FILES lies once it is downloaded."""
    return dino_file(source) if source in DINO_FILES else source


def read_weights(source):
    """What `--weights` names, one of DINO_FILES or a file: the backbone's state dict, and its heads.

    The number of heads does not show in the shapes, so any that divides the width loads; another
    one cuts q, k and v anew.
    """
    path = weights_file(source)
    checkpoint = read_checkpoint(path)
    weights = backbone_weights(checkpoint, path)
    return weights, heads_of(checkpoint, weights["cls_token"].shape[-1])


def load_pretrained(backbone, source):
    """Fill `backbone` from `--weights`; returns the number of heads that they were trained with."""
    weights, heads = read_weights(source)
    load_backbone(backbone, weights, f"--weights {source}")
    return heads


def find_device(name):
    """torch.device of `--device`; ValueError if this machine has no such thing."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"--device {name} is not to be had here ({reason}); --device cpu is") from error
    return device


# --------------------------------------------------------------- files, whole and harmless


@contextlib.contextmanager
def whole(path):
    """A name to write to in a `with` block; what lies there becomes `path` at its end, if nothing failed."""
    folder, name = os.path.split(path)
    part = os.path.join(folder, f".part-{name}")
    try:
        yield part
        os.replace(part, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(part)


def values(content, path="the checkpoint"):
    """Everything in nested dicts, lists and tuples, names too, in order, each of these before what it holds.

    Raises ValueError where there is no end to it, since a pickle can refer to its own parts.
    """
    left, count = [content], 0
    while left:
        value, count = left.pop(), count + 1
        value = vars(value) if isinstance(value, argparse.Namespace) else value
        if isinstance(value, dict):
            left.extend(reversed([part for pair in value.items() for part in pair]))
        elif isinstance(value, (list, tuple)):
            left.extend(reversed(value))
        if count + len(left) > MOST_VALUES:
            raise ValueError(f"{path} holds more than {MOST_VALUES:,} values, or some that hold themselves")
        yield value


def digest(content):
    """SHA-256, in hex, of all that a checkpoint holds but its own "digest": names, values and tensors, in order."""
    hasher = hashlib.sha256()
    for value in values({name: value for name, value in content.items() if name != "digest"}):
        if isinstance(value, torch.Tensor):
            hasher.update(f"{value.dtype} {tuple(value.shape)};".encode())
            hasher.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())  # no copy on a CPU
        elif isinstance(value, (dict, list, tuple)):
            hasher.update(f"{type(value).__name__} {len(value)};".encode())
        else:
            text = repr(value).encode()
            hasher.update(f"{len(text)} ".encode() + text)
    return hasher.hexdigest()


def check_tensors(content, path):
    """ValueError unless all tensors are plain ones and, together, as large as the file at most.

    Else one number could claim to be 10¹², and a first copy of it would take the machine's memory.
    """
    storages = {}
    for value in values(content, path):
        if isinstance(value, torch.Tensor):
            odd = value.is_quantized or value.is_conj() or value.is_neg()
            if value.layout != torch.strided or value.device.type != "cpu" or odd:
                raise ValueError(f"{path} holds a tensor that is no plain array of numbers ({value.layout}, {value.device})")
            storage = value.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
            if value.numel() * value.element_size() > storage.nbytes():
                raise ValueError(f"{path} holds a tensor of shape {tuple(value.shape)}, but not that many numbers")
        elif isinstance(value, (set, bytearray, torch.UntypedStorage, torch.storage.TypedStorage)):
            raise ValueError(f"{path} holds a {type(value).__name__}: tensors and plain values are wanted")
    if sum(storages.values()) > os.path.getsize(path):
        raise ValueError(f"{path} is damaged: its tensors are larger than the file")


def unpacked_bytes(path):
    """Bytes that a .pth file, a zip archive unless it is old, says its parts have."""
    with open(path, "rb") as file:
        if file.read(4) != b"PK\3\4":
            return 0
    with zipfile.ZipFile(path) as archive:
        return sum(part.file_size for part in archive.infolist())
