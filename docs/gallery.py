"""Writes the galleries of docs/custom-losses.md and docs/losses-over-rows.md, and their pictures.

    python docs/gallery.py [--write]

The definitions are those that the tests run, in tests/custom_losses.py and tests/row_losses.py. Without
--write the text is only printed.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import custom_losses as defined
import row_losses as rows
from fusedloss.custom import PointwiseLoss, RowLoss
from fusedloss.custom.levels import level_form

PICTURES = ROOT / "docs" / "gallery"
BLOCK = re.compile(r"<!-- gallery -->\n(.*?)\n<!-- /gallery -->", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    title: str
    loss: PointwiseLoss | RowLoss
    formula: str  # LaTeX; for one element, d is the first input - target
    use: str
    source: str
    shown: dict[str, float] = field(default_factory=dict)  # parameters of check and picture

    @property
    def picture(self) -> str:
        return ("rows_" if isinstance(self.loss, RowLoss) else "") + f"{self.loss.__name__}.png"


FOCAL = (
    "T.-Y. Lin, P. Goyal, R. Girshick, K. He and P. Dollár, *Focal Loss for Dense Object Detection*, "
    "ICCV 2017"
)

POINTWISE = [
    Entry(
        "Log-cosh",
        defined.log_cosh,
        r"\log \cosh d = d + \log(1 + e^{-2d}) - \log 2",
        "Regression with outliers: half of MSE's parabola near 0, MAE's line far off, and smooth to "
        "any order, for a method that uses curvature. Written with `softplus`, since cosh overflows.",
        "R. A. Saleh and A. K. M. E. Saleh, *Statistical Properties of the log-cosh Loss Function "
        "Used in Machine Learning*, 2022",
    ),
    Entry(
        "Charbonnier",
        defined.charbonnier,
        r"\sqrt{d^2 + \epsilon^2}",
        "Image restoration and optical flow: MAE without its kink; eps is the width of the rounded "
        "part.",
        "P. Charbonnier, L. Blanc-Féraud, G. Aubert and M. Barlaud, *Two deterministic half-quadratic "
        "regularization algorithms for computed imaging*, ICIP 1994",
        {"eps": 0.3},
    ),
    Entry(
        "Cauchy",
        defined.cauchy,
        r"\frac{c^2}{2} \log\left(1 + (d/c)^2\right)",
        "Heavy-tailed noise: beyond c the slope falls again, as 1/d, so an outlier pulls less the "
        "farther off it is.",
        "P. W. Holland and R. E. Welsch, *Robust regression using iteratively reweighted "
        "least-squares*, 1977",
    ),
    Entry(
        "Welsch",
        defined.welsch,
        r"\frac{c^2}{2} \left(1 - e^{-(d/c)^2}\right)",
        "Gross errors: the slope of an outlier vanishes, smoothly. Not convex, so begin from a fit "
        "with a convex loss. The default c is 95% efficient under normal noise of variance 1.",
        "J. E. Dennis and R. E. Welsch, *Techniques for nonlinear least squares and robust "
        "regression*, 1978",
    ),
    Entry(
        "Tukey's biweight",
        defined.tukey,
        r"\frac{c^2}{6} \left(1 - (1 - (d/c)^2)^3\right) \text{ for } |d| \le c, \quad "
        r"\frac{c^2}{6} \text{ beyond}",
        "Gross errors that should not count at all: beyond c the slope is 0. Scale the residuals "
        "first; an initial fit that is off by more than c learns nothing.",
        "A. E. Beaton and J. W. Tukey, *The fitting of power series, meaning polynomials, "
        "illustrated on band-spectroscopic data*, Technometrics 1974",
        {"c": 2.0},
    ),
    Entry(
        "Quantile",
        defined.quantile,
        r"\max(-q d,\; (1 - q) d)",
        "The q-quantile instead of the mean: prediction intervals, or stock that lasts on 90 of 100 "
        "days. Also called pinball loss.",
        "R. Koenker and G. Bassett, *Regression Quantiles*, Econometrica 1978",
        {"q": 0.9},
    ),
    Entry(
        "Smoothed quantile",
        defined.smooth_quantile,
        r"-q d + w \log(1 + e^{d/w})",
        "The same with its kink rounded: slope and curvature are continuous, and as `width` (w) goes "
        "to 0 it is the quantile loss. `max(a, b)` is `a + relu(b - a)`, and `softplus` is the smooth "
        "`relu`; any kinked loss can be made smooth like this.",
        "S. Zheng, *Gradient descent algorithms for quantile regression with smooth approximation*, "
        "International Journal of Machine Learning and Cybernetics 2011",
        {"q": 0.9, "width": 0.3},
    ),
    Entry(
        "Asymmetric squared error",
        defined.asymmetric,
        r"u\, d^2 \text{ for } d < 0, \quad o\, d^2 \text{ for } d \ge 0",
        "A forecast too low costs more (lost sales, an outage) than one too high: `under` (u) and "
        "`over` (o) are the prices. The slope is continuous. Its minimum is an expectile.",
        "W. K. Newey and J. L. Powell, *Asymmetric Least Squares Estimation and Testing*, "
        "Econometrica 1987",
    ),
    Entry(
        "Poisson",
        defined.poisson,
        r"e^{x} - y x",
        "Counts: `input` (x) is the logarithm of the expected count, `target` (y) the count. The "
        "same as `torch.nn.functional.poisson_nll_loss`. One wild log-rate has a huge slope: train "
        "with `clip_grad`.",
        "P. McCullagh and J. A. Nelder, *Generalized Linear Models*, 1989",
    ),
    Entry(
        "Focal",
        defined.focal,
        r"-\alpha\, y\, (1 - p)^\gamma \log p - (1 - \alpha) (1 - y)\, p^\gamma \log(1 - p), \quad "
        r"p = \sigma(x)",
        "Few positives among many easy negatives: elements that are already classified well count "
        "little. `input` (x) is the logit, `target` (y) is 0 or 1.",
        FOCAL,
    ),
    Entry(
        "Focal with a mask",
        defined.masked_focal,
        r"\text{the focal loss where the mask is 1}, \quad 0 \text{ elsewhere}",
        "Pixels without a label, or boxes that are neither object nor background: they count neither in "
        "value nor in gradient, even where `input` is infinite or nan. The mask has `input`'s dtype, and "
        "may broadcast. With `weight=mask` too, a mean is one over what counts.",
        FOCAL,
    ),
    Entry(
        "Sigmoid focal",
        defined.sigmoid_focal,
        r"\alpha_y \left(1 - p_y\right)^\gamma \left(-\log p_y\right), \quad p = \sigma(x), \quad "
        r"p_y = y p + (1 - y)(1 - p), \quad \alpha_y = y \alpha + (1 - y)(1 - \alpha)",
        "The same as `torchvision.ops.sigmoid_focal_loss`, also for targets between 0 and 1 and for a "
        'negative `alpha`, which leaves out the factor. There the default reduction is `"none"`.',
        FOCAL,
    ),
    Entry(
        "Hinge of a GAN",
        defined.gan_hinge,
        r"\max(1 - s x,\; 0)",
        "The discriminator of a generative adversarial network: `sign` (s) is 1 for the scores of real "
        "samples and -1 for those of generated ones, and there is no target. The generator's loss is "
        "`-score.mean()`.",
        "J. H. Lim and J. C. Ye, *Geometric GAN*, 2017",
    ),
    Entry(
        "Gaussian with a predicted variance",
        defined.gaussian_nll,
        r"\frac{1}{2} \left(\log v + \frac{d^2}{v}\right)",
        "Regression that predicts its own uncertainty: the negative log-likelihood of a normal "
        "distribution, without the constant. `variance` (v) must be positive, such as a `softplus`; it "
        "may broadcast, as one variance for each row does.",
        "D. A. Nix and A. S. Weigend, *Estimating the mean and variance of the target probability "
        "distribution*, ICNN 1994",
    ),
    Entry(
        "Gaussian with a predicted log-variance",
        defined.log_gaussian_nll,
        r"\frac{1}{2} \left(\ell + d^2 e^{-\ell}\right)",
        "The same, for a network whose output `logvar` (ℓ) may be any number.",
        "A. Kendall and Y. Gal, *What Uncertainties Do We Need in Bayesian Deep Learning for Computer "
        "Vision?*, NeurIPS 2017",
    ),
    Entry(
        "β-NLL",
        defined.beta_nll,
        r"\lfloor v \rfloor^\beta\, \frac{1}{2} \left(\log v + \frac{d^2}{v}\right), \quad "
        r"\lfloor v \rfloor \text{ without a gradient}",
        "With the likelihood alone, elements of large variance hardly train the mean, and stay badly "
        "fitted. This weighs them by a power of their variance: the slope by the mean is that of the "
        "likelihood for `beta` 0, and of MSE for 1.",
        "M. Seitzer, A. Tavakoli, D. Antic and G. Martius, *On the Pitfalls of Heteroscedastic "
        "Uncertainty Estimation with Probabilistic Neural Networks*, ICLR 2022",
    ),
    Entry(
        "Student's t",
        defined.student_t,
        r"\frac{\nu + 1}{2} \log\left(1 + \frac{d^2}{\nu s^2}\right) + \log s + "
        r"\log \frac{\sqrt{\pi \nu}\; \Gamma(\nu / 2)}{\Gamma((\nu + 1) / 2)}",
        "Uncertainty with outliers: the negative log-likelihood of a t distribution, whose slope is "
        "bounded. `scale` (s) is predicted and positive; `df` (ν) is small for heavy tails. To learn ν "
        "as well, make it a tensor: the constant then is no constant, and gets a gradient.",
        "K. L. Lange, R. J. A. Little and J. M. G. Taylor, *Robust Statistical Modeling Using the t "
        "Distribution*, JASA 1989",
    ),
]

KL = r"\operatorname{KL}"
Z = "A. Chowdhery et al., *PaLM: Scaling Language Modeling with Pathways*, JMLR 2023"

ROWS = [
    Entry(
        "Distillation",
        rows.distillation,
        r"T^2 \sum_j q_j \left(\log q_j - \log p_j\right), \quad "
        r"p = \operatorname{softmax}(s / T), \quad q = \operatorname{softmax}(t / T)",
        "A small model (its logits are s) learns from the probabilities of a large one (t). A temperature "
        "T above 1 shows what the teacher holds for possible besides its favourite; T² keeps the size of "
        "the gradient. The teacher gets a gradient only if it requires one.",
        "G. Hinton, O. Vinyals and J. Dean, *Distilling the Knowledge in a Neural Network*, 2015",
        {"T": 2.0},
    ),
    Entry(
        "Generalised Jensen-Shannon divergence",
        rows.jsd,
        rf"\beta\, {KL}(q \,\|\, m) + (1 - \beta)\, {KL}(p \,\|\, m), \quad m = \beta q + (1 - \beta) p",
        "Distillation that is bounded, however much the two disagree. A small `beta` covers all that the "
        "teacher (q) does, as the loss above; a large one keeps the student (p) from what the teacher "
        "never does. It must be between 0 and 1, both excluded. The mixture m stands inside a logarithm, "
        "which costs one walk more.",
        "R. Agarwal et al., *On-Policy Distillation of Language Models: Learning from Self-Generated "
        "Mistakes*, ICLR 2024",
    ),
    Entry(
        "Focal, many classes",
        rows.focal,
        r"-(1 - p_y)^\gamma \log p_y, \quad p = \operatorname{softmax}(x)",
        "Rare or hard classes beside many easy rows: rows that are classified well count little. "
        "`one_minus_softmax` is the sum of the other probabilities, and keeps its digits where the label is "
        "almost sure.",
        FOCAL,
    ),
    Entry(
        "GRPO",
        rows.grpo,
        r"-\min\left(r A,\; \operatorname{clip}(r, 1 - l, 1 + h)\, A\right) - e\, H(p), \quad "
        r"r = p_y\, e^{-\text{old}}",
        "Reinforcement learning of a language model: a row is a token, y the token that was sampled, `old` its "
        "log-probability then, and A the `advantage` of its answer, which is its reward measured against the "
        "rewards of other answers to the same question. A token whose probability has moved too far has no "
        "gradient. PPO has the same formula. H is the entropy; `low` (l), `high` (h) and `entropy` (e) are "
        "parameters, and DAPO's bounds differ from each other.",
        "Z. Shao et al., *DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language "
        "Models*, 2024; Q. Yu et al., *DAPO: An Open-Source LLM Reinforcement Learning System at Scale*, 2025",
    ),
    Entry(
        "CISPO",
        rows.cispo,
        r"-\lfloor \min(r,\; 1 + h) \rfloor\, A \log p_y, \quad "
        r"\lfloor \cdot \rfloor \text{ without a gradient}",
        "The same task. The ratio r is clipped, and not the gradient, so that every token goes on learning, "
        "also the rare ones at which an answer turns.",
        "MiniMax, *MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention*, 2025",
    ),
    Entry(
        "Balanced cross-entropy with z-loss",
        rows.balanced,
        r"-b_y \log p_y + z \left(\log \sum_j e^{x_j}\right)^2",
        "Classes of different frequency: `balance` (b) has one number for each. The second term holds the "
        "normaliser near 1, so that logits do not drift in low precision. `weight=` weighs rows, and not "
        "classes.",
        "Y. Cui, M. Jia, T.-Y. Lin, Y. Song and S. Belongie, *Class-Balanced Loss Based on Effective Number "
        f"of Samples*, CVPR 2019; {Z}",
        {"z": 0.01},
    ),
    Entry(
        "Smoothed cross-entropy with z-loss",
        rows.z_loss,
        r"-(1 - \epsilon) \log p_y - \frac{\epsilon}{C} \sum_j \log p_j + "
        r"z \left(\log \sum_j e^{x_j}\right)^2",
        "Classification and language models: smoothing keeps a model from being too sure, and z from letting "
        "its logits drift. Smoothing wants a bit of every class, so a logit of -inf makes the loss infinite.",
        f"C. Szegedy et al., *Rethinking the Inception Architecture for Computer Vision*, CVPR 2016; {Z}",
        {"z": 0.01},
    ),
    Entry(
        "Cosine",
        rows.cosine,
        r"1 - \frac{\sum_j a_j b_j}{|a|\, |b|}",
        "Embeddings that should point the same way, of any length: feature distillation, or two views of one "
        "image. The value of a vector of length 0 is nan.",
        "X. Chen and K. He, *Exploring Simple Siamese Representation Learning*, CVPR 2021",
    ),
    Entry(
        "Triplet",
        rows.triplet,
        r"\max\left(m + |a - p| - |a - n|,\; 0\right)",
        "Embeddings again: the `anchor` (a) lies nearer to the `positive` (p) than to the `negative` (n), by a "
        "`margin` (m) at least. All three get a gradient from the same two walks.",
        "V. Balntas, E. Riba, D. Ponsa and K. Mikolajczyk, *Learning local feature descriptors with triplets "
        "and shallow convolutional neural networks*, BMVC 2016",
    ),
    Entry(
        "Dice",
        rows.dice,
        r"1 - \frac{2 \sum_j p_j m_j + s}{\sum_j p_j + \sum_j m_j + s}, \quad p = \sigma(x)",
        "Segmentation of few pixels: the loss is the overlap of what was found and the mask, and pixels of "
        "the background do not drown it. A row is all pixels of an image, or of one of its channels: "
        "`x.flatten(2)`. `smooth` (s) keeps an empty mask from dividing by 0.",
        "F. Milletari, N. Navab and S.-A. Ahmadi, *V-Net: Fully Convolutional Neural Networks for Volumetric "
        "Medical Image Segmentation*, 3DV 2016, where the sums of the denominator are of squares",
    ),
    Entry(
        "ListNet",
        rows.list_net,
        r"-\sum_j \operatorname{softmax}(y)_j \log p_j, \quad p = \operatorname{softmax}(x)",
        "Ranking: a row is a list of documents, with the `scores` (x) of the model and their `relevance` (y).",
        "Z. Cao, T. Qin, T.-Y. Liu, M.-F. Tsai and H. Li, *Learning to Rank: From Pairwise Approach to Listwise "
        "Approach*, ICML 2007",
    ),
]  # fmt: skip

GALLERIES = {
    ROOT / "docs" / "custom-losses.md": POINTWISE,
    ROOT / "docs" / "losses-over-rows.md": ROWS,
}


def definition(loss: PointwiseLoss | RowLoss) -> str:
    return re.sub(r"  # type: ignore\S*", "", inspect.getsource(loss.function)).rstrip()


def walks(loss: RowLoss) -> int:
    return len(level_form(loss._traced).by_level) + 1


def below(entry: Entry) -> str:
    """What stands between the definition and the picture: what check() prints, or the walks. (What it
    prints for rows is about the digits of this machine's kernels.)"""
    if isinstance(entry.loss, RowLoss):
        return f"```\n\nWalks over a row: {walks(entry.loss)}.\n"
    options = ", ".join(f"{key}={number:g}" for key, number in entry.shown.items())
    return f"""

print({entry.loss.__name__}.check({options}))
```

```text
{entry.loss.check(**entry.shown)}
```
"""


def section(entry: Entry) -> str:
    rows = isinstance(entry.loss, RowLoss)
    return f"""### {entry.title}

$$
{entry.formula}
$$

{entry.use}

```python
{definition(entry.loss)}
{below(entry)}
![{"Value and gradient" if rows else "Value, slope and curvature"} of {entry.loss.__name__}.](gallery/{entry.picture})

Source: {entry.source}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the pages and their pictures")
    write = parser.parse_args().write
    for page, entries in GALLERIES.items():
        text = "\n".join(map(section, entries)).rstrip()
        if not write:
            print(text)
            continue
        from PIL import Image  # comes with matplotlib

        PICTURES.mkdir(exist_ok=True)
        for entry in entries:
            picture = PICTURES / entry.picture
            entry.loss.plot(picture, **entry.shown)
            # A third of the size, to the same eye.
            Image.open(picture).convert("RGB").quantize(24).save(picture, optimize=True)
        block = f"<!-- gallery -->\n{text}\n<!-- /gallery -->"
        page.write_text(BLOCK.sub(lambda _, block=block: block, page.read_text()))


if __name__ == "__main__":
    main()
