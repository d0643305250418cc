"""A dense, slow, one-process CoNet and BIAO, written to be read: the oracle that tests compare with.

A `batch` is a dict of the whole global batch: tensors user, item, category, source_item, source_category,
label, source_label, source_valid (bool) and weight (1 = a real row, 0 = a filler row), all [B], and lists of
B id lists target_history_item, target_history_category, source_history_item, source_history_category.
`tables` maps user, target_item, target_category, source_item, source_category to [rows, d] tensors; `dense`
and `phi` map the names of the model's and the perceptron's parameters to tensors. Id 0 means "none".
Equation numbers are those of BIAO (WWW 2023).
"""

from math import prod, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F


def lookup(table, ids):
    """Rows of a table; id 0 reads as zeros, so that row 0 gets no gradient."""
    ids = torch.as_tensor(ids, dtype=torch.long, device=table.device)
    return table[ids] * (ids != 0).unsqueeze(-1).to(table.dtype)


def layers(parameters, prefix):
    return len([name for name in parameters if name.startswith(prefix + ".") and name.endswith(".weight")])


def mlp(parameters, prefix, x):
    """Linear layers `prefix.{i}`, ReLU between them and none after the last."""
    depth = layers(parameters, prefix)
    for i in range(depth):
        x = x @ parameters[f"{prefix}.{i}.weight"].T + parameters[f"{prefix}.{i}.bias"]
        if i < depth - 1:
            x = torch.relu(x)
    return x


def head(dense, name, features):
    return (features @ dense[f"{name}.weight"].T + dense[f"{name}.bias"]).squeeze(1)


def conet(tables, dense, batch, source=True):
    """CoNet: (target logit [B], source logit [B], target features [B, k]).

    Every layer crosses with one H: a_t' = relu(W_t a_t + b_t + H a_s), a_s' = relu(W_s a_s + b_s + H a_t).
    `source=False` is the -S variant: no source tower, no crossing, source logit None.
    """
    user = lookup(tables["user"], batch["user"])
    item = lookup(tables["target_item"], batch["item"])
    category = lookup(tables["target_category"], batch["category"])
    a_t = torch.cat([user, item, category], dim=1)
    item = lookup(tables["source_item"], batch["source_item"])
    category = lookup(tables["source_category"], batch["source_category"])
    a_s = torch.cat([user, item, category], dim=1)
    for h in range(layers(dense, "target_tower")):
        z_t = a_t @ dense[f"target_tower.{h}.weight"].T + dense[f"target_tower.{h}.bias"]
        if source:
            z_t = z_t + a_s @ dense[f"cross.{h}.weight"].T
            z_s = a_s @ dense[f"source_tower.{h}.weight"].T + dense[f"source_tower.{h}.bias"]
            z_s = z_s + a_t @ dense[f"cross.{h}.weight"].T
            a_s = torch.relu(z_s)
        a_t = torch.relu(z_t)
    return head(dense, "target_head", a_t), head(dense, "source_head", a_s) if source else None, a_t


def attention(phi, domain, x, heads):
    """Multi-head attention of x [N, 4d] to itself: [N, heads * d]; no biases, no output projection."""
    d = x.shape[1] // 4
    outputs = []
    for head_ in range(heads):
        rows = slice(head_ * d, (head_ + 1) * d)
        query = x @ phi[f"attention.{domain}.query.weight"][rows].T
        key = x @ phi[f"attention.{domain}.key.weight"][rows].T
        value = x @ phi[f"attention.{domain}.value.weight"][rows].T
        outputs.append(torch.softmax(query @ key.T / sqrt(d), dim=1) @ value)
    return torch.cat(outputs, dim=1)


