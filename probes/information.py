"""Mutual information between features and labels, for features that are mostly zero.

With B = [Z != 0], and Z = 0 whenever B = 0, the chain rule gives exactly

    I(Z; Y) = I(B; Y) + P(B = 1) I(Z; Y | B = 1)

The first term needs only counts. For the second, the active values of a feature are cut into bins of equally
many. Both are corrected for their bias on finite samples (Miller
1955), and cut off at zero. A feature that never fires has exactly no information, and so has one that is constant.

The estimator that SpARE was published with (Ross 2014, as in scikit-learn's ``mutual_info_classif``) adds noise to
break ties and looks at nearest neighbours: it gives features that never fire some 0.002 nats each.
"""

from __future__ import annotations

import torch
from torch import Tensor

from interp.errors import UserError

MAX_BINS = 32
_PER_BIN = 8
_CHUNK_VALUES = 2**25


def mutual_information(features: Tensor, labels: Tensor) -> Tensor:
    """Mutual information of every feature with the labels, in nats.

    Args:
        features: ``(n, n_features)``, zero where a feature does not fire; on any device.
        labels: ``(n,)``: class numbers from 0.

    Returns:
        ``(n_features,)`` float64, on the device of ``features``.

    Raises:
        UserError: If there are not as many labels as rows, or a value is not finite.
    """
    if len(features) != len(labels) or not len(labels):
        raise UserError(f"There are {len(features)} rows of features and {len(labels)} labels; give one for each row.")
    labels = labels.to(features.device, torch.long)
    width = max(1, _CHUNK_VALUES // len(features))
    return torch.cat([_information(chunk, labels) for chunk in features.split(width, dim=1)])


def _information(features: Tensor, labels: Tensor) -> Tensor:
    n, n_features = features.shape
    n_classes = int(labels.max()) + 1
    row, feature = features.nonzero(as_tuple=True)
    values, label = features[row, feature], labels[row]
    if not values.isfinite().all():
        raise UserError("The features hold NaN or infinity; encode them again.")
    fired = _counts(feature * n_classes + label, n_features, n_classes)
    silent = labels.bincount(minlength=n_classes) - fired
    presence = _plug_in(torch.stack([fired, silent], 1))

    order = values.argsort()
    order = order[feature[order].argsort(stable=True)]
    feature, label, values = feature[order], label[order], values[order]
    count = fired.sum(-1)
    rank = torch.arange(len(feature), device=features.device) - (count.cumsum(0) - count)[feature]
    # Equal values share a bin: the one of the first of them.
    first = torch.ones_like(rank, dtype=torch.bool)
    first[1:] = (values[1:] != values[:-1]) | (feature[1:] != feature[:-1])
    start = torch.where(first, torch.arange(len(rank), device=rank.device), 0).cummax(0).values if len(rank) else rank
    rank = rank[start]
    bins = (count / _PER_BIN).sqrt().floor().long().clamp(1, MAX_BINS)
    place = feature * MAX_BINS + rank * bins[feature] // count[feature]
    table = _counts(place * n_classes + label, n_features * MAX_BINS, n_classes).view(n_features, MAX_BINS, n_classes)
    return presence + count.double() / n * _plug_in(table)


def _counts(places: Tensor, n_rows: int, n_classes: int) -> Tensor:
    return places.bincount(minlength=n_rows * n_classes).view(n_rows, n_classes)


def _plug_in(table: Tensor) -> Tensor:
    """Information between rows and columns of contingency tables ``(n, rows, columns)``, less its bias: ``(n,)``."""
    counts = table.double()
    rows, columns, total = counts.sum(2), counts.sum(1), counts.sum((1, 2))
    total_or_one = total.clamp(min=1)
    plain = (_xlogx(counts).sum((1, 2)) - _xlogx(rows).sum(1) - _xlogx(columns).sum(1) + _xlogx(total)) / total_or_one
    freedom = ((rows > 0).sum(1) - 1) * ((columns > 0).sum(1) - 1)
    # Without any freedom the information is zero, of which the sums above may leave 1e-15.
    return torch.where(freedom > 0, (plain - freedom / (2 * total_or_one)).clamp(min=0), 0)


def _xlogx(x: Tensor) -> Tensor:
    return torch.xlogy(x, x)


def nearest_neighbour_information(features: Tensor, labels: Tensor, *, neighbours: int = 3, seed: int = 0) -> Tensor:
    """The published estimator (Ross 2014), feature by feature, for comparison.

    Args:
        features: ``(n, n_features)``.
        labels: ``(n,)``.
        neighbours: Nearest neighbours that are looked at.
        seed: Of the noise that breaks ties.

    Returns:
        ``(n_features,)`` float64, on the CPU.
    """
    from sklearn.feature_selection import mutual_info_classif

    found = mutual_info_classif(
        features.float().cpu().numpy(), labels.cpu().numpy(), n_neighbors=neighbours, random_state=seed
    )
    return torch.from_numpy(found).double()
