"""Augmentation of whole batches of decoded images, on the device where they lie.

Every random number is drawn beforehand, on the CPU, one row an image. A view is then a function of its image and its
row alone: it can be replayed, and is the same however a batch is divided over processes. Cropping, RandAugment and
random erasing follow timm, whose transforms do the same to one PIL image after another; where both are exact the grey
levels are the same. Geometric operations of RandAugment interpolate linearly.
"""

import math
import random

import numpy as np
import torch
from timm.data.auto_augment import RandAugment, rand_augment_transform
from torchvision.transforms.v2 import InterpolationMode, functional as F

from vitopt.recipe import Augment

LEVELS = 10.0  # timm's scale of magnitudes, and its upper bound where the policy names none
ATTEMPTS = 10  # at a box that lies within the image, as in timm
# what the highest level means: degrees, pixels a pixel, share of the side
GEOMETRIC = {"Rotate": 30.0, "ShearX": 0.3, "ShearY": 0.3, "TranslateXRel": 0.45, "TranslateYRel": 0.45}


def can(augment: Augment) -> bool:
    """Whether this module knows the policy: none, or RandAugment that draws its operations uniformly.

    Raises:
        AssertionError, ValueError: timm cannot read a policy that begins with rand.
    """
    if not augment.auto_augment:
        return True
    if not augment.auto_augment.startswith("rand"):
        return False
    policy = _policy(augment)
    known = all(op.name in GEOMETRIC or _base(op.name) in PIXELWISE for op in policy.ops)
    return known and policy.choice_weights is None


