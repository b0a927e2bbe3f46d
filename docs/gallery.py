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
    formula: str  # LaTeX; d is input - target
    use: str
    source: str
    shown: dict[str, float] = field(default_factory=dict)  # parameters of check and picture


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
        "T.-Y. Lin, P. Goyal, R. Girshick, K. He and P. Dollár, *Focal Loss for Dense Object "
        "Detection*, ICCV 2017",
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
