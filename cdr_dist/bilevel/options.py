"""Options of the bi-level core; apart from it, because a driver reads them without loading TorchRec."""

from __future__ import annotations

from dataclasses import dataclass, field

from cdr_dist.errors import UserError

ALL_TABLES = "tables"
DENSE = "dense"


@dataclass
class PerceptronOptions:
    """Shape of the perceptron; the released code's is preset=as_released."""

    heads: int = 4
    """Attention heads over each history (eq. 4-6)."""
    global_hidden: list[int] = field(default_factory=list)
    """Hidden layers of eq. 3; none: a single linear layer, as released."""
    local_hidden: list[int] = field(default_factory=lambda: [32, 16])
    """Hidden layers of eq. 7."""
    parts: list[str] = field(default_factory=lambda: ["global", "user"])
    """What a score is the product of: global (eq. 3) and user (eq. 4-7); one of them alone is the paper's ablation
    without the other."""
    normalisation: str = "softmax"
    """Of scores to weights (eq. 8's sigma): softmax over the batch, so that they sum to gamma, or softplus over its
    sum, the same with less contrast; sigmoid: gamma / B times twice the score's sigmoid, each for itself."""
    gamma: str = "softplus"
    """softplus, or relu as released (which cannot recover from 0)."""
    start: str = "equal"
    """equal: every behaviour starts with the same weight, as in joint training; random: every layer as PyTorch starts
    it, as released."""
    gamma_initial: float | None = None
    """Where gamma starts; null: at upper.gamma0, as in joint training."""
    padding: int | None = None
    """None: padding is masked. N: histories are filled up to N and padding takes attention mass, as released."""
    item_gradient: bool = False
    """As released: the item that enters the global part is not detached."""

    def __post_init__(self) -> None:
        if self.gamma not in ("softplus", "relu"):
            raise UserError(f"perceptron.gamma={self.gamma}: choose softplus or relu")
        if not self.parts or set(self.parts) - {"global", "user"} or len(set(self.parts)) < len(self.parts):
            raise UserError(f"perceptron.parts={self.parts}: choose global, user or both")
        if self.normalisation not in ("softmax", "softplus", "sigmoid"):
            raise UserError(f"perceptron.normalisation={self.normalisation}: choose softmax, softplus or sigmoid")
        if self.start not in ("equal", "random"):
            raise UserError(f"perceptron.start={self.start}: choose equal or random")
        if self.gamma_initial is not None and self.gamma_initial <= 0:
            raise UserError(f"perceptron.gamma_initial={self.gamma_initial}: must be positive")


@dataclass
class HypergradientOptions:
    """How eq. 14 is approximated."""

    inverse: str = "neumann"
    """Of the Hessian: neumann, conjugate_gradient, or identity (the one-step gradient; as neumann with terms=0)."""
    terms: int = 0
    """K of the Neumann series, where 0 is the one-step gradient; most products of conjugate gradients."""
    tolerance: float = 0.0
    """conjugate_gradient ends where its residual has fallen below this share of the first one."""
    damping: float = 0.0
    """Added to the Hessian's diagonal: makes one positive that is not, and the series converge sooner, to less."""
    alpha: float = 1.0
    """Step of the series (released: convlr = 1)."""
    mode: str = "exact"
    """exact: products are summed over workers; local: each worker its own series, one reduction at the end."""
    theta: list[str] = field(default_factory=lambda: ["user"])
    """What the lower level is taken to optimise: 'dense', 'tables' (all) or names of tables, such as 'user'."""
    precondition: str = "none"
    """none: one alpha for all; block: rows and dense layers each scaled by the inverse of their curvature."""

    @property
    def inverse_products(self) -> int:
        """Hessian-vector products on the way to the inverse (conjugate_gradient may need fewer)."""
        return 0 if self.inverse == "identity" else self.terms

    @property
    def passes(self) -> int:
        """Backward passes of one hypergradient: dev gradient, train gradient with graph, products, mixed."""
        return self.inverse_products + 3 + (self.precondition == "block")

    def __post_init__(self) -> None:
        if self.terms < 0:
            raise UserError(f"hypergradient.terms={self.terms}: must not be negative")
        if self.inverse not in ("neumann", "conjugate_gradient", "identity"):
            raise UserError(f"hypergradient.inverse={self.inverse}: choose neumann, conjugate_gradient or identity")
        if self.tolerance < 0 or self.damping < 0:
            raise UserError("hypergradient.tolerance and hypergradient.damping must not be negative")
        if self.inverse == "conjugate_gradient" and not self.terms:
            raise UserError(
                "hypergradient.inverse=conjugate_gradient: needs hypergradient.terms, its most products, such as 20; "
                "with terms=0 it would be the identity"
            )
        if self.tolerance and self.inverse != "conjugate_gradient":
            raise UserError(
                f"hypergradient.tolerance={self.tolerance}: only conjugate_gradient has one, and "
                f"hypergradient.inverse={self.inverse}"
            )
        if self.mode not in ("exact", "local"):
            raise UserError(f"hypergradient.mode={self.mode}: choose exact or local")
        if self.precondition not in ("none", "block"):
            raise UserError(f"hypergradient.precondition={self.precondition}: choose none or block")
        if not self.theta:
            raise UserError("hypergradient.theta: name at least one of dense, tables or a table")
