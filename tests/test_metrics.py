import time

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vitopt import metrics, model as models, pruning
from vitopt.errors import InputError
from vitopt.recipe import Model, Prune

BASELINE = Model(name="vit_base_patch16_224", img_size=32, patch_size=4, embed_dim=512, depth=6, num_heads=8,
                 mlp_ratio=1.0, qkv_bias=False)


def closed_form_macs(model):
    """Of a columnar Vision Transformer with a class token, from its widths alone."""
    size, embed_dim = model.architecture["input"], model.embed_dim
    patch = model.patch_embed.patch_size[0]
    patches = (size["height"] // patch) * (size["width"] // patch)
    tokens = patches + 1
    macs = patches * patch ** 2 * size["channels"] * embed_dim + embed_dim * models.num_classes(model)
    for width in models.widths(model).values():
        if "head_dim" in width:
            inner = width["num_heads"] * width["head_dim"]
            macs += tokens * embed_dim * 4 * inner + 2 * tokens ** 2 * inner
        elif "hidden_features" in width:
            macs += 2 * tokens * embed_dim * width["hidden_features"]
    return macs


def closed_form_params(model):
    size, embed_dim = model.architecture["input"], model.embed_dim
    patch = model.patch_embed.patch_size[0]
    tokens = (size["height"] // patch) * (size["width"] // patch) + 1
    params = patch ** 2 * size["channels"] * embed_dim + embed_dim  # patch embedding
    params += embed_dim + tokens * embed_dim + 2 * embed_dim  # class token, positions, last norm
    params += (embed_dim + 1) * models.num_classes(model)
    for width in models.widths(model).values():
        if "head_dim" in width:
            params += embed_dim * 4 * width["num_heads"] * width["head_dim"] + embed_dim  # no qkv bias
        elif "hidden_features" in width:
            params += 2 * embed_dim * width["hidden_features"] + width["hidden_features"] + embed_dim
    return params + 4 * embed_dim * len(model.blocks)  # norms


@pytest.fixture(scope="module", params=[0.0, 0.4])
def baseline(request):
    torch.manual_seed(0)
    model = models.build(BASELINE, 10).eval()
    if request.param:
        pruning.prune(model, Prune(ratio=request.param, importance="l2"))
    return model


def test_macs_equal_the_closed_form_and_torchs_own_counter(baseline):
    macs = metrics.count_macs(baseline)
    assert macs == closed_form_macs(baseline)
    for block in baseline.blocks:
        block.attn.fused_attn = False
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        baseline(models.example_input(baseline))
    assert macs == metrics.count_macs(baseline) == counter.get_total_flops() / 2


def test_parameters_equal_the_closed_form(baseline):
    assert metrics.count_params(baseline) == closed_form_params(baseline)


def test_the_baseline_for_cifar10_has_the_published_counts():
    model = models.build(BASELINE, 10)
    assert (metrics.count_params(model), metrics.count_macs(model)) == (9_523_722, 640_953_344)


class Slow(nn.Module):
    """Takes a known time a call."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def forward(self, images):
        time.sleep(self.seconds)
        return images


def test_the_quietest_window_is_taken_where_the_machine_was_disturbed():
    calm = [0.002] * 60
    assert metrics._quietest([0.009] * 75 + calm + [0.010] * 90) == [0.002] * 50


def test_latency_and_throughput_of_a_model_of_known_speed(monkeypatch):
    monkeypatch.setattr(metrics, "WARMUP_SECONDS", 0.05)
    monkeypatch.setattr(metrics, "LATENCY_SECONDS", 0.5)
    monkeypatch.setattr(metrics, "THROUGHPUT_SECONDS", 0.2)
    model = Slow(0.005)
    latencies = metrics._latencies(model, torch.zeros(1, 1))
    # a busy machine wakes a sleeper late, never early
    assert len(latencies) >= 50 and 0.005 <= min(latencies) and sorted(metrics._quietest(latencies))[25] < 0.025
    assert 0.2 * 8 / 0.005 < metrics._throughput(model, torch.zeros(8, 1)) <= 8 / 0.005


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model of about 40 MB and its numbers from a fresh process."""
    folder = tmp_path_factory.mktemp("measured")
    torch.manual_seed(0)
    model = models.build(Model(**BASELINE.model_dump() | {"img_size": 16}), 10).eval()
    models.save(model, folder)
    ballast = torch.ones(300_000_000 // 4)  # 300 MB in this process that must not show
    numbers = metrics.measure_apart(folder, torch.device("cpu"))
    del ballast
    return folder, model, numbers


def test_size_is_four_bytes_a_parameter_and_a_header(measured):
    folder, model, numbers = measured
    weights = 4 * metrics.count_params(model) / 1e6
    assert weights < numbers["model_size_mb"] < weights + 0.02
    assert numbers["model_size_mb"] == (folder / "model.safetensors").stat().st_size / 1e6


def test_memory_is_that_of_the_model_and_its_activations_as_torchs_profiler_sees_them(measured):
    _, model, numbers = measured
    batch = models.example_input(model, numbers["batch_size"])
    with torch.profiler.profile(profile_memory=True) as profile, torch.inference_mode():
        model(batch)
    held = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    assert peak > 0
    expected = (4 * metrics.count_params(model) + batch.numel() * 4 + peak) / 1e6
    # what the C allocator keeps of freed pages and the kernels' own buffers come on top
    assert 0.9 * expected < numbers["peak_memory_mb"] < 2 * expected + 20, (expected, numbers["peak_memory_mb"])


def test_every_number_says_how_it_was_measured(measured):
    _, model, numbers = measured
    assert numbers["device"] == "cpu" and numbers["threads"] >= 1 and numbers["precision"] == "float32"
    assert numbers["power_source"] in ("measured", "estimated") and numbers["memory_source"]
    assert numbers["params"] == metrics.count_params(model) and numbers["macs"] == metrics.count_macs(model)
    assert 0 < numbers["latency_ms"] <= numbers["latency_p95_ms"]


def test_energy_of_a_thousand_images_is_power_times_their_time(measured):
    _, _, numbers = measured
    reading = numbers["inference"]
    parts = reading["cpu_kwh"] + reading["gpu_kwh"] + reading["ram_kwh"]
    assert reading["energy_kwh"] == pytest.approx(parts)
    assert reading["energy_kwh"] * 3.6e6 == pytest.approx(numbers["power_w"] * reading["seconds"], rel=0.3)
    expected = 1000 * numbers["power_w"] * reading["seconds"] / reading["images"]
    assert numbers["energy_j_per_1k_images"] == pytest.approx(expected, rel=0.3)
    # the best window is no slower than the average of the energy's
    assert reading["images"] / reading["seconds"] < 1.2 * numbers["images_per_second"]


def test_a_model_that_cannot_be_measured_ends_in_one_line(tmp_path):
    with pytest.raises(InputError, match="measuring on cpu failed: .*holds no model"):
        metrics.measure_apart(tmp_path, torch.device("cpu"))
