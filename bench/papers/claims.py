"""What the four papers claim, and what a language model is asked; which measure answers it."""

from __future__ import annotations

import re

from . import char_gpt_norms, curvature_line, measures
from .char_gpt import CARRIED, CONTROL, ONE_LINE, PLAIN, REST
from .evidence import Claim

SINGH = "Singh et al. 2015"
LAYCA = "Carbonnelle & De Vleeschouwer 2018"
CURVATURE = "Bahamou & Goldfarb 2023"
LINE = "The minimum along a step"
BACKMATCHING = "Zhang, Chen & Liu 2018"
TRANSFORMER = "A transformer"
NORMS = "Norms at the start"
README = "README: handwritten digits"
ON_LAYCA = ("SGD", "Averaged momentum", "Adagrad", "RMSprop", "Adam")
NATS = " nats"


STORES = ("char_gpt", "char_gpt_cpu")
LOSS = "validation loss, AdamW less the rule, each at its best rate"


def _about(words: str, asked: str, measure: measures.Measure, unit: str, *arms: str) -> Claim:
    """A claim that can be answered as soon as these arms and AdamW's have their seeds."""
    return Claim(TRANSFORMER, words, asked, STORES, measure, unit, arms, 3 if unit == NATS else 2)


def _here(title: str) -> str:
    """The arms of a family but for those of other sizes."""
    return re.escape(title) + ", rate [^,]*$"


ADAMW_HERE = "AdamW, decay [^,]*, rate [^,]*$"


def _asked_of_a_transformer() -> list[Claim]:
    """What the protocol asks, family by family."""
    found, loss = [], measures.language_model
    for title in [family.title for family in ONE_LINE]:
        rest = title + REST
        better = f"{title} trains it better than AdamW"
        plain = f"leaving the rest plain pays under {title}"
        asked, two = "validation loss, all matrices less the blocks' alone", (rest, title)
        found += [
            _about(f"{better}: one line", LOSS, loss(title), NATS, _here(title), ADAMW_HERE),
            _about(f"{better}: plain rest", LOSS, loss(rest), NATS, _here(rest), ADAMW_HERE),
            _about(plain, asked, loss(*two), NATS, *map(_here, two)),
        ]
    for title in ("Muon", "Muon + hyperball"):
        rest, words = title + REST, f"{title} trains it better than AdamW"
        found.append(_about(words, LOSS, loss(rest), NATS, _here(rest), ADAMW_HERE))
    for title in [family.title for family in PLAIN if family.title != CONTROL]:
        words = f"{title.removesuffix(REST)} on matrices is worth more than a second rate"
        asked = "validation loss, AdamW with two rates less the rule"
        arms = (_here(title), _here(CONTROL))
        found.append(_about(words, asked, loss(title, CONTROL), NATS, *arms))
        words = f"{title.removesuffix(REST)} has a wider valley of rates than AdamW"
        asked = "octaves of rates within 0.05 of the best loss, the rule's less AdamW's"
        arms = (_here(title), ADAMW_HERE)
        found.append(_about(words, asked, measures.valley(title), " octaves", *arms))
    for title in CARRIED:
        rest, adamw = title + REST, "AdamW, decay [^,]*"
        for words, whose, measure, other in (
            ("to other sizes", "AdamW's", measures.carries_over(rest), adamw),
            (
                "better than AdamW's second best",
                "that of AdamW's second best",
                measures.carries_over(rest, place=1),
                adamw,
            ),
            (
                "better than that of AdamW with two rates",
                "AdamW's with two rates",
                measures.carries_over(rest, CONTROL),
                CONTROL,
            ),
        ):
            words = f"the rate of {title} carries over {words}"
            asked = f"loss by carrying the rate over, {whose} less the rule's"
            elsewhere = [f"{side}, rate [^,]*, " for side in (re.escape(rest), other)]
            here = [_here(rest), f"{other}, rate [^,]*$"]
            found.append(_about(words, asked, measure, NATS, *here, *elsewhere))
    return found


