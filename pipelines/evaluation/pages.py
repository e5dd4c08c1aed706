"""Pages for people: HTML that loads nothing from anywhere, all of one style."""

import importlib.resources

import jinja2

from pipelines.evaluation import tables


def page(template: str, **values: object) -> str:
    """Return a page.

    Args:
        template: its file below `pipelines/`.
        values: that it names; one that is not given is an error.
    """
    files = importlib.resources.files("pipelines")
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files.joinpath(name).read_text("utf-8")),
    )
    environment.filters.update(
        percent=tables.percent,
        cosine=lambda value: f"{value:.3f}",
        signed=lambda value: f"{value:+.3f}",
        size=size,
    )
    return environment.get_template(template).render(**values)


def size(num_bytes: int) -> str:
    """Return a number of bytes in words, with its unit."""
    amount = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if amount < 1000 or unit == "TB":
            return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1000
    raise AssertionError("unreachable")
