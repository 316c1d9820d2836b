"""What the four papers claim, and which measure answers it."""

from __future__ import annotations

from . import measures
from .evidence import Claim

SINGH = "Singh et al. 2015"
LAYCA = "Carbonnelle & De Vleeschouwer 2018"
CURVATURE = "Bahamou & Goldfarb 2023"
BACKMATCHING = "Zhang, Chen & Liu 2018"

CLAIMS = (
    Claim(
        SINGH,
        "consistently better than SGD, NAG and AdaGrad on MNIST: all at one rate",
        "test error, bare less singh",
        ("singh_mnist",),
        measures.singh_table,
    ),
    Claim(
        SINGH,
        "consistently better than SGD, NAG and AdaGrad on MNIST: each at its best rate",
        "test error, bare less singh",
        ("singh_mnist_cpu",),
        measures.singh,
    ),
    Claim(
        LAYCA,
        "training the first layers generalizes better than training the last",
        "accuracy with one trained layer, first less last",
        ("layca_toy_cpu", "layca_toy"),
        measures.shallow_before_deep,
    ),
    Claim(
        LAYCA,
        "with frozen feedback the trend is inverted",
        "accuracy with one trained layer, last less first",
        ("layca_toy_frozen_cpu",),
        measures.deep_before_shallow,
    ),
    Claim(
        LAYCA,
        "uniform layer rotation rates generalize best",
        "accuracy under Layca, alpha 0 less the best other alpha",
        ("layca_alpha_c10_cpu",),
        measures.uniform_is_best,
    ),
    Claim(
        LAYCA,
        "prioritizing first layers is better than prioritizing last ones",
        "accuracy under Layca, alpha < 0 less alpha > 0",
        ("layca_alpha_c10_cpu",),
        measures.first_layers_before_last,
    ),
    Claim(
        LAYCA,
        "under SGD uniform rates are not best",
        "accuracy under SGD, the best other alpha less alpha 0",
        ("layca_alpha_c10_cpu",),
        measures.sgd_has_no_such_pattern,
    ),
    Claim(
        LAYCA,
        "Layca significantly outperforms SGD",
        "accuracy, Layca's best alpha less SGD's",
        ("layca_alpha_c10_cpu",),
        measures.layca_before_sgd,
    ),
    Claim(
        LAYCA,
        "layer rotation indicates good generalization",
        "rank correlation of rotation and accuracy over ten arms",
        ("layca_alpha_c10_cpu",),
        measures.rotation_goes_with_accuracy,
        unit="",
    ),
    Claim(
        LAYCA,
        "adaptive methods generalize worse than SGD",
        "accuracy, SGD less the mean of RMSprop, Adagrad, Adam",
        ("layca_adaptive_cpu",),
        measures.adaptive_methods_lose,
    ),
    Claim(
        LAYCA,
        "Layca eliminates that difference",
        "that gap in accuracy, bare less under Layca",
        ("layca_adaptive_cpu",),
        measures.layca_makes_up_for_it,
    ),
    Claim(
        LAYCA,
        "SGD keeps up only with weight decay",
        "accuracy of SGD, with weight decay less without",
        ("layca_adaptive_cpu",),
        measures.sgd_needs_decay,
    ),
    *(
        Claim(
            CURVATURE,
            f"untuned step sizes outperform fine-tuned {direction}: {network}, by {kind}",
            "ln of train loss, best fixed rate less untuned",
            stores,
            measures.train_loss(direction, kind),
            unit=" in ln",
        )
        for network, stores, kind in (
            ("graph network", ("curvature_gcn_cpu", "curvature_gcn"), "hessian"),
            ("autoencoder", ("curvature_autoencoder_cpu",), "hessian"),
            ("autoencoder", ("curvature_autoencoder_cpu",), "fisher"),
        )
        for direction in ("SGD", "AdamW")
    ),
    *(
        Claim(
            CURVATURE,
            f"untuned step sizes outperform fine-tuned {direction}: graph network's test",
            "test error, best fixed rate less untuned",
            ("curvature_gcn_cpu", "curvature_gcn"),
            measures.generalisation(direction, "hessian"),
        )
        for direction in ("SGD", "AdamW")
    ),
    *(
        Claim(
            BACKMATCHING,
            f"favorable results over SGD: by the {estimator} estimator",
            "test error, SGD less back-matching, each at its best rate",
            ("backmatching_vgg_cpu",),
            measures.backmatching(estimator),
        )
        for estimator in ("structural", "probe")
    ),
)
