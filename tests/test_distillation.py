import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.spatial.distance import pdist
from scipy.special import log_softmax, rel_entr, softmax
from scipy.stats import pearsonr, zscore
from torch.distributions import Categorical, kl_divergence as divergence

from vitopt import distillation
from vitopt.distillation import (
    attention_divergence,
    decoupled,
    dist,
    feature_distance,
    hard_label,
    kl_divergence,
    relational,
    standardized,
)

TARGETS = torch.tensor([0, 2, 4, 2, 1, 3])
LOGIT_LOSSES = {"kl_divergence": lambda student, teacher: kl_divergence(student, teacher, 2.0),
                "hard_label": hard_label,
                "decoupled": lambda student, teacher: decoupled(student, teacher, TARGETS, 2.0),
                "dist": lambda student, teacher: dist(student, teacher, 2.0),
                "standardized": lambda student, teacher: standardized(student, teacher, 2.0)}
LOSSES = LOGIT_LOSSES | {
    "feature_distance": feature_distance,
    "relational": relational,
    "attention_divergence": lambda student, teacher: attention_divergence(
        *(x.float().softmax(dim=-1).expand(2, 3, -1, -1) for x in (student, teacher)))}
# where a student agrees with its teacher; a hard label asks for more certainty still
AGREEABLE = LOSSES.keys() - {"hard_label"}
each = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
each_of_logits = pytest.mark.parametrize("loss", LOGIT_LOSSES.values(), ids=LOGIT_LOSSES)
each_agreeable = pytest.mark.parametrize("loss", [LOSSES[name] for name in sorted(AGREEABLE)], ids=sorted(AGREEABLE))


