"""The colours of plots and pages."""

from typing import Final

# src: Okabe and Ito, "Color Universal Design" (2008): people with any colour vision can tell these apart.
GREY, BLUE, ORANGE, GREEN, PINK, YELLOW = "#555555", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"
PAPER, INK, RULE, FAINT = "#fafaf8", "#1a1a1e", "#deded9", "#999999"
# By the names that they have in the style of a page, which has others for dark screens.
PALETTE: Final = {
    "paper": PAPER, "ink": INK, "rule": RULE, "faint": FAINT,
    "grey": GREY, "blue": BLUE, "orange": ORANGE, "green": GREEN, "pink": PINK, "yellow": YELLOW,
}  # fmt: skip
