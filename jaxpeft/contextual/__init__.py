"""SparseLoRA: products with the frozen base that leave out channels in training (Khaki et al. 2025, arXiv 2506.16500).

In each encoder layer and for each batch, `choice` finds the channels that matter least for this batch, from cheap estimates
(`estimators`). `layers` leaves them out of the products. How many are left out in which layer is a setting of the run
(`ContextualSparsity`), which `sensitivity` can propose. Evaluation is always dense.

Not to be confused with Sparse LoRA, which sets entries of the adapter to zero (`jaxpeft.pruning`).
"""

from jaxpeft.contextual.settings import ContextualSparsity

__all__ = ["ContextualSparsity"]
