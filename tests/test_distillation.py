import math

import torch
import torch.nn.functional as F

from vitopt.distillation import kl_divergence


def test_kl_divergence_of_a_hand_counted_case():
    # p = (1/2, 1/2), q = (3/4, 1/4): p log p/q = 1/2 log(2/3) + 1/2 log 2
    teacher = torch.zeros(1, 2)
    student = torch.tensor([[math.log(3.0), 0.0]])
    expected = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)
    assert math.isclose(kl_divergence(student, teacher, 1.0).item(), expected, rel_tol=1e-6)


def test_kl_divergence_equals_soft_cross_entropy_less_the_teachers_entropy():
    torch.manual_seed(0)
    student, teacher, temperature = torch.randn(8, 5), torch.randn(8, 5), 4.0
    targets = (teacher / temperature).softmax(-1)
    cross_entropy = F.cross_entropy(student / temperature, targets)
    entropy = torch.distributions.Categorical(probs=targets).entropy().mean()
    expected = temperature ** 2 * (cross_entropy - entropy)
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), expected)


def test_a_student_that_agrees_has_no_loss_and_no_gradient():
    logits = torch.randn(4, 3, requires_grad=True)
    loss = kl_divergence(logits, logits.detach() + 7.0, 2.0)  # a constant changes no softmax
    loss.backward()
    assert loss.item() < 1e-6 and logits.grad.abs().max() < 1e-6
