"""Losses from what the scorer reads off the model: option scores, cross-entropy over options, token likelihood.

Every function works on small CPU tensors in float64, so that what is lost in the model's float32 is not lost again
here. The first dimension is always the adapter slot (direction and sign).
"""

import torch


def option_scores(values: torch.Tensor, option_of_read: torch.Tensor, option_lengths: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens of each option (MeZO appendix E.2 scores an option by its mean log-probability).

    Args:
        values: [slots, reads]; one log-probability (or logit, where the normaliser cancels) per scored token.
        option_of_read: int64 [reads]; the option that the token belongs to.
        option_lengths: int64 [options]; tokens in each option.

    Returns:
        float64 [slots, options].
    """
    sums = torch.zeros(values.shape[0], option_lengths.numel(), dtype=torch.float64)
    sums.index_add_(1, option_of_read, values.double())
    return sums / option_lengths


def split_options(scores: torch.Tensor, option_counts: list[int]) -> torch.Tensor:
    """Lay the options of each example side by side: [slots, options] to [slots, examples, most options], -inf
    beyond."""
    rows = scores.split(option_counts, dim=1)
    width = max(option_counts)
    return torch.stack(
        [torch.nn.functional.pad(row, (0, width - row.shape[1]), value=-torch.inf) for row in rows], dim=1
    )


def option_cross_entropy(scores: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy with the options' scores as logits (the paper's ``train_as_classification``).

    Args:
        scores: [slots, examples, options], -inf where an example has fewer options.
        labels: int64 [examples]; the index of the right option.

    Returns:
        float64 [slots, examples].
    """
    log_probs = torch.log_softmax(scores.double(), dim=-1)
    return -log_probs.gather(-1, labels.expand(scores.shape[0], -1).unsqueeze(-1)).squeeze(-1)
