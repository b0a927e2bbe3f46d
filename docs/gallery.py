"""Writes the gallery of docs/custom-losses.md, and its pictures.

    python docs/gallery.py [--write]

The definitions are those that the tests run, in tests/custom_losses.py. Without --write the text is
only printed.
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
from fusedloss.custom import PointwiseLoss

PAGE = ROOT / "docs" / "custom-losses.md"
PICTURES = ROOT / "docs" / "gallery"
BLOCK = re.compile(r"<!-- gallery -->\n(.*?)\n<!-- /gallery -->", re.DOTALL)


@dataclass(frozen=True)
class Entry:
    title: str
    loss: PointwiseLoss
    formula: str  # LaTeX; d is the first input - target
    use: str
    source: str
    shown: dict[str, float] = field(default_factory=dict)  # parameters of check and picture


FOCAL = (
    "T.-Y. Lin, P. Goyal, R. Girshick, K. He and P. Dollár, *Focal Loss for Dense Object Detection*, "
    "ICCV 2017"
)

GALLERY = [
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


def definition(loss: PointwiseLoss) -> str:
    return re.sub(r"  # type: ignore\S*", "", inspect.getsource(loss.function)).rstrip()


def section(entry: Entry) -> str:
    name = entry.loss.__name__
    options = ", ".join(f"{key}={number:g}" for key, number in entry.shown.items())
    return f"""### {entry.title}

$$
{entry.formula}
$$

{entry.use}

```python
{definition(entry.loss)}


print({name}.check({options}))
```

```text
{entry.loss.check(**entry.shown)}
```

![Value, slope and curvature of {name}.](gallery/{name}.png)

Source: {entry.source}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the page and its pictures")
    text = "\n".join(map(section, GALLERY)).rstrip()
    if not parser.parse_args().write:
        print(text)
        return
    from PIL import Image  # comes with matplotlib

    PICTURES.mkdir(exist_ok=True)
    for entry in GALLERY:
        picture = PICTURES / f"{entry.loss.__name__}.png"
        entry.loss.plot(picture, **entry.shown)
        # A third of the size, to the same eye.
        Image.open(picture).convert("RGB").quantize(24).save(picture, optimize=True)
    block = f"<!-- gallery -->\n{text}\n<!-- /gallery -->"
    PAGE.write_text(BLOCK.sub(lambda _: block, PAGE.read_text()))


if __name__ == "__main__":
    main()
