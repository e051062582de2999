import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import LEVEL_TO_ARG, NAME_TO_OP
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import functional as pil_functional

from vitopt import augmentation
from vitopt.recipe import Augment

MEAN, STD = [0.5, 0.4, 0.3], [0.25, 0.2, 0.3]
RAND = "rand-m9-mstd0.5-inc1"
EVERYTHING = Augment(crop="pad", hflip=0.5, auto_augment=RAND, random_erasing=0.5)
NAMES = sorted(set(op.name for policy in ("rand-inc0", "rand-inc1")
                   for op in augmentation._policy(Augment(auto_augment=policy)).ops))
EXACT = ("AutoContrast", "Equalize", "Invert", "Posterize", "Solarize", "Contrast", "Brightness", "Color", "Sharpness")


@pytest.fixture
def images():
    """Smooth images of noise, as photographs are smooth; not square, one of little contrast and one of none."""
    def build(count=16, channels=3, height=24, width=32):
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, channels, 6, 8, generator=generator)
        smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic") * 255
        smooth += torch.randn(smooth.shape, generator=generator) * 3
        smooth[0] = smooth[0] / 4 + 100
        smooth[1] = 77
        return smooth.clamp(0, 255).byte()
    return build


def pil(image):
    """A (C, H, W) uint8 tensor as a PIL image."""
    return Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy())


def tensor(image):
    array = np.asarray(image)
    return torch.from_numpy(array.copy()).reshape(*array.shape[:2], -1).permute(2, 0, 1)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def views(images, augment, seed=0, size=None, channels=3):
    """Views as images again, 0…255, before they were normalised."""
    draws = augmentation.draw(augment, len(images), *images.shape[2:], seeded(seed))
    return greys(augmentation.apply(images, draws, augment, MEAN[:channels], STD[:channels],
                                    size or tuple(images.shape[2:])))


def greys(normalised):
    channels = normalised.shape[-3]
    return normalised * 255 * torch.tensor(STD[:channels])[:, None, None] \
        + 255 * torch.tensor(MEAN[:channels])[:, None, None]


def level_args(name, level, sign, monkeypatch):
    """What timm gives to its operation at this level, with its coin on the side of `sign`."""
    monkeypatch.setattr(random, "random", lambda: 0.9 if sign < 0 else 0.1)
    return LEVEL_TO_ARG[name](level, {}) if LEVEL_TO_ARG[name] else ()


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", NAMES)
def test_each_operation_at_each_level_does_what_timms_does_to_a_pil_image(images, name, channels, monkeypatch):
    batch = images(channels=channels)
    for level in (0.0, 1.0, 3.7, 5.0, 9.0, 9.99, 10.0):
        for sign in (1.0, -1.0):
            draws = {"operation": torch.zeros(len(batch), 1, dtype=torch.long),
                     "level": torch.full((len(batch), 1), level, dtype=torch.float64),
                     "sign": torch.full((len(batch), 1), sign, dtype=torch.float64)}
            names = [name, *(other for other in augmentation.GEOMETRIC if other != name)]
            before = batch.clone()
            ours = augmentation._rand_augment(batch, draws, names, MEAN[:channels])
            fill = tuple(round(255 * value) for value in MEAN[:channels])
            kwargs = {"fillcolor": fill, "resample": Image.Resampling.BILINEAR}
            args = level_args(name, level, sign, monkeypatch)
            theirs = torch.stack([tensor(NAME_TO_OP[name](pil(image), *args, **kwargs)) for image in batch])
            difference = (ours.short() - theirs.short()).abs()
            assert torch.equal(batch, before)  # the images given are left as they are
            if name.startswith(EXACT):
                assert difference.max() == 0, (level, sign)
            else:  # a place that rounding moves across the border of the image costs a whole pixel
                assert difference.float().mean() < 0.05 and (difference > 1).float().mean() < 0.002, (level, sign)