def draw(augment: Augment, count: int, height: int, width: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All random numbers of one view of each of `count` images.

    Args:
        augment: what `can` accepts.
        count: images of the batch over all processes together.
        height: of the images before they are cropped or resized, in pixels.
        width: the same.
        generator: of the CPU.

    Returns:
        Tensors of first dimension `count` on the CPU, so that {key: value[rows]} is a process's share.
    """
    def uniform(*shape):  # float64: floor(uniform * n) is never n
        return torch.rand(count, *shape, dtype=torch.float64, generator=generator)

    draws = {}
    if augment.crop == "pad":
        draws["shift"] = torch.randint(2 * augment.padding + 1, (count, 2), generator=generator)
    elif augment.crop == "resized":
        boxes, found = _boxes(uniform(2 * ATTEMPTS + 2), (augment.scale, 1.0), 4 / 3, (height, width), (height, width))
        sides = min(height, round(width * 4 / 3)), min(width, round(height * 4 / 3))
        centre = torch.tensor([(height - sides[0]) // 2, (width - sides[1]) // 2, *sides])
        draws["box"] = torch.where(found[:, None], boxes, centre)
    if augment.hflip:
        draws["flip"] = uniform() < augment.hflip
    if augment.auto_augment:
        policy = _policy(augment)
        first, layers = policy.ops[0], policy.num_layers
        operation = torch.randint(len(policy.ops), (count, layers), generator=generator)
        draws["operation"] = operation.where(uniform(layers) <= first.prob, -1)
        if first.magnitude_std == math.inf:
            level = uniform(layers) * first.magnitude
        else:
            noise = torch.randn(count, layers, dtype=torch.float64, generator=generator)
            level = first.magnitude + first.magnitude_std * noise
        draws["level"] = level.clamp(0, first.magnitude_max or LEVELS)
        draws["sign"] = torch.where(uniform(layers) > 0.5, -1.0, 1.0).double()
    if augment.random_erasing:
        draws["erase"] = uniform() < augment.random_erasing
        draws["hole"] = uniform(2 * ATTEMPTS + 2)  # a box only in `apply`, which knows the size of the view
    return draws


def apply(images: torch.Tensor, draws: dict[str, torch.Tensor], augment: Augment, mean: list[float], std: list[float],
          size: tuple[int, int]) -> torch.Tensor:
    """The views that were drawn: crop, flip, RandAugment, normalisation, random erasing, in timm's order.

    Args:
        images: uint8 (batch, 1 or 3, height, width), left as they are.
        draws: of `draw`, the rows of these images, on the CPU, where rows are chosen without waiting for a GPU.
        augment: that of `draw`.
        mean: of each channel, of values between 0 and 1.
        std: the same.
        size: height and width of the views.

    Returns:
        Float32 (batch, channels, *size), normalised.
    """
    if augment.crop == "resized":
        images = _crop_resized(images, draws["box"], size)
    else:
        images = _fit(images, size)
    if "shift" in draws or "flip" in draws:
        images = _shift_and_flip(images, draws.get("shift"), draws.get("flip"), augment.padding)
    if augment.auto_augment:
        images = _rand_augment(images, draws, [op.name for op in _policy(augment).ops], mean)
    views = _to_float(images, mean, std)
    if augment.random_erasing:
        _erase(views, draws["erase"], draws["hole"])
    return views


def seed_chance(seed: int) -> None:
    """Let this number of up to 64 bits decide what timm's and torchvision's transforms draw next in this process."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def normalise(images: torch.Tensor, mean: list[float], std: list[float], size: tuple[int, int]) -> torch.Tensor:
    """The plain view: resized to cover `size` (bicubic, antialiased) and cut at the centre where it is not so large.

    Args and result are those of `apply`.
    """
    return _to_float(_fit(images, size), mean, std)


def _policy(augment: Augment) -> RandAugment:
    return rand_augment_transform(augment.auto_augment)


def _base(name: str) -> str:
    return name.removesuffix("Increasing")  # only its levels differ


def _to_float(images: torch.Tensor, mean: list[float], std: list[float]) -> torch.Tensor:
    mean, std = (torch.tensor(values, device=images.device)[:, None, None] for values in (mean, std))
    return images.float().mul_(1 / (255 * std)).sub_(mean / std)


def _fit(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    if images.shape[-2:] == size:
        return images
    (height, width), (rows, columns) = images.shape[-2:], size
    wide = height * columns <= width * rows
    covering = (rows, width * rows // height) if wide else (height * columns // width, columns)
    return F.center_crop(F.resize(images, covering, InterpolationMode.BICUBIC, antialias=True), size)


def _shift_and_flip(images: torch.Tensor, shift: torch.Tensor | None, flip: torch.Tensor | None,
                    padding: int) -> torch.Tensor:
    """Windows of the images with a black border, `shift` (batch, 2) from its top and left, mirrored where `flip` says.

    Both in one gathering, as each pass over the pixels costs more than the indices.
    """
    height, width = images.shape[-2:]
    x, y = torch.arange(width, device=images.device), torch.arange(height, device=images.device)
    if flip is not None:
        x = torch.where(flip.to(images.device)[:, None], x.flip(0), x)
    if shift is not None:
        images = torch.nn.functional.pad(images, [padding] * 4)
        shift = shift.to(images.device)
        x, y = shift[:, 1:] + x, shift[:, :1] + y
    places = (y[..., :, None] * images.shape[-1] + x[:, None]).flatten(1)
    windows = images.flatten(2).gather(2, places[:, None].expand(-1, images.shape[1], -1))
    return windows.unflatten(2, (height, width))


def _crop_resized(images: torch.Tensor, box: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes (batch, 4: top, left, height, width) resampled to `size` as Pillow does it, bicubic and antialiased.

    In float64 and with halves well above the edge, so that no order of summation shows in the rounded result.
    """
    top, left, height, width = box.to(images.device).unbind(1)
    channels, rows, columns = images.shape[1:]
    half = 0.5 + 1e-6
    across = images.double().flatten(1, 2).bmm(_cubic_weights(left, width, columns, size[1]).mT)
    across.add_(half).floor_().clamp_(0, 255)  # as Pillow does between its passes
    across = across.unflatten(1, (channels, rows)).transpose(1, 2).flatten(2)  # (batch, rows, channels * size[1])
    resampled = _cubic_weights(top, height, rows, size[0]).bmm(across).add_(half).clamp_(0, 255).byte()
    return resampled.unflatten(2, (channels, size[1])).transpose(1, 2).contiguous()


def _cubic_weights(start: torch.Tensor, length: torch.Tensor, source: int, target: int) -> torch.Tensor:
    """(batch, target, source): share of each source pixel in each pixel of a stretch resampled to `target` pixels.

    Keys' kernel with a = -0.5, widened where the stretch is shrunk; pixels outside the stretch have no share.
    """
    start, length = start[:, None, None], length[:, None, None]
    place = torch.arange(source, device=start.device, dtype=torch.float64) + 0.5
    centre = (torch.arange(target, device=start.device, dtype=torch.float64)[:, None] + 0.5) * (length / target) + start
    x = ((place - centre) / (length / target).clamp(min=1)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    weight = weight * ((x < 2) & (place > start) & (place < start + length))
    return weight / weight.sum(2, keepdim=True)


def _boxes(uniform: torch.Tensor, area: tuple[float, float], ratio: float, sides: tuple[int, int],
           largest: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """For each image the first of ten random boxes that is not too large, and whether there is one.

    Args:
        uniform: (batch, 22) between 0 and 1: ten areas, ten ratios, the place from the top and from the left.
        area: least and greatest, as shares of the image.
        ratio: greatest of the sides to each other; their logarithm is uniform.
        sides: of the image, height and width in pixels.
        largest: sides of a box.

    Returns:
        (batch, 4) integers: top, left, height, width; and (batch,) booleans.
    """
    areas = (area[0] + (area[1] - area[0]) * uniform[:, :ATTEMPTS]) * sides[0] * sides[1]
    ratios = torch.exp((2 * uniform[:, ATTEMPTS:-2] - 1) * math.log(ratio))
    boxes = torch.stack([(areas * ratios).sqrt(), (areas / ratios).sqrt()], 2).round().clamp(min=1)
    fits = (boxes <= torch.tensor(largest)).all(2)
    boxes = boxes[torch.arange(len(boxes)), fits.int().argmax(1)]
    places = uniform[:, -2:] * (torch.tensor(sides) - boxes + 1)
    return torch.cat([places.floor(), boxes], 1).long(), fits.any(1)


def _erase(views: torch.Tensor, erase: torch.Tensor, hole: torch.Tensor) -> None:
    """Random erasing in place, zeros after normalisation: Zhong et al., 2020 (https://arxiv.org/abs/1708.04896)."""
    height, width = views.shape[-2:]
    boxes, found = _boxes(hole, (0.02, 1 / 3), 1 / 0.3, (height, width), (height - 1, width - 1))
    boxes = torch.where((erase & found)[:, None], boxes, 0).to(views.device)
    top, left, rows, columns = boxes[:, :, None].unbind(1)
    y, x = torch.arange(height, device=views.device), torch.arange(width, device=views.device)
    inside = ((y >= top) & (y < top + rows))[:, :, None] & ((x >= left) & (x < left + columns))[:, None]
    views.mul_((~inside)[:, None].float())  # a tenth of the time of masked_fill


def _rand_augment(images: torch.Tensor, draws: dict[str, torch.Tensor], names: list[str],
                  mean: list[float]) -> torch.Tensor:
    """RandAugment: Cubuk et al., 2020 (https://arxiv.org/abs/1909.13719), with timm's operations and levels."""
    images = images.clone()
    for operation, level, sign in zip(*(draws[key].unbind(1) for key in ("operation", "level", "sign"))):
        for index, name in enumerate(names):
            rows = (operation == index).nonzero()[:, 0]
            if name not in GEOMETRIC and len(rows):
                argument = _argument(name, level[rows], sign[rows]).to(images.device)[:, None, None, None]
                rows = rows.to(images.device)
                images[rows] = PIXELWISE[_base(name)](images[rows], argument)
        rows = sum(operation == names.index(name) for name in GEOMETRIC).nonzero()[:, 0]
        if len(rows):
            matrices = _matrices(operation[rows], level[rows] / LEVELS * sign[rows], names, *images.shape[-2:])
            rows = rows.to(images.device)
            images[rows] = _affine(images[rows], matrices, mean)
    return images


def _argument(name: str, level: torch.Tensor, sign: torch.Tensor) -> torch.Tensor:
    """What timm's level functions give to a pixelwise operation: bits, a threshold, an addend or a factor."""
    share, increasing = level / LEVELS, name.endswith("Increasing")
    if _base(name) == "Posterize":
        bits = (share * 4).int()
        return 4 - bits if increasing else bits
    if _base(name) == "Solarize":
        threshold = (share * 256).short().clamp(max=256)
        return 256 - threshold if increasing else threshold
    if name == "SolarizeAdd":
        return (share * 110).int().clamp(max=128).byte()
    return ((1 + sign * (share * 0.9)).clamp(min=0.1) if increasing else share * 1.8 + 0.1).float()


def _matrices(operation: torch.Tensor, amount: torch.Tensor, names: list[str], height: int, width: int) -> torch.Tensor:
    """(batch, 6) as Pillow's AFFINE takes them: from a place in the result, in pixels, to one in the image."""
    def part(name):
        return torch.where(operation == names.index(name), amount * GEOMETRIC[name], 0.0)

    angle = -torch.deg2rad(part("Rotate"))
    cos, sin = angle.cos(), angle.sin()
    x, y = width / 2, height / 2  # rotation is about the centre, shear about the corner
    return torch.stack([
        cos, sin + part("ShearX"), x - cos * x - sin * y + part("TranslateXRel") * width,
        part("ShearY") - sin, cos, y + sin * x - cos * y + part("TranslateYRel") * height], 1)


def _affine(images: torch.Tensor, matrices: torch.Tensor, mean: list[float]) -> torch.Tensor:
    """Images through their matrices; what comes from outside has the mean colour."""
    height, width = images.shape[-2:]
    a, b, c, d, e, f = matrices.float().to(images.device)[:, :, None, None].unbind(1)
    x = torch.arange(width, device=images.device) + 0.5
    y = torch.arange(height, device=images.device)[:, None] + 0.5
    x, y = a * x + b * y + c, d * x + e * y + f
    outside = (x < 0) | (x >= width) | (y < 0) | (y >= height)
    grid = torch.stack([x * (2 / width) - 1, y * (2 / height) - 1], 3)
    moved = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    fill = torch.tensor([min(255, round(255 * value)) for value in mean], dtype=torch.uint8, device=images.device)
    # Pillow cuts fractions off; the little more keeps whole numbers whole
    return torch.where(outside[:, None], fill[:, None, None], moved.add_(1e-3).byte())


def _autocontrast(images: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
    low, high = torch.aminmax(images.flatten(2), dim=2)
    low, high = low.double()[..., None, None], high.double()[..., None, None]
    scale = torch.where(high > low, 255 / (high - low), 1.0)
    return (images * scale - torch.where(high > low, low, 0.0) * scale).clamp_(0, 255).byte()


def _grey(images: torch.Tensor) -> torch.Tensor:
    """(batch, 1, height, width) int32, in the fixed-point numbers of Pillow."""
    if images.shape[1] == 1:
        return images.int()
    red, green, blue = images.int().split(1, 1)
    return (red * 19595 + green * 38470 + blue * 7471 + 2 ** 15) >> 16


def _blend(degenerate: torch.Tensor | int, images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Pillow's ImageEnhance: away from the degenerate image with factors above 1, towards it below."""
    return (degenerate + factor * (images.short() - degenerate)).clamp_(0, 255).byte()


def _contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    grey, pixels = _grey(images), images[0, 0].numel()
    return _blend((2 * grey.sum((2, 3), keepdim=True) + pixels) // (2 * pixels), images, factor)


def _sharpness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """The degenerate image is smoothed by 3 by 3 pixels, all of weight 1 but the middle of 5; its border is not."""
    smooth = images.short()
    total = smooth[:, :, :-2] + smooth[:, :, 1:-1] + smooth[:, :, 2:]
    total = total[..., :-2] + total[..., 1:-1] + total[..., 2:] + 4 * smooth[:, :, 1:-1, 1:-1]
    smooth[:, :, 1:-1, 1:-1] = (total + 6) // 13  # rounded
    return _blend(smooth, images, factor)


PIXELWISE = {
    "AutoContrast": _autocontrast,
    "Equalize": lambda images, _: F.equalize(images),
    "Invert": lambda images, _: ~images,
    "Posterize": lambda images, bits: images & (256 - 2 ** (8 - bits).clamp(0, 8)).byte(),
    "Solarize": lambda images, threshold: torch.where(images < threshold, images, ~images),
    "SolarizeAdd": lambda images, addend: torch.where(images < 128, images + addend, images),
    "Color": lambda images, factor: _blend(_grey(images), images, factor),
    "Contrast": _contrast,
    "Brightness": lambda images, factor: _blend(0, images, factor),
    "Sharpness": _sharpness,
}
