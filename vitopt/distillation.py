"""Losses that listen to a teacher: pure functions, student first, teacher second, computed in float32."""

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


def hard_label(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the class that the teacher decides for, averaged over the batch.

    − log q_y,  y = argmax_c teacher_c,  q = softmax(student)

    Touvron et al., Training Data-Efficient Image Transformers & Distillation through Attention, ICML 2021
    (https://arxiv.org/abs/2012.12877), the second term of equation 3.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes), without gradient.

    Returns:
        A scalar in nats.
    """
    return F.cross_entropy(student_logits.float(), teacher_logits.argmax(dim=-1))


def decoupled(student_logits: torch.Tensor, teacher_logits: torch.Tensor, targets: torch.Tensor, temperature: float,
              alpha: float = 1.0, beta: float = 8.0) -> torch.Tensor:
    """Kullback-Leibler divergence in two parts that weigh freely: target class against the rest, and within the rest.

    T² · (α · KL(b ‖ b′) + β · KL(r ‖ r′)),  b = (p_y, 1 − p_y),  r_c = p_c / (1 − p_y) for c ≠ y,
    p = softmax(teacher / T),  b′ and r′ likewise of q = softmax(student / T)

    With α = 1 and, image by image, β = 1 − p_y it is the plain divergence. Zhao et al., Decoupled Knowledge
    Distillation, CVPR 2022 (https://arxiv.org/abs/2203.08679), equation 7.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes), without gradient.
        targets: (batch,) class indices, or (batch, classes) soft targets as mixup makes them, of which the largest
            is the target class y.
        temperature: above 0.
        alpha: weight of the target class against the rest.
        beta: weight of the divergence within the rest.

    Returns:
        A scalar in nats.
    """
    if targets.ndim == 2:
        targets = targets.argmax(dim=-1)
    # an order instead of a mask: its shape is known without waiting for the device
    target_first = F.one_hot(targets, student_logits.shape[-1]).argsort(dim=-1, descending=True)

    def split(logits):
        target, rest = (logits.float() / temperature).gather(-1, target_first).tensor_split([1], dim=-1)
        return torch.cat([target, rest.logsumexp(dim=-1, keepdim=True)], dim=-1), rest  # softmax of the first is b

    (student, student_rest), (teacher, teacher_rest) = split(student_logits), split(teacher_logits)
    return temperature ** 2 * (alpha * kl_divergence(student, teacher, 1.0)
                               + beta * kl_divergence(student_rest, teacher_rest, 1.0))


def dist(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float = 1.0, beta: float = 1.0,
         gamma: float = 1.0) -> torch.Tensor:
    """Pearson distance of the softened outputs, of each image over the classes and of each class over the batch.

    T² · (β · mean_i (1 − ρ(q_i·, p_i·)) + γ · mean_c (1 − ρ(q_·c, p_·c))),
    p = softmax(teacher / T),  q = softmax(student / T),  ρ = Pearson's correlation

    A row or column that is constant correlates with nothing: its distance is 1. Huang et al., Knowledge Distillation
    from A Stronger Teacher, NeurIPS 2022 (https://arxiv.org/abs/2205.10536), section 4; T² is that of their code.

    Args:
        student_logits: (batch, classes).
        teacher_logits: (batch, classes), without gradient.
        temperature: above 0.
        beta: weight of the relation between classes.
        gamma: weight of the relation within a class; of a single image there is none, and its distance is 1.

    Returns:
        A scalar, of each weight at most twice, times T².
    """
    student, teacher = ((logits.float() / temperature).softmax(dim=-1) for logits in (student_logits, teacher_logits))

    def distance(dim):
        # eps bounds the gradient where a student is constant, as one whose head begins with zeros
        return 1 - F.cosine_similarity(student - student.mean(dim, keepdim=True),
                                       teacher - teacher.mean(dim, keepdim=True), dim=dim, eps=1e-4).mean()

    return temperature ** 2 * (beta * distance(1) + gamma * distance(0))


def standardized(student_logits: torch.Tensor, teacher_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Kullback-Leibler divergence of outputs whose logits have mean 0 and deviation 1 in each image.

    T² · Σ_c p_c (log p_c − log q_c),  p = softmax(z(teacher) / T),  q = softmax(z(student) / T),
    z(x) = (x − mean(x)) / std(x),  std with classes − 1 as in the authors' code

    A student need not reach the size of the teacher's logits, only their relations. Sun et al., Logit Standardization
    in Knowledge Distillation, CVPR 2024 (https://arxiv.org/abs/2403.01427), section 4.

    Args:
        student_logits: (batch, classes), of 2 classes or more.
        teacher_logits: (batch, classes), without gradient.
        temperature: above 0.

    Returns:
        A scalar in nats.
    """
    def z(logits):
        logits = logits.float()
        return (logits - logits.mean(dim=-1, keepdim=True)) / (logits.std(dim=-1, keepdim=True) + 1e-7)

    return kl_divergence(z(student_logits), z(teacher_logits), temperature)


def feature_distance(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Mean squared error of features that are normalised over their channels, so that every layer weighs alike.

    mean (n(student) − n(teacher))²,  n(x) = (x − mean(x)) / √(var(x) + 10⁻⁶) at each position

    Wei et al., Contrastive Learning Rivals Masked Image Modeling in Fine-tuning via Feature Distillation, 2022
    (https://arxiv.org/abs/2205.14141), whitens its teacher so; here the student is whitened too.

    Args:
        student: (..., channels).
        teacher: the same shape, without gradient.

    Returns:
        A scalar from 0 (agreement) over 2 (no correlation) to 4.
    """
    return F.mse_loss(*(F.layer_norm(x.float(), x.shape[-1:], eps=1e-6) for x in (student, teacher)))


def relational(student: torch.Tensor, teacher: torch.Tensor, distance_weight: float = 1.0,
               angle_weight: float = 2.0) -> torch.Tensor:
    """Huber loss of how the images of a batch lie to each other: their distances, and the angles between them.

    w_d · mean_{i<j} h(d_ij, d′_ij) + w_a · mean_{j; i<k} h(cos ∠ijk, cos ∠′ijk),
    d_ij = ‖x_i − x_j‖ / mean_{i<j} ‖x_i − x_j‖,  h(a, b) = ½ (a − b)² where |a − b| ≤ 1, else |a − b| − ½

    Angles grow with batch³: of a batch above 64 only the first 64 images span them. Images that coincide have distance
    0 and right angles. Park et al., Relational Knowledge Distillation, CVPR 2019 (https://arxiv.org/abs/1904.05068),
    section 3.2.

    Args:
        student: (batch, channels) embeddings.
        teacher: (batch, channels) embeddings, without gradient; their width may differ.
        distance_weight: w_d.
        angle_weight: w_a.

    Returns:
        A scalar; 0 where the batch is too small for a pair or an angle.
    """
    def distances(embeddings):
        pairs = F.pdist(embeddings)
        return pairs / pairs.mean().clamp(min=1e-12)

    def angles(embeddings):
        embeddings = embeddings[:64]
        images = torch.arange(len(embeddings), device=embeddings.device)
        others = images[:-1] + (images[:-1] >= images[:, None])  # row j: all images but j
        steps = embeddings[others] - embeddings[:, None]
        length = steps.norm(dim=-1, keepdim=True)
        steps = steps / length.masked_fill(length == 0, torch.inf)  # neither direction nor gradient without a distance
        row, column = torch.triu_indices(*others.shape[1:] * 2, offset=1, device=embeddings.device)
        return torch.bmm(steps, steps.mT)[:, row, column]

    def huber(relation):
        student_relation, teacher_relation = relation(student.float()), relation(teacher.float())
        loss = F.smooth_l1_loss(student_relation, teacher_relation, reduction="sum")
        return loss / max(student_relation.numel(), 1)

    with torch.autocast(student.device.type, enabled=False):  # it would multiply in half precision
        return distance_weight * huber(distances) + angle_weight * huber(angles)


def attention_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Kullback-Leibler divergence of attention maps, averaged over batch, heads and queries.

    mean Σ_k p_k (log p_k − log q_k),  p = teacher,  q = max(student, 10⁻⁸)

    Where the numbers of heads differ, each map is first averaged over its heads. Wang et al., MiniLM: Deep
    Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers, NeurIPS 2020
    (https://arxiv.org/abs/2002.10957), section 3.1.

    Args:
        student: (batch, heads, queries, keys), each query's row sums to 1.
        teacher: (batch, heads, queries, keys), without gradient; heads may differ.

    Returns:
        A scalar in nats.
    """
    student, teacher = student.float(), teacher.float()
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(dim=1, keepdim=True), teacher.mean(dim=1, keepdim=True)
    return F.kl_div(student.clamp(min=1e-8).log(), teacher, reduction="none").sum(dim=-1).mean()