def test_each_image_has_its_own_operation_and_level_and_the_others_are_left_untouched(images, monkeypatch):
    batch, names = images(40), [op.name for op in augmentation._policy(EVERYTHING).ops]
    draws = augmentation.draw(EVERYTHING, 40, 24, 32, seeded())
    draws = {key: draws[key][:, :1] for key in ("operation", "level", "sign")}
    ours = augmentation._rand_augment(batch, draws, names, MEAN)
    kwargs = {"fillcolor": tuple(round(255 * value) for value in MEAN), "resample": Image.Resampling.BILINEAR}
    for row, (index, level, sign) in enumerate(zip(*(draws[key][:, 0].tolist() for key in draws))):
        if index < 0:
            assert torch.equal(ours[row], batch[row])
        else:
            args = level_args(names[index], level, sign, monkeypatch)
            theirs = tensor(NAME_TO_OP[names[index]](pil(batch[row]), *args, **kwargs))
            assert (ours[row].float() - theirs.float()).abs().mean() < 0.5


def test_a_level_above_ten_is_read_as_timm_reads_it(monkeypatch):
    draws = augmentation.draw(Augment(auto_augment="rand-m14-mstd3-mmax20"), 4000, 8, 8, seeded())
    assert draws["level"].max() == 20 and abs(draws["level"].mean() - 14) < 0.2
    for name in set(NAMES) - {"AutoContrast", "Equalize", "Invert"} - set(augmentation.GEOMETRIC):
        for level in np.linspace(0, 20, 41):
            for sign in (1.0, -1.0):
                ours = augmentation._argument(name, torch.tensor([level]), torch.tensor([sign]))
                assert ours.item() == pytest.approx(level_args(name, level, sign, monkeypatch)[0], rel=1e-6)


def test_a_shift_takes_the_window_that_torchvision_takes(images):
    batch, augment = images(), Augment(crop="pad", padding=3)
    draws = augmentation.draw(augment, len(batch), 24, 32, seeded())
    ours = greys(augmentation.apply(batch, draws, augment, MEAN, STD, (24, 32)))
    for image, view, (top, left) in zip(batch, ours, draws["shift"].tolist()):
        padded = pil_functional.pad(pil(image), 3)
        assert torch.equal(view.round().byte(), tensor(pil_functional.crop(padded, top, left, 24, 32)))
    shift = augmentation.draw(augment, 7000, 24, 32, seeded())["shift"]
    assert torch.allclose(torch.bincount(shift.flatten()) / 14000, torch.tensor(1 / 7), atol=0.015)


def test_a_flip_mirrors_the_shifted_window(images):
    batch = images()
    draws = augmentation.draw(Augment(crop="pad"), len(batch), 24, 32, seeded())
    draws["flip"] = torch.arange(len(batch)) % 2 == 0
    plain, flipped = (augmentation.apply(batch, draws | {"flip": flip}, Augment(crop="pad", hflip=0.5), MEAN, STD,
                                         (24, 32)) for flip in (torch.zeros_like(draws["flip"]), draws["flip"]))
    assert torch.equal(flipped[::2], plain[::2].flip(3)) and torch.equal(flipped[1::2], plain[1::2])
    only = views(batch, Augment(hflip=1.0))
    assert torch.equal(only.round().byte(), batch.flip(3))


@pytest.mark.parametrize("size", [(24, 32), (48, 40), (12, 16)])
def test_a_resized_crop_is_what_pillow_resamples(images, size):
    batch, augment = images(), Augment(crop="resized", scale=0.2)
    boxes = augmentation.draw(augment, len(batch), 24, 32, seeded())["box"]
    ours = views(batch, augment, size=size)
    for image, view, (top, left, height, width) in zip(batch, ours, boxes.tolist()):
        theirs = tensor(pil_functional.resized_crop(
            pil(image), top, left, height, width, size, pil_functional.InterpolationMode.BICUBIC))
        difference = (view - theirs).abs()
        assert difference.max() < 1.1 and difference.mean() < 0.01  # Pillow's weights are fixed-point numbers


@pytest.mark.parametrize("height,width,scale", [(24, 32, 0.08), (12, 40, 0.5), (40, 12, 0.5)])
def test_boxes_of_resized_crops_are_distributed_as_timms(height, width, scale):
    """Also where few attempts fit and the centre is taken."""
    count = 4000
    ours = augmentation.draw(Augment(crop="resized", scale=scale), count, height, width, seeded())["box"].numpy()
    random.seed(0)
    image = Image.new("L", (width, height))
    theirs = np.array([RandomResizedCropAndInterpolation.get_params(image, (scale, 1.0), (3 / 4, 4 / 3))
                       for _ in range(count)])
    assert same_distribution(ours, theirs)
    assert (ours[:, :2] >= 0).all() and (ours[:, :2] + ours[:, 2:] <= (height, width)).all()