def pair(*shape, seed=0):
    """A student and a teacher."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator), 2 * torch.randn(*shape, generator=generator)


def gradient(loss, student, teacher):
    student = student.clone().requires_grad_()
    return torch.autograd.grad(loss(student, teacher), student)[0]


def close(loss, expected):
    torch.testing.assert_close(loss, torch.as_tensor(expected, dtype=torch.float32), rtol=1e-4, atol=1e-6)


def test_every_loss_stands_in_these_checks():
    assert LOSSES.keys() == {name for name, value in vars(distillation).items() if callable(value)}


@each_agreeable
def test_a_student_that_agrees_has_no_loss_and_no_gradient(loss):
    _, teacher = pair(6, 5)
    assert abs(loss(teacher, teacher).item()) < 1e-5 and gradient(loss, teacher, teacher).abs().max() < 1e-5


@each
def test_a_step_against_the_gradient_lowers_the_loss(loss):
    student, teacher = pair(6, 5)
    step = gradient(loss, student, teacher)
    assert step.abs().max() > 1e-3
    assert loss(student - 0.01 * step / step.norm(), teacher) < loss(student, teacher)


@each
def test_the_gradient_is_that_of_finite_differences(loss):
    student, teacher = pair(6, 5)
    direction, size = pair(6, 5, seed=1)[0], 1e-2
    slope = (loss(student + size * direction, teacher) - loss(student - size * direction, teacher)) / (2 * size)
    torch.testing.assert_close((gradient(loss, student, teacher) * direction).sum(), slope, rtol=1e-2, atol=1e-3)


@each
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e4])
def test_loss_and_gradient_stay_finite_where_logits_are_extreme_or_all_alike(loss, size):
    student, teacher = (size * x.sign() for x in pair(6, 5))
    for one, other in [(student, teacher), (teacher, student), (student, pair(6, 5)[1]), (pair(6, 5)[0], teacher)]:
        assert loss(one, other).isfinite() and gradient(loss, one, other).isfinite().all()


@each
def test_half_precision_is_computed_in_full_also_under_autocast(loss):
    student, teacher = (x.bfloat16() for x in pair(6, 5))
    expected = loss(student.float(), teacher.float())
    with torch.autocast("cpu", torch.bfloat16):
        autocast = loss(student.float(), teacher.float())
    torch.testing.assert_close(autocast, expected)
    torch.testing.assert_close(loss(student, teacher), expected)
    assert gradient(loss, student, teacher).isfinite().all()


@each_of_logits
def test_a_constant_added_to_an_images_logits_changes_nothing(loss):
    student, teacher = pair(6, 5)
    constants = torch.arange(6.0)[:, None]
    torch.testing.assert_close(loss(student + constants, teacher - constants), loss(student, teacher),
                               rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [
    kl_divergence, dist, lambda student, teacher, temperature: decoupled(student, teacher, TARGETS, temperature)])
def test_a_temperature_is_a_division_of_the_logits_and_a_square_on_the_loss(loss):
    student, teacher = pair(6, 5)
    torch.testing.assert_close(loss(student, teacher, 4.0), 16 * loss(student / 4, teacher / 4, 1.0))


def test_kl_divergence_of_a_hand_counted_case():
    # p = (1/2, 1/2), q = (3/4, 1/4): p log p/q = 1/2 log(2/3) + 1/2 log 2
    teacher = torch.zeros(1, 2)
    student = torch.tensor([[math.log(3.0), 0.0]])
    close(kl_divergence(student, teacher, 1.0), 0.5 * math.log(2 / 3) + 0.5 * math.log(2))


def test_kl_divergence_equals_soft_cross_entropy_less_the_teachers_entropy():
    (student, teacher), temperature = pair(8, 5), 4.0
    targets = (teacher / temperature).softmax(-1)
    cross_entropy = F.cross_entropy(student / temperature, targets)
    entropy = Categorical(probs=targets).entropy().mean()
    close(kl_divergence(student, teacher, temperature), temperature ** 2 * (cross_entropy - entropy))


def test_hard_label_is_the_students_surprise_at_the_teachers_class():
    student, teacher = pair(6, 5)
    expected = -np.mean([log_softmax(row)[label] for row, label in zip(student.numpy(), teacher.numpy().argmax(1))])
    close(hard_label(student, teacher), expected)


def test_hard_label_hears_only_which_class_the_teacher_prefers():
    student, teacher = pair(6, 5)
    assert hard_label(student, teacher) == hard_label(student, F.one_hot(teacher.argmax(-1), 5))


def test_decoupled_is_the_published_formula_over_masked_probabilities():
    (student, teacher), temperature, alpha, beta = pair(6, 5), 3.0, 0.7, 5.0
    total = 0.0
    for own, other, target in zip(student.double().numpy(), teacher.double().numpy(), TARGETS.tolist()):
        q, p = softmax(own / temperature), softmax(other / temperature)
        rest_q, rest_p = np.delete(q, target), np.delete(p, target)
        tckd = rel_entr([p[target], rest_p.sum()], [q[target], rest_q.sum()]).sum()
        nckd = rel_entr(rest_p / rest_p.sum(), rest_q / rest_q.sum()).sum()
        total += temperature ** 2 * (alpha * tckd + beta * nckd) / len(TARGETS)
    close(decoupled(student, teacher, TARGETS, temperature, alpha, beta), total)


def test_decoupled_is_the_plain_divergence_where_the_rest_weighs_what_the_teacher_leaves_it():
    student, teacher = pair(6, 5)
    for own, other, target in zip(student.split(1), teacher.split(1), TARGETS.split(1)):
        left = 1 - (other / 2).softmax(-1)[0, target].item()
        close(decoupled(own, other, target, 2.0, beta=left), kl_divergence(own, other, 2.0))


def test_decoupled_takes_the_largest_soft_target_for_the_target():
    student, teacher = pair(6, 5)
    soft = 0.6 * F.one_hot(TARGETS, 5) + 0.4 * F.one_hot(TARGETS.roll(1), 5)  # as mixup makes them
    assert decoupled(student, teacher, soft, 2.0) == decoupled(student, teacher, TARGETS, 2.0)


def test_decoupled_by_its_weights_hears_the_target_alone_or_the_rest_alone():
    _, teacher = pair(6, 5)
    targets = torch.zeros(6, dtype=torch.long)
    louder = teacher + torch.tensor([3.0, 0.0, 0.0, 0.0, 0.0])  # the target differs, the relations of the rest do not
    turned = torch.cat([teacher[:, :1], teacher[:, 1:].flip(1)], dim=1)  # and the other way round
    for student, silent, heard in [(louder, (0.0, 1.0), (1.0, 0.0)), (turned, (1.0, 0.0), (0.0, 1.0))]:
        assert abs(decoupled(student, teacher, targets, 1.0, *silent)) < 1e-6
        assert decoupled(student, teacher, targets, 1.0, *heard) > 0.1
    close(decoupled(turned, teacher, targets, 1.0), 8 * decoupled(turned, teacher, targets, 1.0, 0.0, 1.0))


def test_dist_is_scipys_pearson_over_rows_and_columns():
    (student, teacher), temperature, beta, gamma = pair(6, 5), 2.0, 0.5, 3.0
    q, p = (softmax(x.numpy() / temperature, axis=1) for x in (student, teacher))
    inter = np.mean([1 - pearsonr(q[i], p[i]).statistic for i in range(6)])
    intra = np.mean([1 - pearsonr(q[:, c], p[:, c]).statistic for c in range(5)])
    close(dist(student, teacher, temperature, beta, gamma), temperature ** 2 * (beta * inter + gamma * intra))


def test_dist_counts_a_constant_row_or_column_as_uncorrelated():
    student, teacher = pair(6, 5)
    close(dist(torch.zeros(6, 5), teacher), 2.0)  # every row and every column is constant
    close(dist(student[:1], teacher[:1], beta=0.0), 1.0)  # one image: columns of one
    assert gradient(dist, torch.zeros(6, 5), teacher).abs().max() < 1e4


def test_standardized_is_the_divergence_of_scipys_z_scores():
    (student, teacher), temperature = pair(6, 5), 2.0
    q, p = (Categorical(logits=torch.tensor(zscore(x.numpy(), axis=1, ddof=1)) / temperature)
            for x in (student, teacher))
    close(standardized(student, teacher, temperature), temperature ** 2 * divergence(p, q).mean())


def test_standardized_asks_for_the_order_of_logits_and_not_for_their_size():
    student, teacher = pair(6, 5)
    torch.testing.assert_close(standardized(7 * student, teacher / 3, 2.0), standardized(student, teacher, 2.0))
    assert standardized(9 * teacher, teacher, 2.0) < 1e-6 < kl_divergence(9 * teacher, teacher, 2.0)


def test_feature_distance_is_twice_one_less_the_correlation_of_channels():
    # of x and y with mean 0 and variance 1: mean (x − y)² = 1 + 1 − 2 ρ
    student, teacher = pair(2, 3, 16)
    correlation = [pearsonr(own, other).statistic
                   for own, other in zip(student.flatten(0, 1).numpy(), teacher.flatten(0, 1).numpy())]
    close(feature_distance(student, teacher), 2 - 2 * np.mean(correlation))


def test_feature_distance_weighs_a_layer_of_any_scale_and_offset_alike():
    student, teacher = pair(2, 3, 16)
    close(feature_distance(100 * student + 5, teacher / 10 - 1), feature_distance(student, teacher))


def huber(one, other):
    difference = abs(one - other)
    return difference ** 2 / 2 if difference <= 1 else difference - 0.5


def distance_loss(student, teacher):
    student, teacher = pdist(student), pdist(teacher)
    return np.mean([huber(*distances) for distances in zip(student / student.mean(), teacher / teacher.mean())])


def angle_loss(student, teacher):
    def cosine(x, i, j, k):
        one, other = x[i] - x[j], x[k] - x[j]
        return one @ other / (np.linalg.norm(one) * np.linalg.norm(other))
    return np.mean([huber(cosine(student, *triple), cosine(teacher, *triple))
                    for triple in itertools.permutations(range(len(student)), 3)])


def test_relational_is_the_published_sum_over_all_pairs_and_triples_of_images():
    student, teacher = pair(7, 4)[0], 3 * pair(7, 9, seed=1)[1] ** 3  # far from normal: both arms of Huber's loss
    arrays = student.double().numpy(), teacher.double().numpy()
    assert abs(pdist(arrays[0]) / pdist(arrays[0]).mean() - pdist(arrays[1]) / pdist(arrays[1]).mean()).max() > 1
    close(relational(student, teacher, 1.0, 0.0), distance_loss(*arrays))
    close(relational(student, teacher, 0.0, 1.0), angle_loss(*arrays))
    close(relational(student, teacher), distance_loss(*arrays) + 2 * angle_loss(*arrays))


def test_relational_of_a_hand_counted_triangle():
    # 3-4-5 against equal sides: distances 3/4, 1, 5/4 against 1; cosines 0, 3/5, 4/5 against 1/2
    student = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    teacher = torch.eye(3)
    close(relational(student, teacher, 1.0, 0.0), (0.25 ** 2 + 0.25 ** 2) / 2 / 3)
    close(relational(student, teacher, 0.0, 1.0), (0.5 ** 2 + 0.1 ** 2 + 0.3 ** 2) / 2 / 3)


def test_relational_forgives_a_shift_a_turn_and_a_scale():
    student, teacher = pair(6, 5)
    turn = torch.linalg.qr(pair(5, 5, seed=1)[0]).Q
    assert relational(3 * teacher @ turn + 1, teacher) < 1e-6
    close(relational(3 * student @ turn + 1, teacher), relational(student, teacher))


def test_relational_bears_images_that_coincide_and_batches_too_small_for_relations():
    student, teacher = pair(6, 5)
    double = torch.cat([student[:3], student[:3]])
    for one, other in [(double, teacher), (student, double), (double, double)]:
        assert relational(one, other).isfinite() and gradient(relational, one, other).abs().max() < 10
    for batch in 1, 2:  # no pair; one pair, whose distance is the mean itself
        assert relational(student[:batch], teacher[:batch]) == 0
        assert gradient(relational, student[:batch], teacher[:batch]).abs().max() < 1e-6


def test_relational_takes_the_angles_of_the_first_64_images_alone():
    student, teacher = pair(70, 3)
    angles = gradient(lambda *args: relational(*args, 0.0, 1.0), student, teacher)
    assert angles[64:].abs().max() == 0 < angles[:64].abs().amax(1).min()
    assert gradient(relational, student, teacher)[64:].abs().amax(1).min() > 0  # their distances count


def maps(*shape):
    return (x.softmax(dim=-1) for x in pair(*shape))


def test_attention_divergence_is_that_of_torchs_distributions():
    student, teacher = maps(2, 3, 4, 5)
    close(attention_divergence(student, teacher), divergence(Categorical(teacher), Categorical(student)).mean())


def test_attention_divergence_of_a_hand_counted_case():
    # the first query: 1/2 log(2/3) + 1/2 log 2; the second, whose teacher looks at one key alone: log(1 / (1/2))
    student = torch.tensor([[[[0.75, 0.25], [0.5, 0.5]]]])
    teacher = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    close(attention_divergence(student, teacher), (0.5 * math.log(2 / 3) + 0.5 * math.log(2) + math.log(2)) / 2)


def test_attention_divergence_takes_maps_of_half_precision():
    student, teacher = (x.bfloat16() for x in maps(2, 3, 4, 5))
    assert attention_divergence(student, teacher) == attention_divergence(student.float(), teacher.float())


def test_attention_divergence_compares_the_mean_head_where_heads_were_pruned():
    student, teacher = maps(2, 6, 4, 5)
    student = student[:, :2]
    expected = divergence(Categorical(teacher.mean(1)), Categorical(student.mean(1))).mean()
    close(attention_divergence(student, teacher), expected)
    assert attention_divergence(teacher.mean(1, keepdim=True).expand(-1, 2, -1, -1), teacher) < 1e-6


def test_attention_divergence_bears_a_student_that_never_looks_where_its_teacher_does():
    student, teacher = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2), torch.tensor([0.0, 1.0]).view(1, 1, 1, 2)
    close(attention_divergence(student, teacher), -math.log(1e-8))
    assert gradient(attention_divergence, student, teacher).isfinite().all()
