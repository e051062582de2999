"""Losses that listen to a teacher."""

import torch
import torch.nn.functional as F


def kl_divergence(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of the softened outputs, averaged over the batch.

    T² · Σ_c p_c (log p_c − log q_c),  p = softmax(teacher / T),  q = softmax(student / T)

    T² keeps the gradient's size independent of the temperature. Hinton et al., Distilling the Knowledge in a
    Neural Network, 2015 (https://arxiv.org/abs/1503.02531), section 2.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes), without gradient.
        temperature: above 0.

    Returns:
        A scalar in nats.
    """
    student = F.log_softmax(student_logits.float() / temperature, dim=-1)
    teacher = F.log_softmax(teacher_logits.float() / temperature, dim=-1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature ** 2