def _asked_of_norms() -> list[Claim]:
    """What the protocol asks of initial norms."""

    def claim(words: str, asked: str, measure: measures.Measure, *titles: str) -> Claim:
        arms = tuple(rf"{re.escape(title)}, norms " for title in titles)
        stores = ("char_gpt_norms", "char_gpt_norms_cpu")
        return Claim(NORMS, words, asked, stores, measure, NATS, arms, 3)

    def short(title: str) -> str:
        return title.removesuffix(REST).removesuffix(", decay 0.1")

    titles = [family.title for family in char_gpt_norms.NORMS]
    adamw, two, hyperball, layca, muon, both = titles
    pairs = [(rule, adamw) for rule in (hyperball, layca, both)]
    pairs += [(both, muon), (hyperball, two), (layca, two)]
    better = [
        claim(
            f"{short(rule)} trains a transformer better than {short(of)}",
            f"validation loss, {short(of)} less the rule, each at its best norms and rate",
            measures.from_larger_norms(rule, of),
            rule,
            of,
        )
        for rule, of in pairs
    ]
    pays = [
        claim(
            f"larger norms pay under {short(title)}",
            "validation loss at the best rate, norms as GPT-2's less 4 times as large",
            measures.language_model(f"{title}, norms x4", f"{title}, norms x1"),
            title,
        )
        for title in titles
    ]
    return better + pays


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
    *(
        Claim(
            SINGH,
            f"better than {title} on CIFAR-10{when}",
            f"test error at the end, {title} less singh",
            (store, f"{store}_cpu"),
            measures.singh_on(title),
            needs=(rf"{title}( \+ singh)?$",),
        )
        for store, when in (
            ("singh_cifar10", ""),
            ("singh_cifar10_50000", ", the rate dropped sooner"),
        )
        for title in ("SGD", "AdaGrad")
    ),
    *(
        Claim(
            LAYCA,
            f"training the first layers generalizes better than training the last: {size}",
            "accuracy with one trained layer, first less last",
            (store,),
            measures.shallow_before_deep,
        )
        for store, size in (
            ("layca_toy_cpu", "images of 14x14"),
            ("layca_toy", "of 28x28, a quarter of the epochs"),
        )
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
            digits=3,
        )
        for network, stores, kind in (
            ("graph network", ("curvature_gcn_cpu",), "hessian"),
            ("autoencoder", ("curvature_autoencoder_cpu",), "hessian"),
            ("autoencoder", ("curvature_autoencoder_cpu",), "fisher"),
            ("autoencoder, batches of 64", ("curvature_autoencoder_batch64_cpu",), "hessian"),
            ("autoencoder, batches of 64", ("curvature_autoencoder_batch64_cpu",), "fisher"),
            ("convolutional network", ("curvature_cnn_cpu",), "hessian"),
            ("convolutional network", ("curvature_cnn_cpu",), "fisher"),
        )
        for direction in ("SGD", "AdamW")
    ),
    *(
        Claim(
            CURVATURE,
            f"untuned step sizes outperform fine-tuned {direction}: graph network's test",
            "test error, best fixed rate less untuned",
            ("curvature_gcn_cpu",),
            measures.generalisation(direction, "hessian"),
        )
        for direction in ("SGD", "AdamW")
    ),
    *(
        Claim(
            LINE,
            f"it is farther away than the steps of {arm}: {network}",
            "where the train loss is least along a step, in steps, less 1",
            (store,),
            measures.minimum_along(arm),
            unit=" steps",
        )
        for network, store, arms in (
            ("convolutional network", "curvature_line_cpu", curvature_line.CNN),
            ("autoencoder", "curvature_line_autoencoder_cpu", curvature_line.AUTOENCODER),
        )
        for title, rates in arms
        for arm in (f"{title}, rate {rate:g}" for rate in rates)
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
    *(
        Claim(
            README,
            f"{rule} at {rate} errs less than {what} at the best of nine rates",
            f"test error, bare less {rule}",
            ("digits",),
            measures.on_digits(rule, *titles),
        )
        for rule, rate, titles, what in (
            ("layca", "its authors' rates", ON_LAYCA, "five optimizers"),
            ("layca", "its authors' rate", ("Adam",), "Adam"),
            ("singh", "the same rate", ("SGD", "NAG", "Adagrad"), "SGD, NAG, Adagrad"),
        )
    ),
    *_asked_of_a_transformer(),
    *_asked_of_norms(),
)