def same_distribution(ours, theirs):
    """Whether every column has about the same quantiles' shares: Kolmogorov and Smirnov's distance, 0.1 % level."""
    for a, b in zip(ours.T, theirs.T):
        values = np.unique(np.concatenate([a, b]))
        distance = np.abs(np.searchsorted(np.sort(a), values, "right") / len(a)
                          - np.searchsorted(np.sort(b), values, "right") / len(b)).max()
        if distance > 1.95 * np.sqrt(1 / len(a) + 1 / len(b)):
            return False
    return True


@pytest.mark.parametrize("height,width", [(32, 32), (16, 40)])
def test_erased_boxes_are_distributed_as_timms(height, width):
    count = 4000
    augment = Augment(random_erasing=1.0)
    white = torch.full((count, 1, height, width), 255, dtype=torch.uint8)
    draws = augmentation.draw(augment, count, height, width, seeded())
    ours = augmentation.apply(white, draws, augment, [0.5], [0.5], (height, width)) == 0
    random.seed(0)
    theirs = RandomErasing(1.0, device="cpu")(torch.ones(count, 1, height, width)) == 0
    boxes = []
    for erased in (ours[:, 0], theirs[:, 0]):
        rows, columns = erased.any(2).int(), erased.any(1).int()
        assert torch.equal(erased.sum((1, 2)), rows.sum(1) * columns.sum(1))  # one whole box, or none
        boxes.append(torch.stack([rows.argmax(1), columns.argmax(1), rows.sum(1), columns.sum(1),
                                  erased.sum((1, 2))], 1).numpy())
    assert same_distribution(*boxes)
    assert (boxes[0][:, 2:4].max(0) == boxes[1][:, 2:4].max(0)).all()  # no side is erased from end to end


def test_only_images_that_were_drawn_are_erased_and_nothing_around_the_box_changes(images):
    batch, augment = images(64), Augment(random_erasing=0.5)
    draws = augmentation.draw(augment, 64, 24, 32, seeded())
    ours = augmentation.apply(batch, draws, augment, MEAN, STD, (24, 32))
    changed = (ours != augmentation.normalise(batch, MEAN, STD, (24, 32))).any(1)
    assert torch.equal(changed.any(2).any(1), draws["erase"])
    assert (ours.movedim(1, 3)[changed] == 0).all()


def test_flips_operations_and_levels_are_as_frequent_as_the_recipe_says():
    draws = augmentation.draw(Augment(hflip=0.3, auto_augment=RAND, random_erasing=0.2), 20000, 32, 32, seeded())
    assert abs(draws["flip"].double().mean() - 0.3) < 0.015
    assert abs(draws["erase"].double().mean() - 0.2) < 0.015
    shares = torch.bincount(draws["operation"].flatten() + 1, minlength=16) / 40000
    assert abs(shares[0] - 0.5) < 0.015 and (shares[1:] - 0.5 / 15).abs().max() < 0.005
    assert abs(draws["sign"].mean()) < 0.02 and draws["sign"].abs().eq(1).all()
    random.seed(0)
    theirs = np.array([[min(10.0, max(0.0, random.gauss(9, 0.5)))] for _ in range(20000)])
    assert same_distribution(draws["level"][:, :1].numpy(), theirs)
    uniform = augmentation.draw(Augment(auto_augment="rand-m8-mstd101-p1-n3"), 5000, 32, 32, seeded())
    assert uniform["level"].shape == (5000, 3) and (uniform["operation"] >= 0).all()
    assert same_distribution(uniform["level"][:, :1].numpy(), np.random.default_rng(0).uniform(0, 8, (5000, 1)))
    assert (augmentation.draw(Augment(auto_augment="rand-m6"), 50, 32, 32, seeded())["level"] == 6).all()


@pytest.mark.parametrize("augment", [EVERYTHING, EVERYTHING.model_copy(update={"crop": "resized"}),
                                     EVERYTHING.model_copy(update={"crop": None})])