def interest(tables, phi, domain, items, categories, candidate, heads, padding=None):
    """One user's interest in one candidate E_s [2d], eq. 4-6: [heads * d], zeros without a history."""
    if not items:
        return candidate.new_zeros(heads * candidate.numel() // 2)
    length = len(items) if padding is None else padding
    assert len(items) <= length, "cut the history before padding it"
    fill = [0] * (length - len(items))
    item = lookup(tables[f"{domain}_item"].detach(), items + fill)
    category = lookup(tables[f"{domain}_category"].detach(), categories + fill)
    x = torch.cat([item, category, candidate.expand(length, -1)], dim=1)
    out = attention(phi, domain, x, heads)
    return out[: len(items)].sum(dim=0) / length  # outputs of padded positions count as zeros


def perceptron_scores(tables, phi, batch, heads, padding=None, item_gradient=False):
    """gamma_1 * gamma_2 of eq. 3-8, [B].

    Tables are constants here, but for E_s in the global part under `item_gradient`. `padding=N` pads
    histories to N with id 0; padded positions are keys and values too, and the mean is over N.
    """
    candidate = torch.cat(
        [
            lookup(tables["source_item"], batch["source_item"]),
            lookup(tables["source_category"], batch["source_category"]),
        ],
        dim=1,
    )
    gamma_1 = mlp(phi, "global_mlp", candidate if item_gradient else candidate.detach()).squeeze(1)
    rows = []
    for j, e_s in enumerate(candidate.detach()):
        parts = []
        for domain in ("source", "target"):
            items, categories = batch[f"{domain}_history_item"][j], batch[f"{domain}_history_category"][j]
            parts.append(interest(tables, phi, domain, items, categories, e_s, heads, padding))
        rows.append(torch.cat(parts))
    gamma_2 = mlp(phi, "local_mlp", torch.stack(rows)).squeeze(1)
    return gamma_1 * gamma_2


def source_weights(scores, valid, gamma_raw, gamma="softplus"):
    """Eq. 8 with a softmax over the valid rows of the batch: [B], 0 at the others, gamma in sum."""
    weights = torch.zeros_like(scores)
    if not valid.any():
        return weights
    scale = {"softplus": F.softplus, "relu": torch.relu}[gamma](gamma_raw)
    weights[valid] = scale * torch.softmax(scores[valid], dim=0)
    return weights


def biao_weights(tables, phi, batch, heads, gamma="softplus", padding=None, item_gradient=False):
    """The perceptron's weight of every source behaviour of the batch, [B]."""
    scores = perceptron_scores(tables, phi, batch, heads, padding, item_gradient)
    return source_weights(scores, batch["source_valid"] & (batch["weight"] > 0), phi["gamma_raw"], gamma)


def joint_weights(batch, gamma0):
    """The same weight for every valid source behaviour, eq. 1 with a mean over the real rows: [B]."""
    return batch["source_valid"].to(batch["weight"]) * batch["weight"] * gamma0 / batch["weight"].sum()


def bce(logit, label):
    return F.binary_cross_entropy_with_logits(logit, label.to(logit), reduction="none")


def losses(target_logit, source_logit, batch):
    """Binary cross-entropy of every row: target [B], source [B]."""
    return bce(target_logit, batch["label"]), bce(source_logit, batch["source_label"])


def train_loss(target_logit, source_logit, batch, weights):
    """Eq. 2, with a mean over the real target rows: L_train, a scalar."""
    target, source = losses(target_logit, source_logit, batch)
    return (batch["weight"] * target).sum() / batch["weight"].sum() + (weights * source).sum()


def joint_loss(target_logit, source_logit, batch, gamma0):
    return train_loss(target_logit, source_logit, batch, joint_weights(batch, gamma0))


def dev_loss(tables, dense, dev_head, batch):
    """L_dev: mean target loss of the real rows under `dev_head` (weight [1, k], bias [1]) or the own head."""
    logit, _, features = conet(tables, dense, batch)
    if dev_head is not None:
        logit = (features @ dev_head["weight"].T + dev_head["bias"]).squeeze(1)
    return (batch["weight"] * bce(logit, batch["label"])).sum() / batch["weight"].sum()


def biao_loss(tables, dense, phi, batch, **options):
    """L_train(theta, phi); options are those of `biao_weights`."""
    target_logit, source_logit, _ = conet(tables, dense, batch)
    return train_loss(target_logit, source_logit, batch, biao_weights(tables, phi, batch, **options))


def shared_names(tables, dense):
    """theta of eq. 14: all tables, all dense parameters but the two heads."""
    return [*tables, *(name for name in dense if not name.startswith(("target_head", "source_head")))]


def replace(parameters, new):
    return {name: new.get(name, value.detach()) for name, value in parameters.items()}


def neumann(hessian_product, v, steps, alpha):
    """sum_{n=0..steps} (I - alpha H)^n v over a list of tensors, not rescaled by alpha; and every |v_n|."""
    p = list(v)
    norms = [sqrt(sum(float((x * x).sum()) for x in v))]
    for _ in range(steps):
        v = [x - alpha * hx for x, hx in zip(v, hessian_product(v), strict=True)]
        p = [x + y for x, y in zip(p, v, strict=True)]
        norms.append(sqrt(sum(float((x * x).sum()) for x in v)))
    return p, norms


def hypergradient(
    tables, dense, phi, train_batch, dev_batch, steps, alpha, dev_head=None, theta=None, loss=biao_loss, **kw
):
    """Eq. 14 over whole dense tables: ({phi name: gradient}, [|v_0|, ..., |v_steps|]).

    `theta` is a list of names, `shared_names` unless told; `loss` is L_train, and kw its options.
    """
    names = shared_names(tables, dense) if theta is None else theta
    both = {**tables, **dense}
    theta = {name: both[name].detach().requires_grad_() for name in names}
    phi = {name: value.detach().clone().requires_grad_() for name, value in phi.items()}
    tables, dense = replace(tables, theta), replace(dense, theta)

    def grad(output, inputs, direction=None, **more):
        return torch.autograd.grad(output, list(inputs.values()), direction, materialize_grads=True, **more)

    v = grad(dev_loss(tables, dense, dev_head, dev_batch), theta)
    g = grad(loss(tables, dense, phi, train_batch, **kw), theta, create_graph=True)
    p, norms = neumann(lambda x: grad(g, theta, x, retain_graph=True), v, steps, alpha)
    mixed = grad(sum((x * y).sum() for x, y in zip(p, g, strict=True)), phi)
    return {name: -value for name, value in zip(phi, mixed, strict=True)}, norms


def flatten(parameters):
    return torch.cat([value.detach().reshape(-1) for value in parameters.values()])


def unflatten(flat, like):
    pieces = flat.split([prod(value.shape) for value in like.values()])
    return {name: piece.reshape(like[name].shape) for name, piece in zip(like, pieces, strict=True)}


def explicit_hypergradient(
    tables, dense, phi, train_batch, dev_batch, steps, alpha, dev_head=None, theta=None, **options
):
    """`hypergradient` of a tiny problem by matrices, Hessian and mixed derivative: {phi name: gradient}."""
    names = shared_names(tables, dense) if theta is None else theta
    both = {**tables, **dense}
    theta = {name: both[name] for name in names}
    t0, f0 = flatten(theta).requires_grad_(), flatten(phi)

    def upper(t):
        new = unflatten(t, theta)
        return dev_loss(replace(tables, new), replace(dense, new), dev_head, dev_batch)

    def lower(t, f):
        new = unflatten(t, theta)
        return biao_loss(replace(tables, new), replace(dense, new), unflatten(f, phi), train_batch, **options)

    def lower_gradient(f):
        return torch.autograd.grad(lower(t0, f), t0, create_graph=True)[0]

    hessian = torch.autograd.functional.hessian(lambda t: lower(t, f0), t0)
    mixed = torch.autograd.functional.jacobian(lower_gradient, f0, vectorize=True)
    one = torch.eye(len(t0), dtype=t0.dtype, device=t0.device)
    series = sum(torch.linalg.matrix_power(one - alpha * hessian, n) for n in range(steps + 1))
    return unflatten(-torch.autograd.grad(upper(t0), t0)[0] @ series @ mixed, phi)


class RowWiseAdagrad:
    """Adagrad with one state per row: the sum of the row's mean squared gradients; untouched rows stay."""

    def __init__(self, table, lr, eps=1e-8):
        self.table, self.lr, self.eps = table, lr, eps
        self.state = torch.zeros(len(table), dtype=table.dtype, device=table.device)

    @torch.no_grad()
    def step(self):
        if self.table.grad is None:
            return
        for row, g in enumerate(self.table.grad):
            if (g != 0).any():
                self.state[row] += (g * g).mean()
                self.table[row] -= self.lr * g / (self.state[row].sqrt() + self.eps)


def train(tables, dense, batches, steps, lr_tables, lr_dense, weights):
    """Lower steps in place over `batches` in turn, by `weights(tables, batch)` -> [B]; L_train of every step.

    Joint: `lambda tables, batch: joint_weights(batch, gamma0)`; BIAO: `biao_weights` with a fixed phi.
    """
    row_wise = [RowWiseAdagrad(table, lr_tables) for table in tables.values()]
    adam = torch.optim.Adam(list(dense.values()), lr=lr_dense)
    history = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        for parameter in [*tables.values(), *dense.values()]:
            parameter.grad = None
        target_logit, source_logit, _ = conet(tables, dense, batch)
        loss = train_loss(target_logit, source_logit, batch, weights(tables, batch))
        loss.backward()
        for optimizer in [*row_wise, adam]:
            optimizer.step()
        history.append(loss.item())
    return history


class Problem(NamedTuple):
    tables: dict
    dense: dict
    phi: dict
    dev_head: dict
    batches: list
    heads: int


def random_batch(random, dtype, rows, categories, size, history, fillers):
    """Row 0 has no source history; row 1 no target history, and row 0's user and item; the last real row has
    no source behaviour; filler rows come last."""
    real = size - fillers
    assert real >= 4, "needs four real rows"

    def draw(low, high, count):
        return torch.randint(low, high, (count,), generator=random)

    batch = {name: draw(1, rows, size) for name in ("user", "item", "source_item")}
    batch |= {name: draw(0, categories, size) for name in ("category", "source_category")}
    batch |= {name: draw(0, 2, size).to(dtype) for name in ("label", "source_label")}
    for name in ("user", "item", "category"):
        batch[name][1] = batch[name][0]
    for name in ("user", "item", "category", "label"):
        batch[name][real:] = 0
    for name in ("source_item", "source_category", "source_label"):
        batch[name][real - 1 :] = 0
    batch["source_valid"] = torch.arange(size) < real - 1
    batch["weight"] = (torch.arange(size) < real).to(dtype)
    for domain, empty in (("source", 0), ("target", 1)):
        lengths = draw(1, history + 1, size)
        lengths[empty], lengths[real:] = 0, 0
        batch[f"{domain}_history_item"] = [draw(1, rows, n).tolist() for n in lengths.tolist()]
        batch[f"{domain}_history_category"] = [draw(0, categories, n).tolist() for n in lengths.tolist()]
    return batch


def random_problem(
    seed=0,
    dtype=torch.float64,
    rows=12,
    width=4,
    batch=8,
    heads=2,
    towers=(8, 4),
    global_hidden=(),
    local_hidden=(6,),
    history=5,
    fillers=1,
    batches=2,
    scale=0.5,
):
    """Random leaf tables [rows, width] (category tables: [rows // 2 + 1, width]), parameters and batches."""
    random = torch.Generator().manual_seed(seed)
    categories = rows // 2 + 1

    def leaf(*shape):
        return (scale * torch.randn(shape, generator=random, dtype=dtype)).requires_grad_()

    tables = {name: leaf(rows, width) for name in ("user", "target_item", "source_item")}
    tables |= {name: leaf(categories, width) for name in ("target_category", "source_category")}

    def stack(prefix, sizes, bias=True):
        out = {}
        for i in range(len(sizes) - 1):
            out[f"{prefix}.{i}.weight"] = leaf(sizes[i + 1], sizes[i])
            if bias:
                out[f"{prefix}.{i}.bias"] = leaf(sizes[i + 1])
        return out

    sizes = (3 * width, *towers)
    dense = stack("target_tower", sizes) | stack("source_tower", sizes) | stack("cross", sizes, bias=False)
    for name in ("target_head", "source_head"):
        dense |= {f"{name}.weight": leaf(1, towers[-1]), f"{name}.bias": leaf(1)}
    phi = {"gamma_raw": leaf().detach().abs().requires_grad_()}  # above 0: relu is alive
    phi |= stack("global_mlp", (2 * width, *global_hidden, 1))
    phi |= stack("local_mlp", (2 * heads * width, *local_hidden, 1))
    for domain in ("source", "target"):
        for part in ("query", "key", "value"):
            phi[f"attention.{domain}.{part}.weight"] = leaf(heads * width, 4 * width)
    dev_head = {"weight": leaf(1, towers[-1]), "bias": leaf(1)}
    data = [random_batch(random, dtype, rows, categories, batch, history, fillers) for _ in range(batches)]
    return Problem(tables, dense, phi, dev_head, data, heads)
