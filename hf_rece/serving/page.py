"""Pieces of a page: templates that escape what they are given, and components made of them.

Gradio fills Handlebars and JavaScript templates by evaluating the result, so that an item named
`${...}` would run as code there. What is variable is therefore filled in here, by Jinja, and goes
to Gradio as a value, which it only shows.
"""

from __future__ import annotations

import math
from typing import Any

import gradio
from jinja2 import Environment, PackageLoader, StrictUndefined

_TEMPLATES = Environment(
    loader=PackageLoader("hf_rece.serving"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def fill(template: str, **values: Any) -> str:
    """Return a template of hf_rece/serving/templates filled with values, all of them escaped."""
    return _TEMPLATES.get_template(template).render(values)


_LOOK: dict[str, Any] = {
    "css_template": fill("style.css"),
    "apply_default_css": False,
}


def panel(value: str, *, container: bool = True) -> gradio.HTML:
    """Return a component that shows HTML.

    A click on a button with data-place triggers the event `pick`, which holds its data attributes.

    Args:
        value: at first.
        container: draw a box around it.
    """
    return gradio.HTML(value, js_on_load=fill("pick.js"), container=container, **_LOOK)


def log_slider(label: str, value: int, lowest: int, highest: int, **layout: Any) -> gradio.HTML:
    """Return a slider of whole numbers on a logarithmic scale, with a box for exact ones.

    Its value is what the user wrote: a number, of any kind and size, or None.

    Args:
        label: of both.
        value: at first.
        lowest: left end of the slider.
        highest: right end of the slider.
        **layout: of the component.
    """
    low, high, position = (round(math.log10(number), 2) for number in (lowest, highest, value))
    controls = fill(
        "log_slider.html", label=label, value=value, low=low, high=high, position=position
    )
    return gradio.HTML(
        value,
        html_template=controls,
        js_on_load=fill("log_slider.js"),
        container=True,
        **_LOOK,
        **layout,
    )