@pytest.mark.parametrize("channels", [3, 1])
def test_a_view_depends_on_its_own_row_alone(images, augment, channels):
    batch = images(64, channels)
    draws = augmentation.draw(augment, 64, 24, 32, seeded())
    assert all(len(value) == 64 for value in draws.values())
    for size in ((24, 32), (32, 32)):
        whole = augmentation.apply(batch, draws, augment, MEAN[:channels], STD[:channels], size)
        assert whole.shape == (64, channels, *size) and whole.dtype == torch.float32 and whole.isfinite().all()
        for rows in (slice(0, 32), slice(32, 64), slice(5, 6), torch.tensor([40, 3, 17])):
            part = augmentation.apply(batch[rows], {key: value[rows] for key, value in draws.items()}, augment,
                                      MEAN[:channels], STD[:channels], size)
            assert torch.equal(part, whole[rows])


@pytest.mark.parametrize("crop", ["pad", "resized", None])
def test_nothing_but_the_draws_is_left_on_the_cpu_where_images_lie_elsewhere(crop):
    """The meta device refuses, as a GPU does, to be added to what lies on the CPU."""
    augment = EVERYTHING.model_copy(update={"crop": crop})
    draws = augmentation.draw(augment, 256, 24, 32, seeded())
    images = torch.empty(256, 3, 24, 32, dtype=torch.uint8, device="meta")
    for size in ((24, 32), (32, 32)):
        result = augmentation.apply(images, draws, augment, MEAN, STD, size)
        assert result.device.type == "meta" and result.shape == (256, 3, *size)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("crop", ["pad", "resized", None])
def test_a_gpu_gives_the_view_of_the_cpu(images, crop):
    augment, batch = EVERYTHING.model_copy(update={"crop": crop}), images(256)
    draws = augmentation.draw(augment, 256, 24, 32, seeded())
    here, there = (augmentation.apply(batch.to(device), draws, augment, MEAN, STD, (24, 32)).cpu()
                   for device in ("cpu", "cuda"))
    assert ((greys(here) - greys(there)).abs() > 0.01).float().mean() < 0.002


def test_the_same_seed_gives_the_same_view_and_another_seed_another(images):
    batch = images()
    before = batch.clone()
    assert torch.equal(views(batch, EVERYTHING, 1), views(batch, EVERYTHING, 1))
    assert not torch.equal(views(batch, EVERYTHING, 1), views(batch, EVERYTHING, 2))
    assert torch.equal(batch, before)


@pytest.mark.parametrize("shape,size", [((24, 32), (24, 32)), ((24, 32), (16, 16)), ((20, 20), (28, 28)),
                                        ((33, 21), (24, 24)), ((24, 32), (16, 24))])
@pytest.mark.parametrize("channels", [3, 1])
def test_the_plain_view_is_timms_of_evaluation(images, shape, size, channels):
    batch = images(4, channels, *shape)
    mean, std = MEAN[:channels], STD[:channels]
    transform = create_transform((channels, *size), interpolation="bicubic", mean=mean, std=std, crop_pct=1.0)
    theirs = torch.stack([transform(pil(image)) for image in batch])
    ours = augmentation.normalise(batch, mean, std, size)
    assert (greys(ours) - greys(theirs)).abs().max() < (1.1 if shape != size else 1e-3)
    assert torch.equal(ours, augmentation.apply(batch, {}, Augment(), mean, std, size))


def test_policies_that_timm_accepts_and_this_module_does_not_are_told_apart():
    for policy in (None, "rand", RAND, "rand-m5-n3-p0.7-mstd101", "rand-m14-mmax20"):
        assert augmentation.can(Augment(auto_augment=policy)), policy
    for policy in ("original", "originalr", "v0", "v0r-mstd0.5", "3a", "augmix-m5-w4-d2", "rand-m9-tweights",
                   "rand-m9-t3a", "rand-m9-t3aw"):
        create_transform(8, is_training=True, auto_augment=policy)
        assert not augmentation.can(Augment(auto_augment=policy)), policy
    with pytest.raises(AssertionError):
        augmentation.can(Augment(auto_augment="rand-m9-wrong1"))
